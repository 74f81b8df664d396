"""Inputs on which one part of the screening margin decides: without it, features are lost.

In each case screened scores mislead by almost as much as one term of the margin allows, and all
other terms are small. Every sum is exact in float64, so that exact scores are plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ops_oracle as oracle
import pytest
import torch
from torch import Tensor

from saelens_certify import ops

FORMS = oracle.FORMS
K = 20

# A bfloat16 number has 8 bits: numbers less than UP above 1, or less than DOWN below it, round to 1.
UP = 2.0**-8 - 2.0**-20
DOWN = 2.0**-9 - 2.0**-20


@dataclass(frozen=True)
class Case:
    x: Tensor
    W: Tensor
    bias: Tensor
    gate_bias: Tensor | None = None


def shuffled(*parts: tuple[Tensor, float, float | None], x: Tensor) -> Case:
    """Features with (weights, bias, gate bias), in an order that shows nothing."""
    W = torch.cat([weights for weights, _, _ in parts])
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(0))
    bias = torch.cat([torch.full((len(weights),), b) for weights, b, _ in parts])
    gates = [torch.full((len(weights),), gate) for weights, _, gate in parts if gate is not None]
    return Case(x[None], W[order], bias[order], torch.cat(gates)[order] if gates else None)


def hidden(sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """A row and 200 features that look orthogonal to it in bfloat16, but score up to 0.18 (-0.18)."""
    x = torch.cat([torch.ones(32), -torch.ones(32)])
    amount = torch.linspace(0.3, 1, 200)[:, None].expand(200, 32)
    more, less = 1 + UP * amount, 1 - DOWN * amount
    return x, torch.cat([more, less] if sign > 0 else [less, more], 1)


def visible() -> Tensor:
    """100 features that read one dimension, exactly in bfloat16."""
    W = torch.zeros(100, 64)
    W[:, 0] = torch.linspace(0.09, 0.14, 100).bfloat16().float()
    return W


def rounded_weights() -> Case:
    x, features = hidden()
    return shuffled((features, 0.0, None), (visible(), 0.0, None), x=x)


def rounded_row() -> Case:
    """The same by the rounding of x: features of ones score 0.19, and 0 after it."""
    x = torch.cat([torch.full((32,), 1 + UP), torch.full((32,), DOWN - 1)])
    return shuffled((torch.ones(30, 64), 0.0, None), (visible(), 0.0, None), x=x)


def rounded_products() -> Case:
    """Products on both sides of the middle of two bfloat16 numbers; biases turn the order round."""
    below, above = torch.zeros(2, 40, 64)
    below[:, 0] = above[:, 0] = 1
    below[:, 1] = 2.0**-8 - 2.0**-12
    above[:, 1] = 2.0**-8 + 2.0**-12
    return shuffled((below, 0.0, None), (above, -0.0008, None), x=torch.ones(64))


def closed_gates() -> Case:
    """The gates of the hidden features look closed, and are open."""
    x, features = hidden()
    return shuffled((features, 1.0, -0.04), (visible(), 1.0, -0.05), x=x)


def open_gates() -> Case:
    """The gates of features with high scores look open, and are closed: they set no floor."""
    x, features = hidden(-1.0)
    return shuffled((features, 5.0, 0.02), (visible(), 1.0, 1.0), x=x)


def lost_terms() -> Case:
    """Thousands of terms, each too small to change a float32 sum that has grown before."""
    x = torch.full((1 << 14,), 2.0**-13)
    x[:10], x[-10:] = 1, -1
    lossy = torch.full((40, len(x)), 2.0**-13)
    lossy[:, :10] = lossy[:, -10:] = 1
    plain = torch.zeros(40, len(x))
    plain[:, 10 : 10 + (1 << 13)] = 2.0**-13  # half as many terms, and nothing before them
    return shuffled((lossy, 0.0, None), (plain, 0.0, None), x=x)


def rounded_twice() -> Case:
    """Sums just above the middle of two scores: rounded before the bias is added, they fall."""
    x = torch.tensor([1.0, 2.0**-26])
    raised = torch.full((60, 2), 2.0**-24)
    plain = torch.tensor([[2.0**-23, 0.0]]).expand(60, 2)
    return shuffled((raised, 1.0, None), (plain, 1.0, None), x=x)


CASES = [
    rounded_weights,
    rounded_row,
    rounded_products,
    closed_gates,
    open_gates,
    lost_terms,
    rounded_twice,
]


def exact(case: Case) -> Tensor:
    """Scores of the row, -inf where a feature is not active."""
    sums = case.W.double() @ case.x[0].double()
    scores = (sums + case.bias).float()
    active = scores > 0
    if case.gate_bias is not None:
        active &= (sums + case.gate_bias).float() > 0
    return torch.where(active, scores, -torch.inf)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("make", CASES)
def test_features_that_screening_misjudges(form, tile, make: Callable[[], Case]):
    case = make()
    row = exact(case).numpy()
    pool = torch.arange(len(row)) % 3 != 0
    shared = {"gate_bias": case.gate_bias, "column_tile": tile}
    top, pooled = form.topk(case.x, case.W, case.bias, k=K, pool_bits=ops.pool_bits(pool), **shared)
    every = form.threshold(case.x, case.W, case.bias, **shared)
    assert oracle.rows(top)[0] == oracle.top_k(row, K)
    assert oracle.rows(pooled)[0] == oracle.top_k(row, K, pool=pool)
    assert oracle.rows(every)[0] == [(j, float(row[j])) for j in oracle.active(row, None)]


@pytest.mark.parametrize("make", [rounded_weights, rounded_row, closed_gates, open_gates])
def test_the_cases_do_mislead(make: Callable[[], Case]):
    """Products of rounded rows and weights find other features: otherwise the cases test nothing."""
    case = make()
    gate = case.gate_bias
    rounded = Case(case.x.bfloat16().float(), case.W.bfloat16().float(), case.bias, gate)
    row, wrong = exact(case).numpy(), exact(rounded).numpy()
    assert {j for j, _ in oracle.top_k(row, K)} != {j for j, _ in oracle.top_k(wrong, K)}
