"""The one engine: tokens once, the model once per batch, each SAE once, each variant one suffix.

`calibrate` sees how often each feature is active; `measure` yields the evidence, sequence by sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.config import CertifyConfig
from saelens_certify.forward import BasePass, FinalState, ForwardEngine
from saelens_certify.outputs import Columns, VariantState, output_statistics
from saelens_certify.per_token import PerToken, rarest
from saelens_certify.pool import Calibration, Pool
from saelens_certify.positions import coded_positions
from saelens_certify.proxies import Variant
from saelens_certify.saes import Codes, Coding, SAEAdapter

# Tokens encoded in one call: enough for an efficient matrix product, few enough for little memory.
_ENCODED_TOKENS = 2048


@dataclass(frozen=True)
class Subject:
    """One SAE under measurement.

    Attributes:
        adapter: The SAE.
        pool: Its concept pool G.
        variants: What is measured; the first must be `all_features`.
        mean_activations: Calibration means, the baseline of explained variance (rows: all
            positions, without position 0).
        unigram_bits: Loss of each target under the calibration unigram model, float64.
        counts: On how many calibration tokens each feature was active; with them the evidence says how
            rare the rarest feature of each sequence is.
        error_permutations: Renamings of the features whose squared errors are measured, without
            running the model on them; int32 or int64.
    """

    adapter: SAEAdapter
    pool: Pool
    variants: tuple[Variant, ...]
    mean_activations: Float[Tensor, "2 d_out"]
    unigram_bits: Float[Tensor, " d_vocab"]
    counts: Int[Tensor, " d_sae"] | None = None
    error_permutations: Int[Tensor, "n_permutations d_sae"] | None = None


def calibrate(
    engine: ForwardEngine,
    adapters: Mapping[str, SAEAdapter],
    tokens: Int[Tensor, "n_sequences pos"],
    config: CertifyConfig,
    special_ids: tuple[int, ...] = (),
) -> dict[str, Calibration]:
    """Count feature activations on calibration sequences.

    The model runs only as far as the deepest hook.

    Args:
        engine: The model.
        adapters: SAEs by name; they share each forward pass.
        tokens: Sequences of L tokens.
        config: Settings.
        special_ids: Ids of special tokens (for ``positions="no_bos"``).

    Returns:
        The calibration of each SAE; calibrations of disjoint sets of sequences add up.
    """
    hooks = sorted({h for a in adapters.values() for h in (a.input_hook, a.output_hook)})
    coding = Coding.parse(config.coding)
    total = {
        name: Calibration.empty(a.d_sae, engine.d_vocab, a.d_out) for name, a in adapters.items()
    }
    for batch in _batches(engine, tokens, config):
        activations = engine.capture(batch, hooks)
        coded = coded_positions(batch, config.positions, special_ids)
        targets = torch.bincount(batch[:, 1:].flatten(), minlength=engine.d_vocab)
        for name, adapter in adapters.items():
            x = _by_width(activations[adapter.input_hook], adapter.d_in, adapter.device)
            y = _by_width(activations[adapter.output_hook], adapter.d_out, adapter.device)
            here = coded.to(adapter.device)
            counts = torch.zeros(adapter.d_sae, dtype=torch.int64, device=adapter.device)
            group = _encoded_together(x)
            for part, positions in zip(x.split(group), here.split(group), strict=True):
                codes = adapter.encode(part, coding, coded=positions, impl=config.impl)
                ops.pool_count_(counts, codes.features, impl=config.impl)
            sums, n = _activation_sums(y, here)
            total[name] = total[name] + Calibration(
                counts.cpu(), targets, sums.cpu(), n.cpu(), len(batch)
            )
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
        subjects: SAEs with their pools and variants; they share the base pass of each batch.
        tokens: Sequences of L tokens.
        config: Settings.
        special_ids: Ids of special tokens (for ``positions="no_bos"``).

    Returns:
        For each SAE its evidence columns, one float64 (or bool) value per sequence, in the order of
        ``tokens``. Losses and divergences are means over the L - 1 predicted positions, in bits per
        token; squared errors are means over coded positions, per token. With error permutations
        also ``mse_error_permutations`` and ``mse_no_first_error_permutations``: one row per
        sequence, one entry per permutation, equal to the ``mse`` of a variant that decodes with it.
    """
    hooks = sorted(
        {h for s in subjects.values() for h in (s.adapter.input_hook, s.adapter.output_hook)}
    )
    restarts = sorted({s.adapter.output_hook for s in subjects.values()})
    collected: dict[str, list[Columns]] = {name: [] for name in subjects}
    for batch in _batches(engine, tokens, config):
        base = engine.base(batch, hooks, restarts)
        coded = coded_positions(batch, config.positions, special_ids)
        for name, subject in subjects.items():
            collected[name].append(_measure_batch(engine, subject, base, coded, config))
    return {name: _concatenate(parts) for name, parts in collected.items()}


