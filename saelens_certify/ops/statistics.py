"""Loss statistics of next-token predictions, one read of the logits.

The smoothed loss of a token with gold probability p is
``-log2((1 - alpha) p + alpha / V)`` bits: it lies between ``-log2(1 - alpha + alpha / V)`` and
``log2(V / alpha)``, which is what makes concentration bounds possible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int32, Int64
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops import reference
from saelens_certify.ops._checks import REAL_DTYPES, check_device, check_dtype, check_shape
from saelens_certify.ops._library import Impl, use_native

# Caps for which statistics keep their accuracy; models have 15 to 50.
_SOFTCAPS = (1e-3, 1e6)


@dataclass(frozen=True)
class TokenStats:
    """Statistics of one prediction per token.

    Attributes:
        bits: Smoothed loss, bits.
        lse: Log-sum-exp of the logits, nats.
        gold_logprob: Log-probability of the gold token, nats, not smoothed.
        argmax: Most likely token, the lowest number among ties.
    """

    bits: Float64[Tensor, " tokens"]
    lse: Float64[Tensor, " tokens"]
    gold_logprob: Float64[Tensor, " tokens"]
    argmax: Int32[Tensor, " tokens"]


@dataclass(frozen=True)
class PairStats:
    """Statistics of two predictions per token, base and other.

    Attributes:
        bits_base: Smoothed loss of the base prediction, bits.
        bits: Smoothed loss of the other prediction, bits.
        kl: KL(base || other) of the unsmoothed predictions, bits.
        agree: Whether both have the same most likely token (lowest number among ties).
        gold_logprob_gap: Absolute difference of the gold token's log2-probabilities, bits.
    """

    bits_base: Float64[Tensor, " tokens"]
    bits: Float64[Tensor, " tokens"]
    kl: Float64[Tensor, " tokens"]
    agree: Bool[Tensor, " tokens"]
    gold_logprob_gap: Float64[Tensor, " tokens"]


@torch.no_grad()
def token_stats(
    logits: Float[Tensor, "tokens d_vocab"],
    targets: Int64[Tensor, " tokens"],
    alpha: float,
    *,
    softcap: float | None = None,
    d_vocab: int | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Loss, log-sum-exp, gold log-probability and most likely token of every row.

    Args:
        logits: One row per token; float32, bfloat16 or float16; -inf masks a token.
        targets: The gold token of every row.
        alpha: Smoothing, 0 <= alpha < 1.
        softcap: Replace logits by ``softcap * tanh(logits / softcap)`` first, as TransformerLens
            does; -inf then becomes -softcap and masks nothing. None or 0: leave them.
        d_vocab: True vocabulary size where the head is padded; columns beyond are ignored.
        impl: "auto", "native" or "torch".

    Returns:
        Statistics within 1e-5 bits of their float64 values.

    Raises:
        CertifyError: Shapes, types or devices do not fit, a target lies outside the vocabulary,
            or a row holds NaN or, without a softcap, +inf or only -inf.
    """
    logits, targets, cap, size = _checked("logits", logits, targets, alpha, softcap, d_vocab)
    operator = reference.token_stats
    if use_native(impl, logits.device):
        operator = torch.ops.saelens_certify.token_stats
    stats = TokenStats(*operator(logits, targets, alpha, cap, size))
    check_predictions("logits", stats.lse)
    return stats


@torch.no_grad()
def pair_stats(
    base_logits: Float[Tensor, "tokens d_vocab"],
    logits: Float[Tensor, "tokens d_vocab"],
    targets: Int64[Tensor, " tokens"],
    alpha: float,
    *,
    softcap: float | None = None,
    d_vocab: int | None = None,
    impl: Impl = "auto",
) -> PairStats:
    """Compare two predictions of every token.

    Args:
        base_logits: The base model's logits, one row per token.
        logits: The other model's logits, same shape and type.
        targets: The gold token of every row.
        alpha: Smoothing, 0 <= alpha < 1.
        softcap: Replace logits by ``softcap * tanh(logits / softcap)`` first, as TransformerLens
            does; -inf then becomes -softcap and masks nothing. None or 0: leave them.
        d_vocab: True vocabulary size where the head is padded; columns beyond are ignored.
        impl: "auto", "native" or "torch".

    Returns:
        Losses within 1e-5 bits of their float64 values; KL within 1e-5 relative plus 1e-6 bits.

    Raises:
        CertifyError: As for ``token_stats``.
    """
    check_shape("logits", logits, tuple(base_logits.shape))
    check_dtype("logits", logits, (base_logits.dtype,))
    check_device("logits", logits, base_logits.device)
    base_logits, targets, cap, size = _checked(
        "base_logits", base_logits, targets, alpha, softcap, d_vocab
    )
    operator = reference.pair_stats
    if use_native(impl, logits.device):
        operator = torch.ops.saelens_certify.pair_stats
    stats = PairStats(*operator(base_logits, logits.contiguous(), targets, alpha, cap, size))
    check_predictions("base_logits", stats.bits_base)
    check_predictions("logits", stats.bits)
    return stats


def _checked(
    name: str,
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    softcap: float | None,
    d_vocab: int | None,
) -> tuple[Tensor, Tensor, float, int]:
    check_shape(name, logits, (None, None))
    check_dtype(name, logits, REAL_DTYPES)
    cap, size = check_prediction(name, logits, logits.shape[1], targets, alpha, softcap, d_vocab)
    return logits.contiguous(), targets.contiguous(), cap, size


def check_prediction(
    name: str,
    rows: Tensor,
    columns: int,
    targets: Tensor,
    alpha: float,
    softcap: float | None,
    d_vocab: int | None,
) -> tuple[float, int]:
    """Check what all operators on predictions share.

    Args:
        name: What the logits, or what they are computed from, is called.
        rows: That tensor, one row per token.
        columns: Number of logits per token.
        targets: The gold token of every row.
        alpha: Smoothing.
        softcap: Cap of the logits, if any.
        d_vocab: True vocabulary size, if smaller.

    Returns:
        The cap (0: none) and the vocabulary size.

    Raises:
        CertifyError: One of them does not fit.
    """
    check_shape("targets", targets, (rows.shape[0],))
    check_dtype("targets", targets, (torch.int64,))
    check_device("targets", targets, rows.device)
    if not 0 <= alpha < 1:
        raise CertifyError(f"alpha = {alpha}: smoothing must satisfy 0 <= alpha < 1")
    cap = 0.0 if softcap is None else float(softcap)
    if cap != 0 and not _SOFTCAPS[0] <= cap <= _SOFTCAPS[1]:
        raise CertifyError(
            f"softcap = {softcap} must lie between {_SOFTCAPS[0]} and {_SOFTCAPS[1]:g} (None: no cap)"
        )
    size = columns if d_vocab is None else d_vocab
    if not 1 <= size <= columns:
        raise CertifyError(f"d_vocab = {size} does not fit {name} of {columns} columns")
    if targets.numel():
        low, high = (int(end) for end in torch.aminmax(targets))
        if low < 0 or high >= size:
            raise CertifyError(
                f"target token {low if low < 0 else high} lies outside the vocabulary of {size}: "
                "were the tokens made by another model's tokenizer?"
            )
    return cap, size


def check_predictions(name: str, marker: Tensor) -> None:
    """Raise if a row has no distribution (its marker is NaN), naming the first such row."""
    bad = torch.isnan(marker)
    if bool(bad.any()):
        raise CertifyError(
            f"{name} of row {int(bad.nonzero()[0])} hold NaN or +inf, or only -inf "
            f"({int(bad.sum())} such rows): the model's prediction is not a distribution"
        )
