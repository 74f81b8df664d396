"""Slow, independent definitions of every operator: NumPy and exact fractions, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from saelens_certify import ops
from saelens_certify.ops._library import library

IMPLS: list[ops.Impl] = ["torch"] if library().path is None else ["native", "torch"]


@dataclass(frozen=True)
class Form:
    """One way to run an encoder: an implementation, and the precision that it screens with."""

    impl: ops.Impl
    precision: Literal["float32", "bfloat16"]

    def topk(self, x, W, bias, **settings):
        screen = ops.prepare_screen(W, self.precision)
        return ops.topk_encode(x, W, bias, screen=screen, impl=self.impl, **settings)

    def threshold(self, x, W, bias, **settings) -> ops.SparseCodes:
        screen = ops.prepare_screen(W, self.precision)
        return ops.threshold_encode(x, W, bias, screen=screen, impl=self.impl, **settings)


FORMS = [Form("torch", "float32")]
if "native" in IMPLS:
    FORMS += [Form("native", "float32"), Form("native", "bfloat16")]


def lane_sum(terms) -> float:
    lanes = [0.0] * 32
    for i, term in enumerate(terms):
        lanes[i % 32] += float(term)
    for distance in (16, 8, 4, 2, 1):
        lanes = [lanes[lane] + lanes[lane ^ distance] for lane in range(32)]
    return lanes[0]


def scores(x, W, bias, scale=None) -> np.ndarray:
    """Canonical float32 scores of one row against every feature."""
    out = np.empty(len(W), dtype=np.float32)
    x, W = x.double().numpy(), W.double().numpy()
    for j, w in enumerate(W):
        total = lane_sum(x * w) + float(bias[j])
        if scale is not None:
            total *= float(scale[j])
        out[j] = np.float32(total)
    return out


def gated(row: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Scores of a gated SAE: -inf where the gate is closed."""
    return np.where(gates > 0, row, np.float32(-np.inf))


def active(row: np.ndarray, theta, pool=None) -> list[int]:
    limit = np.zeros(len(row), np.float32) if theta is None else theta.numpy()
    return [j for j in range(len(row)) if row[j] > limit[j] and (pool is None or pool[j])]


def top_k(row: np.ndarray, k: int, theta=None, pool=None) -> list[tuple[int, float]]:
    order = sorted(active(row, theta, pool), key=lambda j: (-row[j], j))
    return [(j, float(row[j])) for j in order[:k]]


def rows(codes: ops.SparseCodes) -> list[list[tuple[int, float]]]:
    """Codes as lists, after checking that unused slots are marked as such."""
    listed = []
    for values, indices, count in zip(
        codes.values.tolist(), codes.indices.tolist(), codes.counts.tolist(), strict=True
    ):
        assert set(indices[count:]) <= {-1}
        assert set(values[count:]) <= {0.0}
        listed.append(list(zip(indices[:count], values[:count], strict=True)))
    return listed


def assert_same(a: ops.SparseCodes | None, b: ops.SparseCodes | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)


def nearest_float32(exact: Fraction) -> np.float32:
    """Round once, ties to even."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(s) * np.float32(np.inf)) for s in (-1, 1)]
    best = min(abs(Fraction(float(c)) - exact) for c in (guess, *around))
    ties = [c for c in (guess, *around) if abs(Fraction(float(c)) - exact) == best]
    return min(ties, key=lambda c: int(np.asarray(c).view(np.uint32)) & 1)


def decode_row(pairs: list[tuple[int, float]], W_dec, b_dec) -> np.ndarray:
    out = np.zeros(W_dec.shape[1], np.float32)
    for j, value in pairs:
        for i, w in enumerate(W_dec[j].double().tolist()):
            out[i] = nearest_float32(Fraction(value) * Fraction(w) + Fraction(float(out[i])))
    return out if b_dec is None else out + b_dec.numpy()


def log_softmax(row: np.ndarray) -> tuple[np.ndarray, float]:
    with np.errstate(divide="ignore"):
        top = row.max()
        lse = top + np.log(np.exp(row - top).sum())
        return row - lse, lse


def capped(row: np.ndarray, softcap: float | None) -> np.ndarray:
    return row if not softcap else softcap * np.tanh(row / softcap)


def bits(gold: float | np.ndarray, alpha: float, size: int) -> float:
    with np.errstate(divide="ignore"):
        return float(-np.log2((1 - alpha) * np.exp(gold) + alpha / size))


def random_encoder(seed: int, tokens: int, d_in: int, d_sae: int, dtype=torch.float32):
    """A random encoder with a bias, factors of both signs, thresholds and a pool."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=g)
    W = (torch.randn(d_sae, d_in, generator=g) / d_in**0.5).to(dtype)
    bias = 0.1 * torch.randn(d_sae, generator=g)
    scale = 0.5 + torch.rand(d_sae, generator=g)
    scale[::7] *= -1
    theta = torch.rand(d_sae, generator=g) - 0.2
    pool = torch.rand(d_sae, generator=g) < 0.3
    return x, W, bias, scale, theta, pool
