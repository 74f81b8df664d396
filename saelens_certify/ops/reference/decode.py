"""Gather decoding with error statistics in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from saelens_certify.ops.reference.lanes import lane_sum

_CHUNK_BYTES = 1 << 25
_LOW_BITS = (1 << 29) - 1
_HALFWAY = 1 << 28
_FLOAT32_NORMAL = 2.0**-126


def _fma_float32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Float32 fused multiply-add ``a * b + c`` of float64 tensors that hold float32 numbers.

    The product is exact in float64, the sum is rounded to 53 bits. Rounding it again to 24 bits
    errs only if the 53-bit sum lies exactly halfway (or below the normal range); there the sum is
    first replaced by its neighbour with an odd last bit (rounding to odd, Boldo and Melquiond
    2008), after which the second rounding is right.
    """
    product = a * b
    total = product + c
    doubtful = (total.view(torch.int64) & _LOW_BITS) == _HALFWAY
    doubtful |= (total.abs() < _FLOAT32_NORMAL) & (total != 0)
    if not bool(doubtful.any()):
        return total.float()
    p, s, t = product[doubtful], c[doubtful], total[doubtful]
    # Error of the sum, exactly (Knuth's TwoSum).
    back = t - p
    error = (p - (t - back)) + (s - back)
    bits = t.view(torch.int64)
    step = torch.where((error > 0) == (t > 0), 1, -1)
    bits = torch.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    total[doubtful] = bits.view(torch.float64)
    return total.float()


def decode(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Reconstruction of every token, and its error statistics if there is a target."""
    n_tokens, d_out = values.shape[0], W_dec.shape[1]
    x_hat = torch.empty(n_tokens, d_out, dtype=torch.float32, device=values.device)
    stats = None
    if target is not None:
        stats = torch.empty(n_tokens, 5, dtype=torch.float64, device=values.device)
    step = max(1, _CHUNK_BYTES // (8 * max(1, d_out)))
    for start in range(0, n_tokens, step):
        rows = slice(start, start + step)
        x_hat[rows] = _decode_rows(values[rows], indices[rows], counts[rows], W_dec)
        if b_dec is not None:
            x_hat[rows] += b_dec
        if stats is not None and target is not None:
            stats[rows] = _row_stats(target[rows].double(), x_hat[rows].double())
    return x_hat, stats


def decode_permuted(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    permutations: Tensor,
) -> Tensor:
    """Reconstruction of every token under every renaming of the features."""
    shape = (permutations.shape[0], values.shape[0], W_dec.shape[1])
    x_hat = torch.empty(shape, dtype=torch.float32, device=values.device)
    for r, permutation in enumerate(permutations):
        renamed = _renamed(indices, permutation)
        x_hat[r], _ = decode(values, renamed, counts, W_dec, b_dec, None)
    return x_hat


def decode_permuted_stats(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    permutations: Tensor,
    target: Tensor,
) -> Tensor:
    """Error statistics of every token under every renaming of the features."""
    shape = (permutations.shape[0], values.shape[0], 5)
    stats = torch.empty(shape, dtype=torch.float64, device=values.device)
    for r, permutation in enumerate(permutations):
        renamed = _renamed(indices, permutation)
        _, of_one = decode(values, renamed, counts, W_dec, b_dec, target)
        if of_one is not None:
            stats[r] = of_one
    return stats


def _renamed(indices: Tensor, permutation: Tensor) -> Tensor:
    # Unused slots are never looked at.
    return permutation[indices.clamp(min=0).long()]


def _decode_rows(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor) -> Tensor:
    shape = values.shape[0], W_dec.shape[1]
    total = torch.zeros(shape, dtype=torch.float32, device=values.device)
    slots = int(counts.max()) if values.shape[0] else 0
    for slot in range(slots):
        rows = (counts > slot).nonzero().squeeze(1)
        factors = values[rows, slot].double().unsqueeze(1)
        features = W_dec[indices[rows, slot].long()].double()
        total[rows] = _fma_float32(factors, features, total[rows].double())
    return total


def _row_stats(x: Tensor, x_hat: Tensor) -> Tensor:
    error = x - x_hat
    terms = (error * error, x * x, x_hat * x_hat, x * x_hat, x)
    return torch.stack([lane_sum(term) for term in terms], dim=1)
