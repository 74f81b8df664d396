"""Batches of a pass: the model once, then every variant of every SAE, as states after the last block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.forward import BasePass, FinalState, ForwardEngine
from saelens_certify.horizons import horizon_blocks
from saelens_certify.outputs import Columns
from saelens_certify.positions import coded_positions
from saelens_certify.runs import Run, RunKey, encode_batch, run_key, run_suffixes
from saelens_certify.subject import Reader, Subject, encoding_key

Who = TypeVar("Who", Reader, Subject)


_VARIANTS_AT_ONCE = 20
"""Variants of a full batch whose states are alive at a time."""


def batches(
    engine: ForwardEngine, tokens: Int[Tensor, "n pos"], config: CertifyConfig, n_variants: int = 1
) -> Sequence[Tensor]:
    """Cut sequences into the batches that a model on this device is given at a time.

    Args:
        engine: The model.
        tokens: Sequences of L tokens.
        config: Settings of the pass.
        n_variants: Variants that are run on each sequence. All states of a batch are alive at once, so many
            variants have smaller batches; their passes are as large as ever, being joined.
    """
    per_batch = config.tokens_per_pass(engine.device) // tokens.shape[1]
    if n_variants > _VARIANTS_AT_ONCE:
        per_batch = per_batch * _VARIANTS_AT_ONCE // n_variants
    return torch.split(tokens, max(1, per_batch))


def most_variants(subjects: Mapping[str, Subject]) -> int:
    """Variants of the subjects that share codes, where these are most."""
    return max(
        (
            len({run_key(subject, v) for subject in group.values() for v in subject.variants})
            for group in encoded_alike(subjects)
        ),
        default=0,
    )


@dataclass(frozen=True)
class States:
    """Subjects that share codes, on one batch: what was run for them, and how it ended.

    Attributes:
        subjects: The subjects, by name.
        coded: Positions that the SAE codes.
        columns: What their codes say.
        runs: All variants that were run.
        finals: Their states after the last block.
    """

    subjects: dict[str, Subject]
    coded: Bool[Tensor, "batch pos"]
    columns: dict[str, Columns]
    runs: dict[RunKey, Run]
    finals: dict[RunKey, FinalState]


def base_pass(
    engine: ForwardEngine, subjects: Mapping[str, Subject], batch: Int[Tensor, "batch pos"]
) -> BasePass:
    """Run the model once on a batch and keep what the subjects' variants will need."""
    adapters = [subject.adapter for subject in subjects.values()]
    return engine.base(
        batch,
        {hook for a in adapters for hook in (a.input_hook, a.output_hook)},
        {a.output_hook for a in adapters},
        {
            block
            for subject in subjects.values()
            for block in horizon_blocks(engine, subject).values()
        },
    )


def batch_states(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    base: BasePass,
    config: CertifyConfig,
    special_ids: tuple[int, ...],
) -> Iterator[States]:
    """Run every variant on one batch: for one group of subjects that share codes after another."""
    for group in encoded_alike(subjects):
        one = next(iter(group.values()))
        adapter = one.adapter
        coded = coded_positions(base.tokens, one.config.positions, special_ids).to(adapter.device)
        x = by_width(base.activations[adapter.input_hook], adapter.d_in, adapter.device)
        y = by_width(base.activations[adapter.output_hook], adapter.d_out, adapter.device)
        columns, runs = encode_batch(group, x, y, coded, config)
        blocks = {
            block
            for subject in group.values()
            for block in horizon_blocks(engine, subject).values()
        }
        finals = run_suffixes(
            engine, base, adapter.output_hook, list(runs.values()), config, sorted(blocks)
        )
        yield States(group, coded, columns, runs, dict(zip(runs, finals, strict=True)))


def encoded_alike(who: Mapping[str, Who]) -> list[dict[str, Who]]:
    """Group those that read one SAE by one coding rule at the same positions."""
    groups: dict[Hashable, dict[str, Who]] = {}
    for name, each in who.items():
        groups.setdefault(encoding_key(each), {})[name] = each
    return list(groups.values())


def by_width(
    activation: Float[Tensor, "batch pos ..."], width: int, device: torch.device
) -> Float[Tensor, "batch pos width"]:
    """Take an activation to float32; heads of a 4-dimensional one are joined, as SAELens does."""
    flat = activation.reshape(*activation.shape[:2], width)
    return flat.to(device=device, dtype=torch.float32)
