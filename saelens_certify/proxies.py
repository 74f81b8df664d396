"""Proxy variants: what is put in place of the activation.

Every experiment is a list of these over one measurement. A variant says which codes are decoded,
and with which decoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.frequency import frequency_groups, permutation_within
from saelens_certify.ops import SparseCodes
from saelens_certify.saes import Codes, SAEAdapter

# Streams of the run's seed, so that adding one kind of control does not change another.
_PERMUTATION_STREAM = 1
_DECODER_STREAM = 2
_MATCHED_STREAM = 3

# Random decoders of a run that take more bytes than this are drawn anew for every batch.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Variant:
    """One proxy.

    Attributes:
        name: Suffix of its evidence columns.
        rewrite: Turns the codes of a batch into the codes that are decoded.
        key: Tells two variants of one SAE and coding rule apart; equal ones are run once.
        make_decoder: Returns decoder rows to use in place of the SAE's own; always the same.
        only_violations: Whether it differs from S∘M only on sequences that violate the pool; on the
            others it is S∘M, exactly, and is not run.
        keeps_support: Whether each token must have as many features as in S∘M; checked on every batch.
    """

    name: str
    rewrite: Callable[[Codes], SparseCodes]
    key: Hashable
    make_decoder: Callable[[], Float[Tensor, "d_sae d_out"]] | None = None
    only_violations: bool = False
    keeps_support: bool = False

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"] | None:
        """Decoder rows to use in place of the SAE's own; None for its own."""
        return None if self.make_decoder is None else self.make_decoder()


def all_features() -> Variant:
    """S∘M: the SAE's reconstruction from all its features."""
    return Variant("sae", lambda codes: codes.features, key="sae")


def pool_restricted() -> Variant:
    """h_G: features outside the pool are masked before the coding rule."""
    return Variant("pool", _pooled, key="pool", only_violations=True)


def permuted(d_sae: int, seed: int, index: int = 0) -> Variant:
    """A feature shuffle: each active feature is decoded in the direction of another.

    One fixed permutation of the whole dictionary; support sizes and activation values stay.

    Args:
        d_sae: Number of features.
        seed: Seed of the run.
        index: Which of several permutations.
    """
    permutation = feature_permutation(d_sae, seed, index)
    return _renamed(f"permuted_{index}", permutation, ("permuted", seed, index))


def matched(counts: Int[Tensor, " d_sae"], seed: int, index: int = 0) -> Variant:
    """A feature shuffle among features of like frequency.

    As `permuted`, but each feature is decoded in the direction of one in its own decile of calibration
    frequency (`frequency_groups`): what frequency alone explains, this leaves.

    Args:
        counts: Number of calibration tokens on which each feature is active.
        seed: Seed of the run.
        index: Which of several permutations.
    """
    permutation = matched_permutation(counts, seed, index)
    return _renamed(f"matched_{index}", permutation, permutation.numpy().tobytes())


def random_decoder(
    adapter: SAEAdapter,
    seed: int,
    index: int = 0,
    norm: Literal["unit", "matched"] = "matched",
    keep: bool = True,
) -> Variant:
    """Decode with random directions.

    Args:
        adapter: The SAE whose decoder is replaced.
        seed: Seed of the run.
        index: Which of several decoders.
        norm: ``"matched"``: each row has the norm of the row it replaces; ``"unit"``: norm 1.
        keep: Whether to keep the rows in memory rather than draw them each time they are used.

    Raises:
        CertifyError: If the SAE has no decoder rows.
    """
    own = _rows(adapter)

    def draw() -> Float[Tensor, "d_sae d_out"]:
        generator = torch.Generator().manual_seed(_stream_seed(seed, _DECODER_STREAM, index))
        shape = adapter.d_sae, adapter.d_out
        rows = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        rows = rows / rows.norm(dim=-1, keepdim=True)
        rows = rows.to(adapter.device)
        return rows * own.float().norm(dim=-1, keepdim=True) if norm == "matched" else rows

    kept = draw() if keep else None
    kind = "random_decoder" if norm == "matched" else "random_unit_decoder"
    return Variant(
        f"{kind}_{index}",
        lambda codes: codes.features,
        key=(kind, seed, index),
        make_decoder=draw if kept is None else lambda: kept,
    )


