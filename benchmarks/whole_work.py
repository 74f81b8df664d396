"""The least that a whole measurement computes: products counted while it runs, weights read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rooflines import Precision, Work

Shape = Sequence[int]


def _product(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """An encoder: every token with every row of the weights."""
    return 2 * x[0] * x[1] * weight[0]


def _head(residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * residual[0] * weight[0] * weight[1]


def _head_pair(base: Shape, residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * (base[0] + residual[0]) * weight[0] * weight[1]


def _gather(
    values: Shape, _indices: Shape, _counts: Shape, weight: Shape, *_: Any, **__: Any
) -> int:
    """A decoder: one row of the weights for each slot."""
    return 2 * values[0] * values[1] * weight[1]


def _permuted(*arguments: Shape, **__: Any) -> int:
    return arguments[5][0] * _gather(*arguments)


_ENCODERS = {"topk_encode": _product, "threshold_encode": _product}
_OTHERS = {
    "head_stats": _head,
    "head_pair_stats": _head_pair,
    "decode": _gather,
    "decode_stats": _gather,
    "decode_permuted": _permuted,
    "decode_permuted_stats": _permuted,
}


def work_of(
    call: Callable[[], object], weights: Iterable[Tensor], dtype: torch.dtype, screened: bool
) -> list[Work]:
    """Run something once and count its products.

    Args:
        call: What is measured; it uses the compiled operators.
        weights: What has to be read at least once.
        dtype: Type of the model's own products.
        screened: Whether encoders multiply in 16 bits here.

    Returns:
        The model's and the heads' products with the weights' bytes, and the encoders' products.
    """
    ours = torch.ops.saelens_certify
    formulas = {getattr(ours, name): formula for name, formula in (_ENCODERS | _OTHERS).items()}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    encoders = sum(counts.get(getattr(ours, name), 0) for name in _ENCODERS)
    precision: Precision = "fp32" if dtype == torch.float32 else "16bit"
    n_bytes = sum(weight.nbytes for weight in weights)
    return [
        Work(sum(counts.values()) - encoders, n_bytes, precision),
        Work(encoders, 0.0, "16bit" if screened else "fp32"),
    ]
