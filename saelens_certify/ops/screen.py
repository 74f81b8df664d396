"""What screening needs to know about an encoder's weights; made once per SAE.

Screening multiplies tiles of features fast and roughly; the margin says how far such a score can
lie from the exact one, and only features inside it are scored exactly. The precision of the fast
product changes how much is scored exactly, never the codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops._checks import check_device, check_dtype, check_shape, check_vector
from saelens_certify.ops.margin import rounded_up, row_chunks, weight_norms

Precision = Literal["auto", "float32", "bfloat16", "float16"]

# Lengths this small are not rounded up (`margin.rounded_up`), but margins have a part for them.
_SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Screen:
    """Weights as screening multiplies them, with bounds on what that loses.

    It is made by `prepare_screen` and belongs to the weights as they were then.

    Attributes:
        norms: Upper bounds on the lengths of the encoder rows w_j.
        weight: The rows rounded to 16 bits, v_j, or None where tiles are multiplied in float32.
        error: Upper bounds on ``|w_j - v_j|``, or None likewise.
    """

    norms: Float32[Tensor, " d_sae"]
    weight: Float[Tensor, "d_sae d_in"] | None = None
    error: Float32[Tensor, " d_sae"] | None = None

    @property
    def precision(self) -> torch.dtype:
        """Type of the numbers that are multiplied."""
        return torch.float32 if self.weight is None else self.weight.dtype


# Rows of the weights that a screen is compared with.
_SAMPLE = 8


@torch.no_grad()
def check_screen(screen: Screen, W: Float[Tensor, "d_sae d_in"]) -> None:
    """Raise if a screen cannot be that of these weights.

    Bounds that do not hold would lose features without a word. This looks at shapes, types,
    numbers that are no lengths, and a few rows: enough to tell the screen of another SAE, or of
    weights that have changed as a whole since. It does not see single rows that have changed, nor
    an entry of ``screen.weight`` or of the bounds that was overwritten: prepare a new screen when
    weights change.

    Raises:
        CertifyError: It cannot; the message says what is wrong.
    """
    d_sae, device = W.shape[0], W.device
    check_vector("screen.norms", screen.norms, d_sae, device, torch.float32)
    if (screen.weight is None) != (screen.error is None):
        raise CertifyError("screen.weight and screen.error belong together: use prepare_screen")
    if screen.weight is not None:
        check_shape("screen.weight", screen.weight, tuple(W.shape))
        check_dtype("screen.weight", screen.weight, (torch.bfloat16, torch.float16))
        check_device("screen.weight", screen.weight, device)
    check_vector("screen.error", screen.error, d_sae, device, torch.float32)
    for name, bounds in (("norms", screen.norms), ("error", screen.error)):
        if bounds is not None:
            low, high = torch.aminmax(bounds)
            # NaN fails every comparison.
            if not (float(low) >= 0 and float(high) < math.inf):
                raise CertifyError(f"screen.{name} must hold lengths: use prepare_screen")
    rows = slice(0, d_sae, -(-d_sae // _SAMPLE))
    holds = (_lengths(W[rows]) <= screen.norms[rows].double() + _SMALLEST).all()
    if screen.weight is not None and screen.error is not None:
        lost = _lengths(W[rows].double() - screen.weight[rows].double())
        holds &= (lost <= screen.error[rows].double() + _SMALLEST).all()
    if not bool(holds):
        raise CertifyError(
            "screen is that of other weights, or W has changed since: call prepare_screen(W) again"
        )


def _lengths(rows: Float[Tensor, "rows d_in"]) -> Float64[Tensor, " rows"]:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


@torch.no_grad()
def prepare_screen(W: Float[Tensor, "d_sae d_in"], precision: Precision = "auto") -> Screen:
    """Prepare an encoder's weights for screening.

    Args:
        W: Encoder weights, one row per feature; float32, bfloat16 or float16.
        precision: Type that tiles are multiplied in. "auto" takes 16 bits where the machine
            multiplies them much faster than float32: bfloat16 on CPUs with instructions for it,
            float16 on GPUs (more mantissa, hence fewer features to score exactly; bfloat16 if the
            weights are of that type). The codes are the same for every choice. On a CPU, float16
            is refused: it is slower than float32 there.

    Returns:
        The rounded weights (half the memory of float32 ones) and their bounds.

    Raises:
        CertifyError: A row holds NaN or infinity, or the precision is not possible here.
    """
    norms = weight_norms(W)
    dtype = _precision(precision, W)
    if dtype == torch.float32:
        return Screen(norms)
    if W.dtype == dtype:
        return Screen(norms, W.contiguous(), torch.zeros_like(norms))
    weight = torch.empty(W.shape, dtype=dtype, device=W.device)
    error = torch.empty_like(norms)
    for rows in row_chunks(W):
        weight[rows] = W[rows].to(dtype)
        lost = W[rows].double() - weight[rows].double()
        error[rows] = rounded_up(lost.square().sum(1).sqrt())
    if not bool(torch.isfinite(error).all()):
        # Beyond the range of float16: float32 products have no such limit.
        return Screen(norms)
    return Screen(norms, weight, error)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 with instructions of its own, through oneDNN."""
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # pyright: ignore[reportAttributeAccessIssue]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


def _precision(precision: Precision, W: Tensor) -> torch.dtype:
    on_cpu = W.device.type == "cpu"
    if precision == "auto":
        if on_cpu:
            return torch.bfloat16 if native_bfloat16() else torch.float32
        return torch.bfloat16 if W.dtype == torch.bfloat16 else torch.float16
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision not in choices:
        raise CertifyError(
            f"precision = {precision!r} is unknown: choose 'auto', 'float32', 'bfloat16' or 'float16'"
        )
    if precision == "float16" and on_cpu:
        raise CertifyError(
            "precision = 'float16' is for GPUs: on a CPU it is slower than float32; use 'auto'"
        )
    return choices[precision]