def _measure_batch(
    engine: ForwardEngine,
    subject: Subject,
    base: BasePass,
    coded: Bool[Tensor, "batch pos"],
    config: CertifyConfig,
) -> Columns:
    adapter = subject.adapter
    x = _by_width(base.activations[adapter.input_hook], adapter.d_in, adapter.device)
    y = _by_width(base.activations[adapter.output_hook], adapter.d_out, adapter.device)
    columns, runs = _encode_batch(subject, x, y, coded.to(adapter.device), config)
    columns["loss_unigram"] = subject.unigram_bits[base.tokens[:, 1:].cpu()].mean(dim=1).numpy()
    finals = _run_suffixes(engine, base, adapter.output_hook, runs, config)
    variants = [
        VariantState(run.rows, final, whole_batch=not run.variant.only_violations)
        for run, final in zip(runs, finals, strict=True)
    ]
    columns["loss_base"], outputs = output_statistics(engine, base, variants, config)
    for run, output in zip(runs, outputs, strict=True):
        columns |= _named(run, run.errors | output, columns)
    return columns


def _encode_batch(
    subject: Subject,
    x: Float[Tensor, "batch pos d_in"],
    y: Float[Tensor, "batch pos d_out"],
    coded: Bool[Tensor, "batch pos"],
    config: CertifyConfig,
) -> tuple[Columns, list[_Run]]:
    """Encode a batch and decode every variant, a few sequences at a time.

    Codes have as many slots as the busiest token needs: in groups, one such token costs little.
    """
    columns: list[Columns] = []
    runs: list[list[_Run]] = [[] for _ in subject.variants]
    group = _encoded_together(x)
    for start in range(0, len(x), group):
        part = slice(start, start + group)
        found, decoded = _encode_group(subject, x[part], y[part], coded[part], config)
        columns.append(found)
        for run, of_variant in zip(decoded, runs, strict=True):
            of_variant.append(dataclasses.replace(run, rows=run.rows + start))
    return _concatenate(columns), [_join(parts) for parts in runs]


def _encode_group(
    subject: Subject,
    x: Float[Tensor, "batch pos d_in"],
    y: Float[Tensor, "batch pos d_out"],
    coded: Bool[Tensor, "batch pos"],
    config: CertifyConfig,
) -> tuple[Columns, list[_Run]]:
    adapter = subject.adapter
    pool_bits = subject.pool.bits(adapter.device)
    codes = adapter.encode(x, Coding.parse(config.coding), pool_bits, coded=coded, impl=config.impl)
    outside = ops.count_outside(codes.features, pool_bits, impl=config.impl)
    per_token = PerToken(coded)
    violation = (per_token(outside) > 0).any(dim=1)
    columns: Columns = {
        "violation": violation.cpu().numpy(),
        "outside": per_token.mean(outside),
        "l0": per_token.mean(codes.features.counts),
        **rarest(subject.counts, codes.features, coded),
        **_activation_power(y[coded], per_token, subject.mean_activations.to(adapter.device)),
        **_permuted_errors(subject, codes, y[coded], per_token, config),
    }
    runs = [
        _reconstruct(subject, variant, codes, violation, per_token, y, config)
        for variant in subject.variants
    ]
    return columns, runs


@dataclass(frozen=True)
class _Run:
    """One variant on one batch, before its suffix.

    Attributes:
        variant: The variant.
        rows: Sequences of the batch that are run, ascending.
        patch: Activation to put at the output hook of these sequences.
        errors: Squared-error columns of these sequences.
    """

    variant: Variant
    rows: Int[Tensor, " rows"]
    patch: Float[Tensor, "rows pos d_out"]
    errors: Columns


def _reconstruct(
    subject: Subject,
    variant: Variant,
    codes: Codes,
    violation: Bool[Tensor, " batch"],
    per_token: PerToken,
    y: Float[Tensor, "batch pos d_out"],
    config: CertifyConfig,
) -> _Run:
    """Decode a variant on the sequences of a batch on which it must be run."""
    coded = per_token.coded
    features, token_map = variant.rewrite(codes), codes.token_map
    chosen = violation if variant.only_violations else torch.ones_like(violation)
    if not bool(chosen.all()):
        keep = chosen[:, None].expand_as(coded)[coded]
        features = features.select(keep)
        token_map = None if token_map is None else token_map.select(keep)
    x_hat = subject.adapter.decode(features, token_map, variant.decoder, impl=config.impl)
    rows = chosen.nonzero().flatten()
    patch = y[rows]  # a copy: rows are indices
    scatter = PerToken(coded[rows])
    error = (patch[scatter.coded].double() - x_hat.double()).square().sum(dim=-1)
    patch[scatter.coded] = x_hat
    errors = {"mse": scatter.mean(error), "mse_no_first": scatter.mean(error, first=False)}
    return _Run(variant, rows, patch, errors)


