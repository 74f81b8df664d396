r"""How far a score from the fast matrix product can lie from the exact one.

For any order of summation, fused or not, a float32 dot product of length d obeys
:math:`|\mathrm{fl}(x \cdot w) - x \cdot w| \le \gamma_d \sum_i |x_i w_i| \le \gamma_d \|x\| \|w\|`
with :math:`\gamma_d = d u / (1 - d u)` and :math:`u = 2^{-24}` (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1). The screening margin below is built on it, so that
the features kept for exact scoring always contain the true ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from saelens_certify.errors import CertifyError

UNIT_ROUNDOFF = 2.0**-24

# Relative size of the roundings outside the matrix product: adding the bias, scaling, forming the
# margin and comparing (at most 6 roundings in float32), and the exact score's own final rounding.
OUTER_ROUNDINGS = 16 * UNIT_ROUNDOFF

# Operands rounded (or cut) before they are multiplied, when the user allows fast float32 products.
_OPERAND_ERROR = {"tf32": 2.0**-10, "f16": 2.0**-10, "bf16": 2.0**-8, "any": 2.0**-8}

# Magnitude above which a float32 product of the two norms may overflow.
NORM_PRODUCT_LIMIT = 2.0**120

_ROW_CHUNK_BYTES = 1 << 24


def gemm_error(d_in: int, device: torch.device, precision: torch.dtype = torch.float32) -> float:
    """Relative error of one dot product with float32 accumulation, in the mode now in force.

    Full float32 gives ``gamma(d + 8)``. If reduced modes are allowed for this device
    (``torch.set_float32_matmul_precision``, ``torch.backends.*.matmul.fp32_precision``), operands
    may be rounded to TF32 or bfloat16 first; the margin then grows with them, and results stay
    exact at the price of more rescoring.

    Args:
        d_in: Length of the dot products.
        device: Device that computes them.
        precision: Type of the operands; 16-bit ones are multiplied as they are, and added up in
            float32 (`float32_accumulation`).

    Returns:
        A bound on ``|computed - exact| / (||x|| ||w||)`` for the operands that are multiplied.
    """
    operand = 0.0
    if precision == torch.float32:
        backends: Any = torch.backends
        backend = backends.cuda if device.type == "cuda" else backends.mkldnn
        operand = _OPERAND_ERROR.get(backend.matmul.fp32_precision, 0.0)
        if device.type == "cpu":
            # oneDNN reads this by itself (torch sends float32 products to it on ARM).
            mode = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "strict").lower()
            operand = max(operand, _OPERAND_ERROR.get(mode, 0.0))
    full = precision == torch.float32 and operand == 0.0
    # Tensor cores and AMX may cut instead of round when they add, and add blocks of products aligned to
    # the largest: up to 3u per product.
    steps = (d_in + 8) * UNIT_ROUNDOFF if full else (d_in + 16) * 3 * UNIT_ROUNDOFF
    if steps >= 0.5:
        raise CertifyError(f"d_in = {d_in} is too long for float32 screening")
    return (1 + operand) ** 2 * (1 + steps / (1 - steps)) - 1


@contextmanager
def float32_accumulation(precision: torch.dtype) -> Iterator[None]:
    """Have products of 16-bit numbers added up in float32, whatever the user allows.

    ``torch.backends.cuda.matmul.allow_fp16_accumulation`` lets a GPU add up float16 products in
    float16. No useful bound holds then: sums overflow at 65504, and the error grows with
    ``d_in * 2^-11``; and torch refuses to write such sums as float32.

    Args:
        precision: Type of the operands; only float16 is concerned.
    """
    matmul: Any = torch.backends.cuda.matmul
    if precision != torch.float16 or not matmul.allow_fp16_accumulation:
        yield
        return
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = True


def weight_norms(W: Float[Tensor, "d_sae d_in"]) -> Float32[Tensor, " d_sae"]:
    """Euclidean norm of each row, rounded up; compute it once per SAE.

    Args:
        W: Encoder weights, one row per feature.

    Returns:
        Upper bounds on the row norms, within a relative 1e-6.

    Raises:
        CertifyError: A row holds NaN or infinity.
    """
    norms = torch.empty(W.shape[0], dtype=torch.float32, device=W.device)
    with torch.no_grad():
        for rows in row_chunks(W):
            norms[rows] = rounded_up(W[rows].double().square().sum(1).sqrt())
    if not bool(torch.isfinite(norms).all()):
        row = int((~torch.isfinite(norms)).nonzero()[0])
        raise CertifyError(
            f"encoder weights of feature {row} hold NaN, infinity or values beyond float32 range: "
            "check the SAE's file"
        )
    return norms


def rounded_up(lengths: Float64[Tensor, " rows"]) -> Float32[Tensor, " rows"]:
    """Float32 numbers that no exact length exceeds, given lengths computed in float64."""
    return (lengths * (1 + 2.0**-22)).float()


def row_chunks(W: Float[Tensor, "d_sae d_in"]) -> Iterator[slice]:
    """Rows to widen to float64 at a time."""
    rows = max(1, _ROW_CHUNK_BYTES // (8 * max(1, W.shape[1])))
    for start in range(0, W.shape[0], rows):
        yield slice(start, min(start + rows, W.shape[0]))


def underflow(d_in: int) -> float:
    """Absolute error per unit of ``1 + ||x|| + ||w||`` when tiny numbers are flushed to zero."""
    return 4 * (d_in + 8) * 2.0**-126
