"""Next-token predictions of all variants of a batch against the model's own.

Where the head is plain and of float32, and its operator compiled, statistics come from tiles of
logits that live for a moment (`ops.head_pair_stats`). Otherwise logits exist for a few sequences at
a time: the operator's plain torch form would save nothing over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from saelens_certify import ops
from saelens_certify.config import CertifyConfig
from saelens_certify.forward import BasePass, FinalState, ForwardEngine, PlainHead
from saelens_certify.ops._library import use_native

Columns = dict[str, NDArray]

_KEYS = ("loss", "kl", "top1_agreement", "gold_logprob_gap")


@dataclass(frozen=True)
class VariantState:
    """What a variant's predictions are computed from.

    Attributes:
        rows: Sequences of the batch that were run, ascending.
        final: Their states after the last block.
        whole_batch: Whether that is every sequence, by the variant's nature.
    """

    rows: Int[Tensor, " rows"]
    final: FinalState
    whole_batch: bool


def output_statistics(
    engine: ForwardEngine,
    base: BasePass,
    variants: Sequence[VariantState],
    config: CertifyConfig,
) -> tuple[NDArray[np.float64], list[Columns]]:
    """Compare next-token distributions with the model's.

    Args:
        engine: The model.
        base: The batch.
        variants: What is compared; at least one runs on the whole batch.
        config: Settings.

    Returns:
        The model's own loss per sequence, and for each variant its columns over its rows.
    """
    head = engine.plain_head()
    if head is not None and use_native(config.impl, head.W_U.device):
        return _from_residuals(engine, head, base, variants, config)
    return _from_logits(engine, base, variants, config)


def _from_residuals(
    engine: ForwardEngine,
    head: PlainHead,
    base: BasePass,
    variants: Sequence[VariantState],
    config: CertifyConfig,
) -> tuple[NDArray[np.float64], list[Columns]]:
    """All whole-batch variants share the base's logits; a variant on some sequences does not."""
    per_sequence = base.tokens.shape[1] - 1
    inputs = engine.head_input(base.final)
    targets = base.tokens[:, 1:].to(inputs.device)

    def compared(reference: Tensor, residual: Tensor, gold: Tensor) -> tuple[Tensor, Columns]:
        stats = ops.head_pair_stats(
            reference,
            residual,
            head.W_U,
            gold.flatten(),
            config.alpha,
            b_U=head.b_U,
            softcap=head.softcap,
            d_vocab=engine.d_vocab,
            impl=config.impl,
        )
        return stats.bits_base, _columns(stats, per_sequence)

    outputs: list[Columns] = [{} for _ in variants]
    whole = [index for index, variant in enumerate(variants) if variant.whole_batch]
    stacked = torch.cat([engine.head_input(variants[i].final.residual) for i in whole])
    bits_base, columns = compared(inputs, stacked, targets)
    for place, index in enumerate(whole):
        part = slice(place * len(base.tokens), (place + 1) * len(base.tokens))
        outputs[index] = {key: values[part] for key, values in columns.items()}
    by_sequence = inputs.unflatten(0, (-1, per_sequence))
    for index, variant in enumerate(variants):
        if not variant.whole_batch:
            rows = variant.rows.to(inputs.device)
            residual = engine.head_input(variant.final.residual)
            _, outputs[index] = compared(by_sequence[rows].flatten(0, 1), residual, targets[rows])
    return _sequence_means(bits_base[: inputs.shape[0]], per_sequence), outputs


def _from_logits(
    engine: ForwardEngine,
    base: BasePass,
    variants: Sequence[VariantState],
    config: CertifyConfig,
) -> tuple[NDArray[np.float64], list[Columns]]:
    """A few sequences at a time, the base's logits once for all variants."""
    n_sequences, length = base.tokens.shape
    tokens = config.logits_tokens(base.final.shape[-1], engine.d_vocab)
    group = max(1, tokens // (length - 1))
    loss_base = np.empty(n_sequences)
    outputs: list[Columns] = [
        {key: np.empty(len(variant.rows)) for key in _KEYS} for variant in variants
    ]
    base_state = FinalState(base.tokens, base.final)
    for start in range(0, n_sequences, group):
        stop = min(start + group, n_sequences)
        base_logits = engine.logits(base_state, slice(start, stop))
        for variant, output in zip(variants, outputs, strict=True):
            first, last = (int((variant.rows < edge).sum()) for edge in (start, stop))
            if first == last:
                continue
            mine = slice(first, last)
            reference = base_logits
            if last - first < stop - start:
                local = (variant.rows[mine] - start).to(base_logits.device)
                reference = base_logits.unflatten(0, (-1, length - 1))[local].flatten(0, 1)
            logits = engine.logits(variant.final, mine)
            stats = ops.pair_stats(
                reference,
                logits,
                # A model split over devices has its embedding on one and its head on another.
                variant.final.tokens[mine, 1:].flatten().to(logits.device),
                config.alpha,
                d_vocab=engine.d_vocab,
                impl=config.impl,
            )
            for key, values in _columns(stats, length - 1).items():
                output[key][mine] = values
            if variant.whole_batch:
                loss_base[start:stop] = _sequence_means(stats.bits_base, length - 1)
    return loss_base, outputs


def _columns(stats: ops.PairStats, per_sequence: int) -> Columns:
    values = (stats.bits, stats.kl, stats.agree, stats.gold_logprob_gap)
    return {
        key: _sequence_means(each, per_sequence) for key, each in zip(_KEYS, values, strict=True)
    }


def _sequence_means(values: Tensor, per_sequence: int) -> NDArray[np.float64]:
    return values.double().unflatten(0, (-1, per_sequence)).mean(dim=1).cpu().numpy()
