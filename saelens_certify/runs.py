"""One SAE on one batch: encoded once, each proxy variant decoded once, its suffix run once.

Several subjects may read the same SAE by the same coding rule (other pools, smoothings, lengths); what they have in
common is computed once here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.forward import BasePass, FinalState, ForwardEngine
from saelens_certify.outputs import Columns
from saelens_certify.per_token import PerToken, rarest
from saelens_certify.proxies import Variant
from saelens_certify.saes import Codes, Coding
from saelens_certify.subject import Subject

RunKey = tuple[Hashable, Hashable]
"""What a run is known by: its variant, and the pool if it depends on one."""

# Tokens encoded in one call: enough for an efficient matrix product, few enough for little memory.
_ENCODED_TOKENS = 2048


@dataclass(frozen=True)
class Run:
    """One variant on one batch, before its suffix.

    Attributes:
        variant: The variant.
        rows: Sequences of the batch that are run, ascending.
        patch: Activation to put at the output hook of these sequences.
        errors: Squared error of each coded token of these sequences, 0 elsewhere.
    """

    variant: Variant
    rows: Int[Tensor, " rows"]
    patch: Float[Tensor, "rows pos d_out"]
    errors: Float64[Tensor, "rows pos"]


def run_key(subject: Subject, variant: Variant) -> RunKey:
    """Return what tells this run from others of the same SAE and coding rule."""
    return variant.key, subject.pool.key if variant.only_violations else None


def encode_batch(
    subjects: Mapping[str, Subject],
    x: Float[Tensor, "batch pos d_in"],
    y: Float[Tensor, "batch pos d_out"],
    coded: Bool[Tensor, "batch pos"],
    config: CertifyConfig,
) -> tuple[dict[str, Columns], dict[RunKey, Run]]:
    """Encode a batch and decode every variant, a few sequences at a time.

    Codes have as many slots as the busiest token needs: in groups, one such token costs little.

    Args:
        subjects: Subjects of one SAE, coding rule and coded positions, by name.
        x: Activations at the input hook.
        y: Activations at the output hook.
        coded: Positions that the SAE codes.
        config: Settings of the pass.

    Returns:
        For each subject what its codes say, and all runs.
    """
    columns: dict[str, list[Columns]] = {name: [] for name in subjects}
    runs: dict[RunKey, list[Run]] = {}
    group = encoded_together(x)
    for start in range(0, len(x), group):
        part = slice(start, start + group)
        found, decoded = _encode_group(subjects, x[part], y[part], coded[part], config)
        for name, each in found.items():
            columns[name].append(each)
        for key, run in decoded.items():
            moved = Run(run.variant, run.rows + start, run.patch, run.errors)
            runs.setdefault(key, []).append(moved)
    joined = {name: concatenate(parts) for name, parts in columns.items()}
    return joined, {key: _join(parts) for key, parts in runs.items()}


def _encode_group(
    subjects: Mapping[str, Subject],
    x: Float[Tensor, "batch pos d_in"],
    y: Float[Tensor, "batch pos d_out"],
    coded: Bool[Tensor, "batch pos"],
    config: CertifyConfig,
) -> tuple[dict[str, Columns], dict[RunKey, Run]]:
    first = next(iter(subjects.values()))
    adapter, coding = first.adapter, Coding.parse(first.config.coding)
    codes = adapter.encode(
        x, coding, first.pool.bits(adapter.device), coded=coded, impl=config.impl
    )
    activations = y[coded]
    columns: dict[str, Columns] = {}
    runs: dict[RunKey, Run] = {}
    outside: dict[Hashable, Int[Tensor, "batch pos"]] = {}
    for name, subject in subjects.items():
        per_token = PerToken(coded, subject.length)
        pool = subject.pool
        if pool.key not in outside:
            bits = pool.bits(adapter.device)
            outside[pool.key] = per_token(ops.count_outside(codes.features, bits, impl=config.impl))
        columns[name] = {
            "violation": violated(outside[pool.key], subject.length).cpu().numpy(),
            "outside": per_token.mean_placed(outside[pool.key].double()),
            "l0": per_token.mean(codes.features.counts),
            **rarest(subject.counts, codes.features, per_token),
            **_activation_power(
                activations, per_token, subject.mean_activations.to(adapter.device)
            ),
            **_permuted_errors(subject, codes, activations, per_token, config),
        }
        for variant in subject.variants:
            key = run_key(subject, variant)
            if key in runs:
                continue
            rows, of_rows = None, codes
            if variant.only_violations:
                rows = violated(outside[pool.key])
                of_rows = codes.select(_of_rows(rows, coded))
                if pool.key != first.pool.key and bool(rows.any()):
                    # Masked before the coding rule: the next features of this pool may enter.
                    bits = pool.bits(adapter.device)
                    of_rows = adapter.encode(
                        x[rows], coding, bits, coded=coded[rows], impl=config.impl
                    )
            runs[key] = _reconstruct(subject, variant, of_rows, rows, coded, y, config)
    return columns, runs


def violated(
    outside: Int[Tensor, "batch pos"], length: int | None = None
) -> Bool[Tensor, " batch"]:
    """Which sequences have an active feature outside the pool, among their first ``length`` tokens."""
    return (outside[:, :length] > 0).any(dim=1)


def _of_rows(
    rows: Bool[Tensor, " batch"], coded: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, " tokens"]:
    """Which coded tokens belong to these sequences."""
    return rows[:, None].expand_as(coded)[coded]


def _reconstruct(
    subject: Subject,
    variant: Variant,
    codes: Codes,
    chosen: Bool[Tensor, " batch"] | None,
    coded: Bool[Tensor, "batch pos"],
    y: Float[Tensor, "batch pos d_out"],
    config: CertifyConfig,
) -> Run:
    """Decode a variant on the sequences of a batch on which it must be run.

    Args:
        subject: The SAE.
        variant: The variant.
        codes: Codes of the coded tokens of these sequences.
        chosen: The sequences; None: all.
        coded: Positions that the SAE codes.
        y: Activations at the output hook.
        config: Settings of the pass.
    """
    features = variant.rewrite(codes)
    if variant.keeps_support and not torch.equal(features.counts, codes.features.counts):
        raise CertifyError(f"control {variant.name!r} does not preserve the size of the support")
    x_hat = subject.adapter.decode(features, codes.token_map, variant.decoder, impl=config.impl)
    rows = torch.arange(len(y), device=y.device) if chosen is None else chosen.nonzero().flatten()
    patch = y[rows]  # a copy: rows are indices
    placed = PerToken(coded[rows])
    errors = placed((patch[placed.coded].double() - x_hat.double()).square().sum(dim=-1))
    patch[placed.coded] = x_hat
    return Run(variant, rows, patch, errors)


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


def _join(parts: Sequence[Run]) -> Run:
    """Join the runs of one variant on consecutive groups of a batch."""
    return Run(
        variant=parts[0].variant,
        rows=torch.cat([part.rows for part in parts]),
        patch=torch.cat([part.patch for part in parts]),
        errors=torch.cat([part.errors for part in parts]),
    )


def run_suffixes(
    engine: ForwardEngine,
    base: BasePass,
    hook: str,
    runs: Sequence[Run],
    config: CertifyConfig,
    blocks: Iterable[int] = (),
) -> list[FinalState]:
    """Run the suffixes of all variants, concatenated into passes of limited size.

    Args:
        engine: The model.
        base: The base pass of the batch.
        hook: The output hook.
        runs: What is put there.
        config: Settings of the pass.
        blocks: Later blocks whose inputs are wanted.

    Returns:
        The state after the last block, for each run.
    """
    rows = torch.cat([run.rows for run in runs]).to(engine.device)
    patches = torch.cat([run.patch for run in runs]).to(engine.device)
    per_pass = max(1, config.tokens_per_pass(engine.device) // base.tokens.shape[1])
    blocks = tuple(blocks)
    passes = [
        engine.patched(base, rows[i : i + per_pass], hook, patches[i : i + per_pass], blocks)
        for i in range(0, len(rows), per_pass)
    ]
    residual = torch.cat([each.residual for each in passes])
    inputs = {layer: torch.cat([each.block_inputs[layer] for each in passes]) for layer in blocks}
    states, start = [], 0
    for run in runs:
        part = slice(start, start + len(run.rows))
        states.append(
            FinalState(
                base.tokens[rows[part]],
                residual[part],
                (hook, patches[part]),
                {layer: values[part] for layer, values in inputs.items()},
            )
        )
        start = part.stop
    return states


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


def encoded_together(x: Float[Tensor, "batch pos d_in"]) -> int:
    """Number of sequences that are encoded in one call."""
    return max(1, _ENCODED_TOKENS // x.shape[1])


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Join columns of consecutive sequences."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
