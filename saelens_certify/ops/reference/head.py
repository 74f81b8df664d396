"""Statistics of the predictions of a linear head in plain torch: tiles of logits, float64 sums."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from saelens_certify.ops.reference.statistics import (
    capped,
    first_argmax,
    gap_bits,
    smoothed_bits,
)

_ROW_CHUNK = 128
_COLUMN_TILE = 2048


class _Running:
    """Softmax sums of some rows over the tiles seen so far."""

    def __init__(self, targets: Tensor) -> None:
        def filled(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full(targets.shape, value, dtype=dtype, device=targets.device)

        self.targets = targets
        self.top, self.sum, self.gold = filled(-torch.inf), filled(0), filled(torch.nan)
        self.best, self.argmax = filled(-torch.inf, torch.float32), filled(0, torch.int32)
        self.factor = filled(1)

    def add(self, logits: Tensor, wide: Tensor, first: int) -> Tensor:
        """Add a tile and return its weights; what was summed before is worth ``factor`` now."""
        best, column = logits.amax(1), first_argmax(logits) + first
        higher = best > self.best
        self.best = torch.where(higher, best, self.best)
        self.argmax = torch.where(higher, column, self.argmax)
        top = torch.maximum(self.top, wide.amax(1))
        shift = torch.where(top == -torch.inf, 0.0, top)
        # Before the first finite logit there is nothing to scale.
        self.factor = torch.where(self.sum == 0, 1.0, (self.top - shift).exp())
        weights = (wide - shift.unsqueeze(1)).exp()
        self.sum = self.sum * self.factor + weights.sum(1)
        self.top = top
        at = (self.targets - first).clamp(0, wide.shape[1] - 1).unsqueeze(1)
        here = (self.targets >= first) & (self.targets < first + wide.shape[1])
        self.gold = torch.where(here, wide.gather(1, at).squeeze(1), self.gold)
        return weights

    def lse(self) -> Tensor:
        lse = self.top + self.sum.log()
        return torch.where(torch.isfinite(lse), lse, torch.nan)


class _Tile:
    """Some columns of the head."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float, columns: slice) -> None:
        self.first = columns.start
        self._weight = weight[:, columns].float()
        self._bias = None if bias is None else bias[columns]
        self._softcap = softcap

    def logits(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as they are, and in float64 with the cap."""
        logits = residual.float() @ self._weight
        if self._bias is not None:
            logits += self._bias
        return logits, capped(logits, self._softcap)


def _tiles(
    weight: Tensor, bias: Tensor | None, softcap: float, d_vocab: int, column_tile: int
) -> Iterator[_Tile]:
    step = column_tile or _COLUMN_TILE
    for first in range(0, d_vocab, step):
        yield _Tile(weight, bias, softcap, slice(first, min(first + step, d_vocab)))


def head_stats(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
    column_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As token_stats of ``residual @ weight + bias``."""
    double = {"dtype": torch.float64, "device": residual.device}
    bits, lse, gold = (torch.empty(residual.shape[0], **double) for _ in range(3))
    argmax = torch.empty(residual.shape[0], dtype=torch.int32, device=residual.device)
    for start in range(0, residual.shape[0], _ROW_CHUNK):
        rows = slice(start, start + _ROW_CHUNK)
        running = _Running(targets[rows])
        for tile in _tiles(weight, bias, softcap, d_vocab, column_tile):
            running.add(*tile.logits(residual[rows]), tile.first)
        lse[rows] = running.lse()
        gold[rows] = running.gold - lse[rows]
        bits[rows] = smoothed_bits(gold[rows], alpha, d_vocab)
        argmax[rows] = running.argmax
    return bits, lse, gold, argmax


def head_pair_stats(
    base_residual: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
    column_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As pair_stats of the logits; ``residual`` may hold several variants of the base's tokens."""
    n_tokens = base_residual.shape[0]
    double = {"dtype": torch.float64, "device": residual.device}
    bits_base, bits, kl, gap = (torch.empty(residual.shape[0], **double) for _ in range(4))
    agree = torch.empty(residual.shape[0], dtype=torch.bool, device=residual.device)
    for start in range(0, n_tokens, _ROW_CHUNK):
        stop = min(start + _ROW_CHUNK, n_tokens)
        part = slice(start, stop)
        base = _Running(targets[part])
        starts = range(0, residual.shape[0], n_tokens)
        rows = [slice(variant + start, variant + stop) for variant in starts]
        others = [_Running(targets[part]) for _ in rows]
        differences = [torch.zeros(stop - start, **double) for _ in rows]
        for tile in _tiles(weight, bias, softcap, d_vocab, column_tile):
            p_logits, p = tile.logits(base_residual[part])
            weights = base.add(p_logits, p, tile.first)
            for v, each in enumerate(rows):
                q_logits, q = tile.logits(residual[each])
                others[v].add(q_logits, q, tile.first)
                # As in pair_stats: what only the other masks makes the divergence infinite.
                terms = torch.where(q == -torch.inf, torch.inf, weights * (p - q))
                terms = torch.where(p == -torch.inf, 0.0, terms).sum(1)
                # Once infinite, it stays so, however far earlier tokens fall behind.
                before = differences[v]
                scaled = torch.where(before == torch.inf, before, before * base.factor)
                differences[v] = scaled + terms
        for each, other, difference in zip(rows, others, differences, strict=True):
            lse_base, lse = base.lse(), other.lse()
            gold_base, gold = base.gold - lse_base, other.gold - lse
            bits_base[each] = smoothed_bits(gold_base, alpha, d_vocab)
            bits[each] = smoothed_bits(gold, alpha, d_vocab)
            nats = difference / base.sum - (lse_base - lse)
            kl[each] = (nats / math.log(2)).clamp(min=0)
            agree[each] = base.argmax == other.argmax
            gap[each] = gap_bits(gold_base, gold)
    return bits_base, bits, kl, agree, gap