def _permuted_errors(
    subject: Subject,
    codes: Codes,
    y: Float[Tensor, "coded d_out"],
    per_token: PerToken,
    config: CertifyConfig,
) -> Columns:
    """Squared errors under each error permutation, from the same codes."""
    if subject.error_permutations is None:
        return {}
    errors = subject.adapter.permuted_errors(
        codes.features, codes.token_map, subject.error_permutations, y, impl=config.impl
    )
    columns = {
        f"{name}_error_permutations": [per_token.mean(error, first=first) for error in errors]
        for name, first in (("mse", True), ("mse_no_first", False))
    }
    rows = len(per_token.coded)
    return {
        name: np.stack(each, axis=1) if each else np.empty((rows, 0))
        for name, each in columns.items()
    }


def _join(parts: Sequence[_Run]) -> _Run:
    """Join the runs of one variant on consecutive groups of a batch."""
    return _Run(
        variant=parts[0].variant,
        rows=torch.cat([part.rows for part in parts]),
        patch=torch.cat([part.patch for part in parts]),
        errors=_concatenate([part.errors for part in parts]),
    )


def _run_suffixes(
    engine: ForwardEngine,
    base: BasePass,
    hook: str,
    runs: Sequence[_Run],
    config: CertifyConfig,
) -> list[FinalState]:
    """Run the suffixes of all variants, concatenated into passes of limited size."""
    rows = torch.cat([run.rows for run in runs]).to(engine.device)
    patches = torch.cat([run.patch for run in runs]).to(engine.device)
    per_pass = max(1, config.tokens_per_pass(engine.device) // base.tokens.shape[1])
    residual = torch.cat(
        [
            engine.patched(base, rows[i : i + per_pass], hook, patches[i : i + per_pass]).residual
            for i in range(0, len(rows), per_pass)
        ]
    )
    states, start = [], 0
    for run in runs:
        part = slice(start, start + len(run.rows))
        states.append(FinalState(base.tokens[rows[part]], residual[part], (hook, patches[part])))
        start = part.stop
    return states


def _named(run: _Run, values: Columns, so_far: Columns) -> Columns:
    """Name a run's columns; sequences that were not run have the values of S∘M."""
    named: Columns = {}
    for key, column in values.items():
        if run.variant.only_violations:
            full = so_far[_column(key, "sae")].copy()
            full[run.rows.cpu().numpy()] = column
            column = full
        named[_column(key, run.variant.name)] = column
    return named


def _column(key: str, variant: str) -> str:
    """Name the column of a variant: S∘M's carry no suffix, but for its loss."""
    return key if variant == "sae" and key != "loss" else f"{key}_{variant}"


def _activation_power(
    y: Float[Tensor, "coded d_out"], per_token: PerToken, means: Float[Tensor, "2 d_out"]
) -> Columns:
    """Squared distance of the activation from the calibration mean, with and without position 0."""
    wide = y.double()
    all_positions = (wide - means[0]).square().sum(dim=-1)
    later = (wide - means[1]).square().sum(dim=-1)
    return {
        "variance": per_token.mean(all_positions),
        "variance_no_first": per_token.mean(later, first=False),
    }


def _activation_sums(
    y: Float[Tensor, "batch pos d_out"], coded: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "2 d_out"], Int[Tensor, " 2"]]:
    weight = coded.double()
    placed = y.double() * weight[..., None]
    sums = torch.stack([placed[:, 0].sum(dim=0), placed[:, 1:].sum(dim=(0, 1))])
    counts = torch.stack([coded[:, 0].sum(), coded[:, 1:].sum()])
    return sums, counts.to(torch.int64)


def _by_width(
    activation: Float[Tensor, "batch pos ..."], width: int, device: torch.device
) -> Float[Tensor, "batch pos width"]:
    """Take an activation to float32; heads of a 4-dimensional one are joined, as SAELens does."""
    flat = activation.reshape(*activation.shape[:2], width)
    return flat.to(device=device, dtype=torch.float32)


def _encoded_together(x: Float[Tensor, "batch pos d_in"]) -> int:
    """Number of sequences that are encoded in one call."""
    return max(1, _ENCODED_TOKENS // x.shape[1])


def _batches(
    engine: ForwardEngine, tokens: Int[Tensor, "n pos"], config: CertifyConfig
) -> Sequence[Tensor]:
    return torch.split(tokens, max(1, config.tokens_per_pass(engine.device) // tokens.shape[1]))


def _concatenate(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
