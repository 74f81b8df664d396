"""Shapes of the compiled operators' results, for torch.compile and fake tensors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def register() -> None:
    """Register the fake kernels; they belong to the compiled operators and can be registered once."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"saelens_certify::{name}", fake)


def _codes(like: Tensor, tokens: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((tokens, slots), dtype=torch.float32),
        like.new_empty((tokens, slots), dtype=torch.int32),
        like.new_empty((tokens,), dtype=torch.int32),
    )


def _topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    theta: Tensor | None,
    gate_bias: Tensor | None,
    weight_norms: Tensor,
    screen_weight: Tensor | None,
    screen_error: Tensor | None,
    pool_bits: Tensor | None,
    k: int,
    gemm_error: float,
    row_chunk: int,
    column_tile: int,
) -> tuple[Tensor, ...]:
    del weight, bias, scale, theta, gate_bias, weight_norms, screen_weight, screen_error
    del gemm_error, row_chunk, column_tile
    tokens = x.shape[0]
    pooled = _codes(x, 0, 0) if pool_bits is None else _codes(x, tokens, k)
    return (*_codes(x, tokens, k), *pooled)


def _threshold_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    theta: Tensor | None,
    gate_bias: Tensor | None,
    weight_norms: Tensor,
    screen_weight: Tensor | None,
    screen_error: Tensor | None,
    capacity: int,
    gemm_error: float,
    row_chunk: int,
    column_tile: int,
) -> tuple[Tensor, ...]:
    del weight, bias, scale, theta, gate_bias, weight_norms, screen_weight, screen_error
    del gemm_error, row_chunk, column_tile
    return _codes(x, x.shape[0], capacity)


def _restrict(values: Tensor, indices: Tensor, pool_bits: Tensor) -> tuple[Tensor, ...]:
    del values, pool_bits
    return _codes(indices, indices.shape[0], indices.shape[1])


def _pool_count_(totals: Tensor, indices: Tensor) -> None:
    del totals, indices


def _count_outside(indices: Tensor, pool_bits: Tensor) -> Tensor:
    del pool_bits
    return indices.new_empty((indices.shape[0],))


def _decode(
    values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    del indices, counts, bias
    return values.new_empty((values.shape[0], weight.shape[1]))


def _decode_stats(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    stats = target.new_empty((values.shape[0], 5), dtype=torch.float64)
    return _decode(values, indices, counts, weight, bias), stats


def _decode_permuted(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutations: Tensor,
) -> Tensor:
    del indices, counts, bias
    return values.new_empty((permutations.shape[0], values.shape[0], weight.shape[1]))


def _decode_permuted_stats(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutations: Tensor,
    target: Tensor,
) -> Tensor:
    del indices, counts, weight, bias, target
    shape = (permutations.shape[0], values.shape[0], 5)
    return values.new_empty(shape, dtype=torch.float64)


def _of_tokens(targets: Tensor) -> tuple[Tensor, ...]:
    tokens = (targets.shape[0],)
    double = [targets.new_empty(tokens, dtype=torch.float64) for _ in range(3)]
    return (*double, targets.new_empty(tokens, dtype=torch.int32))


def _of_pairs(rows: Tensor) -> tuple[Tensor, ...]:
    size = (rows.shape[0],)
    bits_base, bits, kl, gap = (rows.new_empty(size, dtype=torch.float64) for _ in range(4))
    return bits_base, bits, kl, rows.new_empty(size, dtype=torch.bool), gap


def _token_stats(
    logits: Tensor, targets: Tensor, alpha: float, softcap: float, d_vocab: int
) -> tuple[Tensor, ...]:
    del logits, alpha, softcap, d_vocab
    return _of_tokens(targets)


def _pair_stats(
    base_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
) -> tuple[Tensor, ...]:
    del base_logits, logits, alpha, softcap, d_vocab
    return _of_pairs(targets)


def _head_stats(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
    column_tile: int,
) -> tuple[Tensor, ...]:
    del residual, weight, bias, alpha, softcap, d_vocab, column_tile
    return _of_tokens(targets)


def _head_pair_stats(
    base_residual: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
    column_tile: int,
) -> tuple[Tensor, ...]:
    del base_residual, weight, bias, targets, alpha, softcap, d_vocab, column_tile
    return _of_pairs(residual)


_FAKES = {
    "topk_encode": _topk_encode,
    "threshold_encode": _threshold_encode,
    "restrict": _restrict,
    "pool_count_": _pool_count_,
    "count_outside": _count_outside,
    "decode": _decode,
    "decode_stats": _decode_stats,
    "decode_permuted": _decode_permuted,
    "decode_permuted_stats": _decode_permuted_stats,
    "token_stats": _token_stats,
    "pair_stats": _pair_stats,
    "head_stats": _head_stats,
    "head_pair_stats": _head_pair_stats,
}
