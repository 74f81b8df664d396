"""What this machine can do at best, measured in the same run, and the floor that follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.timing import Contender, interleaved

Precision = Literal["fp32", "tf32", "16bit"]


@dataclass(frozen=True)
class Work:
    """One stage of a computation: what it must at least multiply and move.

    Attributes:
        flops: Floating point operations of matrix products, 2 per multiply-add.
        n_bytes: Bytes that must be read or written at least once.
        precision: Which matrix product rate applies.
    """

    flops: float = 0.0
    n_bytes: float = 0.0
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        gemm: Floating point operations per second of the best matrix product found, by precision.
        read: Bytes per second of the best read of a buffer larger than the caches.
        l2_read: Bytes per second of repeated reads of 16 MiB (GPU only).
        native_16bit: Whether 16-bit products are faster than float32 ones here.
    """

    gemm: dict[str, float]
    read: float
    l2_read: float | None
    native_16bit: bool

    def floor(self, stages: Iterable[Work]) -> float:
        """Seconds that the stages take at least, one after another, at the measured limits."""
        return sum(
            max(w.flops / self.gemm[w.precision] if w.flops else 0.0, w.n_bytes / self.read)
            for w in stages
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def has_native_16bit(device: str) -> bool:
    """Whether this device multiplies 16-bit matrices in hardware."""
    if device == "cuda":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def product_16bit(a: Tensor, b: Tensor) -> Tensor:
    """Multiply 16-bit matrices: float32 out on CUDA, 16-bit out on CPU (torch has no other)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)


def with_tf32(call: Contender) -> Contender:
    """Let float32 matrix products round to TF32 during a call."""

    def run(number: int) -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return call(number)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def measure_ceilings(device: str, quick: bool = False) -> Ceilings:
    """Measure matrix product rates and read bandwidth.

    Args:
        device: "cpu" or "cuda".
        quick: Toy sizes.

    Returns:
        The limits; the best of several shapes and reductions each.
    """
    sizes = _gemm_sizes(device, quick)
    precisions: list[Precision] = ["fp32", "tf32"] if device == "cuda" else ["fp32"]
    native = has_native_16bit(device)
    if native:
        precisions.append("16bit")
    gemm = {p: max(_gemm_rate(device, p, *size, quick) for size in sizes) for p in precisions}
    for missing in ("tf32", "16bit"):
        gemm.setdefault(missing, gemm["fp32"])
    l2 = _l2_rate(quick) if device == "cuda" else None
    return Ceilings(gemm, _read_rate(device, quick), l2, native)


def _gemm_sizes(device: str, quick: bool) -> list[tuple[int, int, int]]:
    if quick:
        return [(64, 64, 64)]
    if device == "cuda":
        return [(8192, 8192, 8192), (8192, 768, 24576), (4096, 4096, 16384)]
    return [(1024, 768, 1024), (1024, 768, 8192), (1024, 2048, 4096), (2048, 2048, 2048)]


def _gemm_rate(device: str, precision: Precision, n: int, d: int, m: int, quick: bool) -> float:
    dtypes = [torch.float32]
    if precision == "16bit":
        dtypes = [torch.bfloat16, torch.float16] if device == "cuda" else [torch.bfloat16]
    best = 0.0
    for dtype in dtypes:
        a = torch.randn(n, d, device=device).to(dtype)
        b = torch.randn(m, d, device=device).to(dtype)
        columns = b.T.contiguous()
        calls: dict[str, Contender] = {
            "rows": lambda _, a=a, b=b: _product(a, b.T),
            "columns": lambda _, a=a, b=columns: _product(a, b),
        }
        if precision == "tf32":
            calls = {name: with_tf32(call) for name, call in calls.items()}
        timings = interleaved(calls, device, budget_s=0.0 if quick else 0.4)
        best = max(best, *(2.0 * n * d * m / t.range[0] for t in timings.values()))
    return best


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dtype == torch.float32 else product_16bit(a, b)


def _read_rate(device: str, quick: bool) -> float:
    n = 1 << 16 if quick else 1 << 28
    x = torch.ones(n, device=device)
    calls: dict[str, Contender] = {
        "sum": lambda _: x.sum(),
        "max": lambda _: x.max(),
        "norm": lambda _: torch.linalg.vector_norm(x),
        "dot": lambda _: torch.dot(x, x),
    }
    timings = interleaved(calls, device, budget_s=0.0 if quick else 1.0)
    return max(4.0 * n / t.range[0] for t in timings.values())


def _l2_rate(quick: bool) -> float:
    """Read the same 16 MiB many times in one kernel: a broadcast view has the addresses once."""
    n, repeats = (1 << 12, 4) if quick else (1 << 22, 64)
    x = torch.ones(n, device="cuda").expand(repeats, n)
    timings = interleaved({"sum": lambda _: x.sum(dim=1)}, "cuda", budget_s=0.2)
    return 4.0 * n * repeats / timings["sum"].range[0]
