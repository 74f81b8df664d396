"""Argument checks shared by the operators' public faces."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops.codes import SparseCodes

REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless the tensor has this shape (None: any size)."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise CertifyError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless the tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CertifyError(f"{name} is {tensor.dtype}, expected {names}: convert it first")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless the tensor lies on this device."""
    if tensor.device != device:
        raise CertifyError(f"{name} is on {tensor.device}, but the other inputs are on {device}")


def check_vector(
    name: str, tensor: Tensor | None, size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise unless the optional vector has this size, device and dtype."""
    if tensor is not None:
        check_shape(name, tensor, (size,))
        check_dtype(name, tensor, (dtype,))
        check_device(name, tensor, device)


def check_finite_rows(name: str, tensor: Tensor) -> float:
    """Raise if a row holds NaN or infinity, naming the first such row.

    Returns:
        The largest magnitude.
    """
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor, dim=1)
    largest = float(torch.maximum(-low.amin(), high.amax()))
    if math.isfinite(largest):
        return largest
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    row = int(bad.nonzero()[0])
    raise CertifyError(
        f"{name} holds NaN or infinity in row {row} ({int(bad.sum())} such rows): "
        "the activations of that token are not usable"
    )


def check_finite_vector(name: str, tensor: Tensor | None) -> None:
    """Raise if the optional vector holds NaN or infinity, naming the first such entry."""
    if tensor is not None and not bool(torch.isfinite(tensor).all()):
        entry = int((~torch.isfinite(tensor)).nonzero()[0])
        raise CertifyError(
            f"{name} holds {float(tensor[entry])} at feature {entry}: check the SAE's file"
        )


def check_codes(codes: SparseCodes, d_sae: int) -> None:
    """Raise if a code names a feature that does not exist."""
    if codes.indices.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(codes.indices))
    if high >= d_sae:
        raise CertifyError(f"sparse codes name feature {high}, but there are only {d_sae} features")
    if low < -1:
        raise CertifyError(
            f"sparse codes name feature {low}: features count from 0, and unused slots hold -1"
        )


def check_counts(codes: SparseCodes) -> None:
    """Raise if a token's count is not that of its slots in use."""
    wrong = (codes.indices >= 0).sum(1) != codes.counts
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CertifyError(
            f"sparse codes count {int(codes.counts[row])} features in row {row}, but "
            f"{int((codes.indices[row] >= 0).sum())} of its slots hold one"
        )


def pool_words(d_sae: int) -> int:
    """Number of 32-bit words that hold one bit per feature."""
    return (d_sae + 31) // 32
