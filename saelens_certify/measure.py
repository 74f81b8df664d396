"""The one engine: tokens once, the model once per batch, each SAE once, each variant one suffix.

`calibrate` sees how often each feature is active; `measure` yields the evidence, sequence by sequence. The
predictions themselves, token by token: `predictions.token_outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saelens_certify import ops
from saelens_certify.config import CertifyConfig
from saelens_certify.forward import BasePass, ForwardEngine
from saelens_certify.horizons import horizon_columns
from saelens_certify.outputs import (
    TokenValues,
    VariantState,
    output_statistics,
    smoothed_again,
)
from saelens_certify.per_token import PerToken
from saelens_certify.pool import Calibration
from saelens_certify.positions import coded_positions
from saelens_certify.runs import (
    Columns,
    Run,
    RunKey,
    concatenate,
    encoded_together,
    run_key,
)
from saelens_certify.saes import Coding
from saelens_certify.states import (
    States,
    base_pass,
    batch_states,
    batches,
    by_width,
    encoded_alike,
    most_variants,
)
from saelens_certify.subject import Reader, Subject


def calibrate(
    engine: ForwardEngine,
    readers: Mapping[str, Reader],
    tokens: Int[Tensor, "n_sequences pos"],
    config: CertifyConfig,
    special_ids: tuple[int, ...] = (),
) -> dict[str, Calibration]:
    """Count feature activations on calibration sequences.

    The model runs only as far as the deepest hook; readers of one SAE and coding rule share its codes.

    Args:
        engine: The model.
        readers: Who counts, by name; they share each forward pass.
        tokens: Sequences of L tokens.
        config: Settings of the pass (batches, operators).
        special_ids: Ids of special tokens (for ``positions="no_bos"``).

    Returns:
        The calibration of each reader; calibrations of disjoint sets of sequences add up.
    """
    hooks = sorted(
        {h for r in readers.values() for h in (r.adapter.input_hook, r.adapter.output_hook)}
    )
    total = {
        name: Calibration.empty(r.adapter.d_sae, engine.d_vocab, r.adapter.d_out)
        for name, r in readers.items()
    }
    start = 0
    for batch in batches(engine, tokens, config):
        activations = engine.capture(batch, hooks)
        for group in encoded_alike(readers):
            one = next(iter(group.values()))
            adapter, coding = one.adapter, Coding.parse(one.config.coding)
            coded = coded_positions(batch, one.config.positions, special_ids).to(adapter.device)
            x = by_width(activations[adapter.input_hook], adapter.d_in, adapter.device)
            y = by_width(activations[adapter.output_hook], adapter.d_out, adapter.device)
            counted = {
                name: _counted(reader, coded, slice(start, start + len(batch)))
                for name, reader in group.items()
            }
            counts = {
                name: torch.zeros(adapter.d_sae, dtype=torch.int64, device=adapter.device)
                for name in group
            }
            for part in _slices(len(batch), encoded_together(x)):
                codes = adapter.encode(x[part], coding, coded=coded[part], impl=config.impl)
                for name, mine in counted.items():
                    keep = mine[part][coded[part]]
                    features = codes.features if bool(keep.all()) else codes.features.select(keep)
                    ops.pool_count_(counts[name], features, impl=config.impl)
            for name, reader in group.items():
                rows = _rows_of(reader, slice(start, start + len(batch)))
                seen = batch if rows is None else batch[rows]
                targets = torch.bincount(
                    seen[:, 1 : reader.length].flatten(), minlength=engine.d_vocab
                )
                sums, n = _activation_sums(y, counted[name])
                total[name] = total[name] + Calibration(
                    counts[name].cpu(), targets, sums.cpu(), n.cpu(), len(seen)
                )
        start += len(batch)
    return total


def measure(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    tokens: Int[Tensor, "n_sequences pos"],
    config: CertifyConfig,
    special_ids: tuple[int, ...] = (),
) -> dict[str, Columns]:
    """Measure every variant of every SAE on evaluation sequences.

    Args:
        engine: The model.
        subjects: SAEs with their settings, pools and variants; they share the base pass of each batch, and
            those that read one SAE by one coding rule share codes and variants.
        tokens: Sequences of L tokens.
        config: Settings of the pass (batches, operators).
        special_ids: Ids of special tokens (for ``positions="no_bos"``).

    Returns:
        For each subject its evidence columns, one float64 (or bool) value per sequence, in the order of
        ``tokens``. Losses and divergences are means over the L - 1 predicted positions, in bits per
        token; squared errors are means over coded positions, per token. With error permutations
        also ``mse_error_permutations`` and ``mse_no_first_error_permutations``: one row per
        sequence, one entry per permutation, equal to the ``mse`` of a variant that decodes with it. With horizons
        also ``kl_h0``, …: divergences read out so many blocks after the patched one.
    """
    parts = [
        _measure_batch(engine, subjects, batch, config, special_ids)
        for batch in batches(engine, tokens, config, most_variants(subjects))
    ]
    return {name: concatenate([part[name] for part in parts]) for name in subjects}


def _measure_batch(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    batch: Int[Tensor, "batch pos"],
    config: CertifyConfig,
    special_ids: tuple[int, ...],
) -> dict[str, Columns]:
    """Measure one batch; its states are gone before the next one's are made."""
    base = base_pass(engine, subjects, batch)
    columns: dict[str, Columns] = {}
    for states in batch_states(engine, subjects, base, config, special_ids):
        columns |= _evidence(engine, base, states, config)
    return columns


