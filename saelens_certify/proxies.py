"""Proxy variants: what is put in place of the activation.

Every experiment is a list of these over one measurement. A variant says which codes are decoded,
and with which decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.ops import SparseCodes
from saelens_certify.saes import Codes, SAEAdapter

# Streams of the run's seed, so that adding one kind of control does not change another.
_PERMUTATION_STREAM = 1
_DECODER_STREAM = 2


@dataclass(frozen=True)
class Variant:
    """One proxy.

    Attributes:
        name: Suffix of its evidence columns.
        rewrite: Turns the codes of a batch into the codes that are decoded.
        decoder: Decoder rows to use in place of the SAE's own.
        only_violations: Whether it differs from S∘M only on sequences that violate the pool; on the
            others it is S∘M, exactly, and is not run.
    """

    name: str
    rewrite: Callable[[Codes], SparseCodes]
    decoder: Float[Tensor, "d_sae d_out"] | None = None
    only_violations: bool = False


def all_features() -> Variant:
    """S∘M: the SAE's reconstruction from all its features."""
    return Variant("sae", lambda codes: codes.features)


def pool_restricted() -> Variant:
    """h_G: features outside the pool are masked before the coding rule."""
    return Variant("pool", _pooled, only_violations=True)


def permuted(d_sae: int, seed: int, index: int = 0) -> Variant:
    """A feature shuffle: each active feature is decoded in the direction of another.

    One fixed permutation of the whole dictionary; support sizes and activation values stay.

    Args:
        d_sae: Number of features.
        seed: Seed of the run.
        index: Which of several permutations.
    """
    permutation = feature_permutation(d_sae, seed, index)
    return Variant(f"permuted_{index}", lambda codes: codes.features.map_indices(permutation))


def random_decoder(
    adapter: SAEAdapter, seed: int, norm: Literal["unit", "matched"] = "matched"
) -> Variant:
    """Decode with random directions.

    Args:
        adapter: The SAE whose decoder is replaced.
        seed: Seed of the run.
        norm: ``"matched"``: each row has the norm of the row it replaces; ``"unit"``: norm 1.

    Raises:
        CertifyError: If norms are to be matched and the SAE has no decoder rows.
    """
    if adapter.decoder is None:
        raise CertifyError(
            f"architecture {adapter.architecture!r} has no W_dec of shape [d_sae, d_out] = "
            f"[{adapter.d_sae}, {adapter.d_out}] that a random decoder could take the place of; set "
            "random_decoder=False"
        )
    generator = torch.Generator().manual_seed(_stream_seed(seed, _DECODER_STREAM, 0))
    rows = torch.randn(adapter.d_sae, adapter.d_out, generator=generator)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    rows = rows.to(adapter.device)
    if norm == "matched":
        rows = rows * adapter.decoder.float().norm(dim=-1, keepdim=True)
    return Variant("random_decoder", lambda codes: codes.features, decoder=rows)


def variants_of(adapter: SAEAdapter, config: CertifyConfig) -> tuple[Variant, ...]:
    """Return the variants that a certificate measures: S∘M, h_G and the controls asked for."""
    variants = [all_features(), pool_restricted()]
    variants += [permuted(adapter.d_sae, config.seed, r) for r in range(config.permutations)]
    if config.random_decoder:
        variants.append(random_decoder(adapter, config.seed))
    return tuple(variants)


def feature_permutation(d_sae: int, seed: int, index: int) -> Int[Tensor, " d_sae"]:
    """Return permutation ``index`` of a run as int32."""
    generator = torch.Generator().manual_seed(_stream_seed(seed, _PERMUTATION_STREAM, index))
    return torch.randperm(d_sae, generator=generator).to(torch.int32)


def _pooled(codes: Codes) -> SparseCodes:
    if codes.pooled is None:
        raise ValueError("the batch was encoded without a pool")
    return codes.pooled


def _stream_seed(seed: int, stream: int, index: int) -> int:
    # Distinct for every (stream, index) of one seed; torch seeds are 64 bit.
    return (seed * 1_000_003 + stream * 10_007 * 4096 + index) % 2**63
