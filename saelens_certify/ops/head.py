"""Statistics of a linear head's predictions, without the logits.

The logits are ``residual @ W_U + b_U``; tiles of them exist for a moment, never tokens x vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops import reference
from saelens_certify.ops._checks import REAL_DTYPES, check_device, check_dtype, check_shape
from saelens_certify.ops._library import Impl, use_native
from saelens_certify.ops.margin import float32_accumulation
from saelens_certify.ops.statistics import (
    PairStats,
    TokenStats,
    check_prediction,
    check_predictions,
)


@torch.no_grad()
def head_stats(
    residual: Float[Tensor, "tokens d_model"],
    W_U: Float[Tensor, "d_model d_vocab_out"],
    targets: Int64[Tensor, " tokens"],
    alpha: float,
    *,
    b_U: Float[Tensor, " d_vocab_out"] | None = None,
    softcap: float | None = None,
    d_vocab: int | None = None,
    impl: Impl = "auto",
    column_tile: int | None = None,
) -> TokenStats:
    """Return the `token_stats` of ``residual @ W_U + b_U``.

    Args:
        residual: What the head is applied to, one row per token; float32, bfloat16 or float16.
        W_U: Weights of the head, same type, any strides (a tied head is a transposed embedding).
        targets: The gold token of every row.
        alpha: Smoothing, 0 <= alpha < 1.
        b_U: Bias of the head.
        softcap: Replace logits by ``softcap * tanh(logits / softcap)``. None or 0: leave them.
        d_vocab: True vocabulary size where the head is padded; columns beyond are ignored.
        impl: "auto", "native" or "torch".
        column_tile: Columns per tile; changes results by no more than their tolerance.

    Returns:
        Statistics within 1e-4 bits per token of their float64 values, 1e-6 bits in the mean. Products
        are float32 whatever the inputs; torch's own settings for those (TF32, bfloat16) apply.

    Raises:
        CertifyError: Shapes, types or devices do not fit, a target lies outside the vocabulary,
            or the logits of a row are no distribution.
    """
    head = _checked("residual", residual, W_U, b_U, targets, alpha, softcap, d_vocab, column_tile)
    operator = reference.head_stats
    if use_native(impl, residual.device):
        operator = torch.ops.saelens_certify.head_stats
    with float32_accumulation(residual.dtype):
        stats = TokenStats(*operator(residual.contiguous(), *head))
    check_predictions("logits", stats.lse)
    return stats


@torch.no_grad()
def head_pair_stats(
    base_residual: Float[Tensor, "tokens d_model"],
    residual: Float[Tensor, "rows d_model"],
    W_U: Float[Tensor, "d_model d_vocab_out"],
    targets: Int64[Tensor, " tokens"],
    alpha: float,
    *,
    b_U: Float[Tensor, " d_vocab_out"] | None = None,
    softcap: float | None = None,
    d_vocab: int | None = None,
    impl: Impl = "auto",
    column_tile: int | None = None,
) -> PairStats:
    """Return the `pair_stats` of the logits of two residuals.

    Several predictions of the same tokens, one after another in ``residual``, are compared with one
    base whose logits are computed once.

    Args:
        base_residual: What the head is applied to in the base model.
        residual: The same in the other model, same type; or in several, ``n * tokens`` rows.
        W_U: Weights of the head, same type, any strides.
        targets: The gold token of every row of the base.
        alpha: Smoothing, 0 <= alpha < 1.
        b_U: Bias of the head.
        softcap: Replace logits by ``softcap * tanh(logits / softcap)``. None or 0: leave them.
        d_vocab: True vocabulary size where the head is padded; columns beyond are ignored.
        impl: "auto", "native" or "torch".
        column_tile: Columns per tile; changes results by no more than their tolerance.

    Returns:
        Losses as in `head_stats`, one entry per row of ``residual``.

    Raises:
        CertifyError: As for `head_stats`.
    """
    tokens = base_residual.shape[0]
    check_shape("residual", residual, (None, *base_residual.shape[1:]))
    if residual.shape[0] % tokens if tokens else residual.shape[0]:
        raise CertifyError(
            f"residual has {residual.shape[0]} rows, expected a multiple of the {tokens} of "
            "base_residual: each prediction has one row per token"
        )
    check_dtype("residual", residual, (base_residual.dtype,))
    check_device("residual", residual, base_residual.device)
    head = _checked(
        "base_residual", base_residual, W_U, b_U, targets, alpha, softcap, d_vocab, column_tile
    )
    operator = reference.head_pair_stats
    if use_native(impl, residual.device):
        operator = torch.ops.saelens_certify.head_pair_stats
    with float32_accumulation(residual.dtype):
        stats = PairStats(*operator(base_residual.contiguous(), residual.contiguous(), *head))
    check_predictions("base logits", stats.bits_base)
    check_predictions("logits", stats.bits)
    return stats


def _checked(
    name: str,
    residual: Tensor,
    W_U: Tensor,
    b_U: Tensor | None,
    targets: Tensor,
    alpha: float,
    softcap: float | None,
    d_vocab: int | None,
    column_tile: int | None,
) -> tuple[Tensor, Tensor | None, Tensor, float, float, int, int]:
    check_shape(name, residual, (None, None))
    check_dtype(name, residual, REAL_DTYPES)
    check_shape("W_U", W_U, (residual.shape[1], None))
    check_dtype("W_U", W_U, (residual.dtype,))
    check_device("W_U", W_U, residual.device)
    if b_U is not None:
        check_shape("b_U", b_U, (W_U.shape[1],))
        check_dtype("b_U", b_U, REAL_DTYPES)
        check_device("b_U", b_U, residual.device)
        b_U = b_U.float().contiguous()
    if column_tile is not None and column_tile < 1:
        raise CertifyError(f"column_tile = {column_tile} must be at least 1 (None: default)")
    cap, size = check_prediction("W_U", residual, W_U.shape[1], targets, alpha, softcap, d_vocab)
    return W_U, b_U, targets.contiguous(), alpha, cap, size, column_tile or 0