def _evidence(
    engine: ForwardEngine, base: BasePass, states: States, config: CertifyConfig
) -> dict[str, Columns]:
    """Compare all predictions with the model's and reduce them to one value per sequence."""
    variants = [
        VariantState(run.rows, states.finals[key], whole_batch=not run.variant.only_violations)
        for key, run in states.runs.items()
    ]
    loss_base, outputs = output_statistics(engine, base, variants, config)
    of_run = dict(zip(states.runs, outputs, strict=True))
    return {
        name: _columns(engine, base, states, name, loss_base, of_run, config)
        for name in states.subjects
    }


def _columns(
    engine: ForwardEngine,
    base: BasePass,
    states: States,
    name: str,
    loss_base: TokenValues,
    outputs: Mapping[RunKey, Mapping[str, TokenValues]],
    config: CertifyConfig,
) -> Columns:
    """Evidence of one subject on a batch."""
    subject, columns = states.subjects[name], dict(states.columns[name])
    targets = base.tokens[:, 1 : subject.length].cpu()
    columns["loss_unigram"] = subject.unigram_bits[targets].mean(dim=1).numpy()

    def reduced(statistic: str, values: TokenValues) -> NDArray[np.float64]:
        if statistic == "loss":
            alphas = config.alpha, subject.config.alpha
            values = smoothed_again(values, engine.d_vocab, *alphas)
        return (
            values[:, : None if subject.length is None else subject.length - 1].mean(dim=1).numpy()
        )

    columns["loss_base"] = reduced("loss", loss_base)
    for variant in subject.variants:
        key = run_key(subject, variant)
        run = states.runs[key]
        per_token = PerToken(states.coded[run.rows], subject.length)
        values = {
            "mse": per_token.mean_placed(run.errors),
            "mse_no_first": per_token.mean_placed(run.errors, first=False),
            **{statistic: reduced(statistic, each) for statistic, each in outputs[key].items()},
        }
        columns |= _named(run, variant.name, values, columns)
    of_sae = states.finals[run_key(subject, subject.variants[0])]
    return columns | horizon_columns(engine, base, subject, of_sae, config)


def _named(run: Run, name: str, values: Columns, so_far: Columns) -> Columns:
    """Name a run's columns; sequences that do not violate the pool have the values of S∘M."""
    named: Columns = {}
    for key, column in values.items():
        if run.variant.only_violations:
            rows = run.rows.cpu().numpy()
            # Of a sequence that is cut, the part that violates the pool may lie beyond.
            here = so_far["violation"][rows]
            full = so_far[_column(key, "sae")].copy()
            full[rows[here]] = column[here]
            column = full
        named[_column(key, name)] = column
    return named


def _column(key: str, variant: str) -> str:
    """Name the column of a variant: S∘M's carry no suffix, but for its loss."""
    return key if variant == "sae" and key != "loss" else f"{key}_{variant}"


def _rows_of(reader: Reader, batch: slice) -> Bool[Tensor, " batch"] | None:
    """Which sequences of a batch a reader counts; None: all."""
    return None if reader.rows is None else reader.rows[batch]


def _counted(
    reader: Reader, coded: Bool[Tensor, "batch pos"], batch: slice
) -> Bool[Tensor, "batch pos"]:
    """Which coded positions of a batch a reader counts."""
    mine = coded.clone()
    if reader.length is not None:
        mine[:, reader.length :] = False
    rows = _rows_of(reader, batch)
    if rows is not None:
        mine &= rows.to(mine.device)[:, None]
    return mine


def _activation_sums(
    y: Float[Tensor, "batch pos d_out"], coded: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "2 d_out"], Int[Tensor, " 2"]]:
    weight = coded.double()
    placed = y.double() * weight[..., None]
    sums = torch.stack([placed[:, 0].sum(dim=0), placed[:, 1:].sum(dim=(0, 1))])
    counts = torch.stack([coded[:, 0].sum(), coded[:, 1:].sum()])
    return sums, counts.to(torch.int64)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]
