"""Gather decoding: the reconstruction from the active features only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops import reference
from saelens_certify.ops._checks import (
    REAL_DTYPES,
    check_codes,
    check_counts,
    check_device,
    check_dtype,
    check_shape,
    check_vector,
)
from saelens_certify.ops._library import Impl, use_native
from saelens_certify.ops.codes import SparseCodes


@torch.no_grad()
def decode(
    codes: SparseCodes,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float32[Tensor, " d_out"] | None = None,
    target: Float32[Tensor, "tokens d_out"] | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Float32[Tensor, "tokens d_out"], Float64[Tensor, "tokens 5"] | None]:
    """Reconstruct every token from its active features.

    Each output element is a chain of float32 fused multiply-adds in slot order, starting from
    zero, with the bias added last: the same bits on every machine.

    Args:
        codes: Active features.
        W_dec: Decoder weights, one row per feature; float32, bfloat16 or float16.
        b_dec: Decoder bias.
        target: What the reconstruction x_hat should equal; asks for error statistics.
        impl: "auto", "native" or "torch".

    Returns:
        The reconstruction, and with a target x the float64 sums over d_out, per token:
        ``|x - x_hat|^2, |x|^2, |x_hat|^2, x . x_hat, sum of x``.

    Raises:
        CertifyError: Shapes, types or devices do not fit, or a feature does not exist.
    """
    arguments = _checked(codes, W_dec, b_dec)
    if target is not None:
        target = _checked_target(target, codes, W_dec)
    if not use_native(impl, codes.device):
        return reference.decode(*arguments, target)
    if target is None:
        return torch.ops.saelens_certify.decode(*arguments), None
    return torch.ops.saelens_certify.decode_stats(*arguments, target)


@torch.no_grad()
def decode_permuted(
    codes: SparseCodes,
    W_dec: Float[Tensor, "d_sae d_out"],
    permutations: Int[Tensor, "n_permutations d_sae"],
    b_dec: Float32[Tensor, " d_out"] | None = None,
    *,
    impl: Impl = "auto",
) -> Float32[Tensor, "n_permutations tokens d_out"]:
    """Reconstruct every token under several renamings of the features.

    Args:
        codes: Active features.
        W_dec: Decoder weights, one row per feature; float32, bfloat16 or float16.
        permutations: Under renaming r, feature ``j`` is decoded as feature ``permutations[r, j]``.
        b_dec: Decoder bias.
        impl: "auto", "native" or "torch".

    Returns:
        For each renaming the bits of ``decode(codes.map_indices(permutations[r]), W_dec, b_dec)``.

    Raises:
        CertifyError: Shapes, types or devices do not fit, or a feature does not exist.
    """
    arguments = _checked(codes, W_dec, b_dec)
    permutations = _checked_permutations(permutations, codes, W_dec)
    if not use_native(impl, codes.device):
        return reference.decode_permuted(*arguments, permutations)
    return torch.ops.saelens_certify.decode_permuted(*arguments, permutations)


@torch.no_grad()
def decode_permuted_stats(
    codes: SparseCodes,
    W_dec: Float[Tensor, "d_sae d_out"],
    permutations: Int[Tensor, "n_permutations d_sae"],
    target: Float32[Tensor, "tokens d_out"],
    b_dec: Float32[Tensor, " d_out"] | None = None,
    *,
    impl: Impl = "auto",
) -> Float64[Tensor, "n_permutations tokens 5"]:
    """Return the error statistics of `decode` under several renamings, never the reconstructions.

    Args:
        codes: Active features.
        W_dec: Decoder weights, one row per feature; float32, bfloat16 or float16.
        permutations: Under renaming r, feature ``j`` is decoded as feature ``permutations[r, j]``.
        target: What each reconstruction should equal.
        b_dec: Decoder bias.
        impl: "auto", "native" or "torch".

    Returns:
        For each renaming the statistics that `decode` gives, to the bit.

    Raises:
        CertifyError: Shapes, types or devices do not fit, or a feature does not exist.
    """
    arguments = _checked(codes, W_dec, b_dec)
    permutations = _checked_permutations(permutations, codes, W_dec)
    target = _checked_target(target, codes, W_dec)
    if not use_native(impl, codes.device):
        return reference.decode_permuted_stats(*arguments, permutations, target)
    return torch.ops.saelens_certify.decode_permuted_stats(*arguments, permutations, target)


def _checked(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    check_shape("W_dec", W_dec, (None, None))
    check_dtype("W_dec", W_dec, REAL_DTYPES)
    check_device("W_dec", W_dec, codes.device)
    check_codes(codes, W_dec.shape[0])
    check_counts(codes)
    check_vector("b_dec", b_dec, W_dec.shape[1], codes.device, torch.float32)
    return (
        codes.values.contiguous(),
        codes.indices.contiguous(),
        codes.counts.contiguous(),
        W_dec.contiguous(),
        None if b_dec is None else b_dec.contiguous(),
    )


def _checked_target(target: Tensor, codes: SparseCodes, W_dec: Tensor) -> Tensor:
    check_shape("target", target, (codes.n_tokens, W_dec.shape[1]))
    check_dtype("target", target, (torch.float32,))
    check_device("target", target, codes.device)
    return target.contiguous()


def _checked_permutations(permutations: Tensor, codes: SparseCodes, W_dec: Tensor) -> Tensor:
    check_shape("permutations", permutations, (None, W_dec.shape[0]))
    check_dtype("permutations", permutations, (torch.int32, torch.int64))
    check_device("permutations", permutations, codes.device)
    if permutations.numel():
        low, high = (int(end) for end in torch.aminmax(permutations))
        if low < 0 or high >= W_dec.shape[0]:
            raise CertifyError(
                f"permutations name feature {low if low < 0 else high}, but the features are "
                f"0 to {W_dec.shape[0] - 1}"
            )
    return permutations.to(torch.int32).contiguous()
