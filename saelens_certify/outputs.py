"""Next-token predictions of all variants of a batch against the model's own.

Where the head is plain and of float32, and its operator compiled, statistics come from tiles of
logits that live for a moment (`ops.head_pair_stats`). Otherwise logits exist for a few sequences at
a time: the operator's plain torch form would save nothing over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from saelens_certify import ops
from saelens_certify.config import CertifyConfig
from saelens_certify.forward import BasePass, FinalState, ForwardEngine, PlainHead
from saelens_certify.ops._library import use_native

Columns = dict[str, NDArray]
TokenValues = Float64[Tensor, "rows predicted"]

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
) -> tuple[TokenValues, list[dict[str, TokenValues]]]:
    """Compare next-token distributions with the model's.

    Args:
        engine: The model.
        base: The batch.
        variants: What is compared; at least one runs on the whole batch.
        config: Settings.

    Returns:
        The model's own loss of each predicted token, bits, and for each variant its statistics over its
        rows: ``loss``, ``kl`` and ``gold_logprob_gap`` in bits, ``top1_agreement``.
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
) -> tuple[TokenValues, list[dict[str, TokenValues]]]:
    """All whole-batch variants share the base's logits; a variant on some sequences does not."""
    per_sequence = base.tokens.shape[1] - 1
    inputs = engine.head_input(base.final)
    targets = base.tokens[:, 1:].to(inputs.device)

    def compared(
        reference: Tensor, residual: Tensor, gold: Tensor
    ) -> tuple[Tensor, dict[str, TokenValues]]:
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
        return stats.bits_base, _by_key(stats, per_sequence)

    outputs: list[dict[str, TokenValues]] = [{} for _ in variants]
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
    return _by_sequence(bits_base[: inputs.shape[0]], per_sequence), outputs


def _from_logits(
    engine: ForwardEngine,
    base: BasePass,
    variants: Sequence[VariantState],
    config: CertifyConfig,
) -> tuple[TokenValues, list[dict[str, TokenValues]]]:
    """A few sequences at a time, the base's logits once for all variants."""
    n_sequences, length = base.tokens.shape
    tokens = config.logits_tokens(base.final.shape[-1], engine.d_vocab)
    group = max(1, tokens // (length - 1))
    loss_base = _empty(n_sequences, length)
    outputs = [{key: _empty(len(variant.rows), length) for key in _KEYS} for variant in variants]
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
            for key, values in _by_key(stats, length - 1).items():
                output[key][mine] = values
            if variant.whole_batch:
                loss_base[start:stop] = _by_sequence(stats.bits_base, length - 1)
    return loss_base, outputs


def prediction_statistics(
    engine: ForwardEngine, state: FinalState, config: CertifyConfig
) -> tuple[TokenValues, Bool[Tensor, "rows predicted"]]:
    """Log-probability of each token given those before it, and whether it is the most likely one.

    Args:
        engine: The model.
        state: A base or patched state.
        config: Settings.

    Returns:
        Natural log-probabilities, not smoothed, and flags; position 0 is not predicted.
    """
    n_sequences, length = state.tokens.shape
    group = max(1, config.logits_tokens(state.residual.shape[-1], engine.d_vocab) // (length - 1))
    logprob = _empty(n_sequences, length)
    greedy = torch.empty(n_sequences, length - 1, dtype=torch.bool, device="cpu")
    for start in range(0, n_sequences, group):
        part = slice(start, start + group)
        logits = engine.logits(state, part)
        gold = state.tokens[part, 1:].flatten().to(logits.device)
        stats = ops.token_stats(
            logits, gold, config.alpha, d_vocab=engine.d_vocab, impl=config.impl
        )
        logprob[part] = _by_sequence(stats.gold_logprob, length - 1)
        greedy[part] = (stats.argmax == gold).cpu().unflatten(0, (-1, length - 1))
    return logprob, greedy


def smoothed_again(bits: Tensor, d_vocab: int, alpha: float, other: float) -> Tensor:
    """Loss under another smoothing, from the probability that a loss stands for.

    Args:
        bits: ``-log2((1 - alpha) p + alpha / V)``, float64.
        d_vocab: V.
        alpha: Smoothing of ``bits``.
        other: Smoothing wanted.
    """
    if alpha == other:
        return bits
    p = ((torch.exp2(-bits) - alpha / d_vocab) / (1 - alpha)).clamp(min=0.0)
    return -torch.log2((1 - other) * p + other / d_vocab)


def _by_key(stats: ops.PairStats, per_sequence: int) -> dict[str, TokenValues]:
    values = (stats.bits, stats.kl, stats.agree, stats.gold_logprob_gap)
    return {key: _by_sequence(each, per_sequence) for key, each in zip(_KEYS, values, strict=True)}


def _by_sequence(values: Tensor, per_sequence: int) -> TokenValues:
    return values.double().cpu().unflatten(0, (-1, per_sequence))


def _empty(n_sequences: int, length: int) -> TokenValues:
    return torch.empty(n_sequences, length - 1, dtype=torch.float64, device="cpu")