def variants_of(
    adapter: SAEAdapter, config: CertifyConfig, counts: Int[Tensor, " d_sae"] | None = None
) -> tuple[Variant, ...]:
    """Return the variants that a certificate measures: S∘M, h_G and the controls asked for.

    Args:
        adapter: The SAE.
        config: Settings.
        counts: `Calibration.counts`; needed for matched permutations.

    Raises:
        CertifyError: If there is nothing that a control asked for could be made of.
    """
    variants = [all_features(), pool_restricted()]
    variants += [permuted(adapter.d_sae, config.seed, r) for r in range(config.permutations)]
    if config.matched_permutations and counts is None:
        raise CertifyError(
            f"matched_permutations = {config.matched_permutations} needs the frequencies of the features: "
            "pass counts=, those of the calibration"
        )
    if counts is not None:
        variants += [matched(counts, config.seed, r) for r in range(config.matched_permutations)]
    numbers = {"matched": config.random_decoders, "unit": config.random_unit_decoders}
    keep = 4 * adapter.d_sae * adapter.d_out * sum(numbers.values()) <= _KEPT_BYTES
    for norm in ("matched", "unit"):
        variants += [
            random_decoder(adapter, config.seed, r, norm, keep) for r in range(numbers[norm])
        ]
    return tuple(variants)


def error_permutations(
    adapter: SAEAdapter, config: CertifyConfig
) -> Int[Tensor, "n_permutations d_sae"] | None:
    """Return the permutations of which only squared errors are measured; None without any."""
    if not config.error_permutations:
        return None
    numbers = range(config.error_permutations)
    return torch.stack([feature_permutation(adapter.d_sae, config.seed, r) for r in numbers])


def check_controls(adapter: SAEAdapter, config: CertifyConfig) -> None:
    """Check that the controls asked for can be made of this SAE; warn if no test can use them.

    Raises:
        CertifyError: If random decoders or errors of permutations are wanted and the SAE has no decoder
            rows.
    """
    of_rows = config.random_decoders + config.random_unit_decoders
    controls = config.permutations + config.matched_permutations + of_rows
    if controls and config.until is not None:
        warnings.warn(
            f"{controls} controls are measured, but a run with until={config.until!r} has no shuffle test: "
            "the SAE's own losses decide how many sequences there are, so its copies are not exchangeable",
            stacklevel=3,
        )
    if of_rows or config.error_permutations:
        _rows(adapter)


def feature_permutation(d_sae: int, seed: int, index: int) -> Int[Tensor, " d_sae"]:
    """Return permutation ``index`` of a run as int32."""
    generator = torch.Generator().manual_seed(_stream_seed(seed, _PERMUTATION_STREAM, index))
    return torch.randperm(d_sae, generator=generator, device="cpu").to(torch.int32)


def matched_permutation(
    counts: Int[Tensor, " d_sae"], seed: int, index: int
) -> Int[Tensor, " d_sae"]:
    """Return frequency-matched permutation ``index`` of a run as int32."""
    generator = torch.Generator().manual_seed(_stream_seed(seed, _MATCHED_STREAM, index))
    return permutation_within(frequency_groups(counts), generator).to(torch.int32)


def _rows(adapter: SAEAdapter) -> Float[Tensor, "d_sae d_out"]:
    if adapter.decoder is None:
        raise CertifyError(
            f"architecture {adapter.architecture!r} has no W_dec of shape [d_sae, d_out] = "
            f"[{adapter.d_sae}, {adapter.d_out}] that a random decoder could take the place of, or that errors "
            "of permutations could be computed from; set random_decoders=0, random_unit_decoders=0 and "
            "error_permutations=0"
        )
    return adapter.decoder


def _renamed(name: str, permutation: Int[Tensor, " d_sae"], key: Hashable) -> Variant:
    """A variant that decodes each feature as another.

    Raises:
        CertifyError: If two features would get one direction: support sizes would not be preserved.
    """
    everyone = torch.arange(len(permutation), device=permutation.device)
    if not torch.equal(permutation.sort().values.long(), everyone):
        raise CertifyError(f"{name} is no permutation of {len(permutation)} features")
    return Variant(
        name, lambda codes: codes.features.map_indices(permutation), key, keeps_support=True
    )


def _pooled(codes: Codes) -> SparseCodes:
    if codes.pooled is None:
        raise ValueError("the batch was encoded without a pool")
    return codes.pooled


def _stream_seed(seed: int, stream: int, index: int) -> int:
    # Distinct for every (stream, index) of one seed; torch seeds are 64 bit.
    return (seed * 1_000_003 + stream * 10_007 * 4096 + index) % 2**63
