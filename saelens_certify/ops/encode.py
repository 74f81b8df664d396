"""Exact sparse encoding: which features are active for a token, and how strongly.

The score of feature j is defined bit by bit, so that it does not depend on batch size, number of
threads, device or matrix product library: ``scale_j * (sum_i x_i W_ji + bias_j)`` in float64, the
sum over 32 lanes (lane = i mod 32, ascending inside a lane, then pairwise at distance 16, 8, 4, 2,
1), rounded once to float32. A fast matrix product over tiles of features screens; only features
within its error bound of the selection are scored exactly. No tokens x features tensor is formed, but for one
case: `threshold_encode` has as many slots for every token as the busiest one needs.

``mode="reference"`` is the exception: it selects what SAELens itself would select, in the SAE's
own precision, for replicating published numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops import margin, reference
from saelens_certify.ops._checks import (
    REAL_DTYPES,
    check_device,
    check_dtype,
    check_finite_rows,
    check_finite_vector,
    check_shape,
    check_vector,
    pool_words,
)
from saelens_certify.ops._library import Impl, use_native
from saelens_certify.ops.codes import SparseCodes
from saelens_certify.ops.reference.encode import Encoder
from saelens_certify.ops.screen import Screen, check_screen

Mode = Literal["exact", "reference"]

_INITIAL_CAPACITY = 256


@torch.no_grad()
def topk_encode(
    x: Float32[Tensor, "tokens d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float32[Tensor, " d_sae"],
    *,
    k: int,
    scale: Float32[Tensor, " d_sae"] | None = None,
    theta: Float32[Tensor, " d_sae"] | None = None,
    gate_bias: Float32[Tensor, " d_sae"] | None = None,
    pool_bits: Int32[Tensor, " words"] | None = None,
    screen: Screen | None = None,
    mode: Mode = "exact",
    impl: Impl = "auto",
    row_chunk: int | None = None,
    column_tile: int | None = None,
) -> tuple[SparseCodes, SparseCodes | None]:
    """Keep the k largest active features of every token.

    A feature is active if its score exceeds ``theta_j`` strictly. Slots are ordered by score,
    largest first, ties by feature number.

    Args:
        x: Encoder input, already normalised and centred.
        W: Encoder weights, one row per feature; float32, bfloat16 or float16.
        bias: Encoder bias.
        k: Features to keep; more than there are keeps all active ones.
        scale: Factor of each score; None for 1.
        theta: Threshold of each score; None for 0.
        gate_bias: Of a gated SAE: feature j is active only if ``x . W_j + gate_bias_j > 0`` as
            well (same sum, rounded once); None for no gate.
        pool_bits: Features of a pool (see ``pool_bits``); asks for the pool's own top k as well.
        screen: ``ops.prepare_screen(W)``; without it tiles are multiplied in float32. Pass it
            when calling often.
        mode: "exact", or "reference" for what SAELens itself would select: dense scores in W's
            own type and one ``torch.topk``, whose choice among near ties depends on the machine,
            the batch and the layout of W (pass ``W=sae.W_enc.T``, a view).
        impl: "auto", "native" or "torch".
        row_chunk: Tokens per chunk, for bounding memory; the result does not depend on it.
        column_tile: Features per tile, likewise.

    Returns:
        Codes over all features, and codes over the pool's features (None without a pool).

    Raises:
        CertifyError: Shapes, types or devices do not fit; a token's row holds NaN or infinity.
    """
    if k < 1:
        raise CertifyError(f"k = {k}: keep at least one feature per token")
    call = _checked(x, W, bias, scale, theta, gate_bias, screen, mode, row_chunk, column_tile)
    if pool_bits is not None:
        check_vector("pool_bits", pool_bits, pool_words(W.shape[0]), x.device, torch.int32)
        pool_bits = pool_bits.contiguous()
    if mode == "reference":
        everything = reference.topk_as_sae_lens(x, call.encoder, k, None)
        pooled = None
        if pool_bits is not None:
            pooled = reference.topk_as_sae_lens(x, call.encoder, k, pool_bits)
    elif use_native(impl, x.device):
        with margin.float32_accumulation(call.screen.precision):
            parts = torch.ops.saelens_certify.topk_encode(
                *call.native, pool_bits, min(k, W.shape[0]), *call.sizes
            )
        everything, pooled = parts[:3], parts[3:] if pool_bits is not None else None
    else:
        everything, pooled = reference.topk_encode(
            call.x, call.encoder, k, pool_bits, row_chunk, column_tile
        )
    return SparseCodes(*everything), None if pooled is None else SparseCodes(*pooled)


@torch.no_grad()
def threshold_encode(
    x: Float32[Tensor, "tokens d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float32[Tensor, " d_sae"],
    *,
    theta: Float32[Tensor, " d_sae"] | None = None,
    scale: Float32[Tensor, " d_sae"] | None = None,
    gate_bias: Float32[Tensor, " d_sae"] | None = None,
    screen: Screen | None = None,
    mode: Mode = "exact",
    impl: Impl = "auto",
    row_chunk: int | None = None,
    column_tile: int | None = None,
) -> SparseCodes:
    """Keep every active feature of every token, feature numbers ascending.

    Args:
        x: Encoder input, already normalised and centred.
        W: Encoder weights, one row per feature; float32, bfloat16 or float16.
        bias: Encoder bias.
        theta: Threshold of each score (strict); None for 0.
        scale: Factor of each score; None for 1.
        gate_bias: Second condition of a gated SAE, as for `topk_encode`.
        screen: ``ops.prepare_screen(W)``; without it tiles are multiplied in float32.
        mode: "exact", or "reference" for what SAELens itself would select.
        impl: "auto", "native" or "torch".
        row_chunk: Tokens per chunk, for bounding memory; the result does not depend on it.
        column_tile: Features per tile, likewise.

    Returns:
        Codes with as many slots as the busiest token needs.

    Raises:
        CertifyError: Shapes, types or devices do not fit; a token's row holds NaN or infinity.
    """
    call = _checked(x, W, bias, scale, theta, gate_bias, screen, mode, row_chunk, column_tile)
    if mode == "reference":
        return SparseCodes(*reference.threshold_as_sae_lens(x, call.encoder))
    if not use_native(impl, x.device):
        return SparseCodes(
            *reference.threshold_encode(call.x, call.encoder, row_chunk, column_tile)
        )
    capacity = min(_INITIAL_CAPACITY, W.shape[0])
    codes = _native_threshold(call, capacity)
    busy = codes.counts > capacity
    if bool(busy.any()):
        # Counts are exact even where the slots did not suffice: one more run always does.
        slots = int(codes.counts.max())
        again = _native_threshold(replace(call, x=call.x[busy]), slots)
        values = torch.nn.functional.pad(codes.values, (0, slots - capacity))
        indices = torch.nn.functional.pad(codes.indices, (0, slots - capacity), value=-1)
        values[busy], indices[busy] = again.values, again.indices
        codes = SparseCodes(values, indices, codes.counts)
    return codes.trimmed()


def _native_threshold(call: _Call, capacity: int) -> SparseCodes:
    with margin.float32_accumulation(call.screen.precision):
        return SparseCodes(
            *torch.ops.saelens_certify.threshold_encode(*call.native, capacity, *call.sizes)
        )


@dataclass(frozen=True)
class _Call:
    """Checked inputs of one call."""

    x: Tensor
    encoder: Encoder
    screen: Screen
    row_chunk: int
    column_tile: int

    @property
    def native(self) -> tuple[Tensor | None, ...]:
        """Leading arguments of the compiled operators."""
        e = self.encoder
        optional = (None if v is None else v.contiguous() for v in (e.scale, e.theta, e.gate_bias))
        return (
            self.x,
            e.W.contiguous(),
            e.bias.contiguous(),
            *optional,
            self.screen.norms,
            self.screen.weight,
            self.screen.error,
        )

    @property
    def sizes(self) -> tuple[float, int, int]:
        """Trailing arguments: error of the product that screens, rows and features at a time."""
        error = margin.gemm_error(self.x.shape[1], self.x.device, self.screen.precision)
        return error, self.row_chunk, self.column_tile


def _check_range(
    longest: float, screen: Screen, bias: Tensor, scale: Tensor | None, gate_bias: Tensor | None
) -> None:
    """Raise where scores or their margins might leave the range of float32."""

    def most(vector: Tensor | None, default: float) -> float:
        return default if vector is None else float(vector.abs().max())

    norm = float(screen.norms.max())
    size = longest * max(norm, 1.0) + max(most(bias, 0.0), most(gate_bias, 0.0))
    if size * max(most(scale, 1.0), 1.0) > margin.NORM_PRODUCT_LIMIT:
        raise CertifyError(
            f"activations of norm up to {longest:.3g}, weights of norm {norm:.3g}, biases up to "
            f"{most(bias, 0.0):.3g} and scales up to {most(scale, 1.0):.3g} overflow float32 scores: "
            "rescale the activations"
        )


def _checked(
    x: Tensor,
    W: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    theta: Tensor | None,
    gate_bias: Tensor | None,
    screen: Screen | None,
    mode: str,
    row_chunk: int | None,
    column_tile: int | None,
) -> _Call:
    check_shape("x", x, (None, None))
    check_dtype("x", x, (torch.float32,))
    check_shape("W", W, (None, x.shape[1]))
    check_dtype("W", W, REAL_DTYPES)
    check_device("W", W, x.device)
    if W.shape[0] == 0:
        raise CertifyError("W has no rows: an SAE needs at least one feature")
    for name, vector in (
        ("bias", bias),
        ("scale", scale),
        ("theta", theta),
        ("gate_bias", gate_bias),
    ):
        check_vector(name, vector, W.shape[0], x.device, torch.float32)
        check_finite_vector(name, vector)
    if mode not in ("exact", "reference"):
        raise CertifyError(f"mode = {mode!r} is unknown: choose 'exact' or 'reference'")
    for name, size in (("row_chunk", row_chunk), ("column_tile", column_tile)):
        if size is not None and size < 1:
            raise CertifyError(f"{name} = {size}: use a positive number, or None for the default")
    largest = check_finite_rows("x", x)
    if screen is None:
        screen = Screen(margin.weight_norms(W))
    else:
        check_screen(screen, W)
    _check_range(largest * x.shape[1] ** 0.5, screen, bias, scale, gate_bias)
    error = margin.gemm_error(x.shape[1], x.device)
    encoder = Encoder(W, bias, scale, theta, gate_bias, screen.norms, error)
    return _Call(x.contiguous(), encoder, screen, row_chunk or 0, column_tile or 0)
