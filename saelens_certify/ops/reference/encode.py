"""Exact sparse encoding in plain torch: screen with float32 tiles, then score exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saelens_certify.ops.margin import OUTER_ROUNDINGS, underflow
from saelens_certify.ops.reference.lanes import lane_sum

ROW_CHUNK = 256
COLUMN_TILE = 4096
# Pairs scored at a time: few enough that torch adds their lanes without starting threads.
_PAIRS_CPU = 512
_PAIR_BYTES_OTHER = 1 << 28


@dataclass(frozen=True)
class Encoder:
    """Inputs of one encoding call.

    Attributes:
        W: Weights [d_sae, d_in].
        bias: Bias [d_sae].
        scale: Factor of each score, or None.
        theta: Threshold of each score, or None for 0.
        gate_bias: Bias of the second condition of a gated SAE, or None.
        norms: Upper bounds on the row norms of W.
        gemm_error: Relative error bound of the matrix product.
    """

    W: Tensor
    bias: Tensor
    scale: Tensor | None
    theta: Tensor | None
    gate_bias: Tensor | None
    norms: Tensor
    gemm_error: float

    def scores(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Canonical scores of (row, column) pairs, -inf where the feature is not active."""
        out = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        step = _PAIRS_CPU
        if x.device.type != "cpu":
            step = max(step, _PAIR_BYTES_OTHER // (8 * max(1, x.shape[1])))
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            at = columns[part]
            # Products of float32 numbers are exact in float64: adding them is a fused multiply-add.
            products = lane_sum(x[rows[part]].double().mul_(self.W[at]))
            total = products + self.bias[at].double()
            if self.scale is not None:
                total = total * self.scale[at].double()
            score = total.float()
            active = score > (0 if self.theta is None else self.theta[at])
            if self.gate_bias is not None:
                active &= (products + self.gate_bias[at].double()).float() > 0
            out[part] = torch.where(active, score, -torch.inf)
        return out

    def tiles(self, x: Tensor, width: int) -> Iterator[_Tile]:
        """Screened scores of each column tile, with their margins."""
        x_norm = x.double().square().sum(1).sqrt()
        relative = ((self.gemm_error + OUTER_ROUNDINGS) * x_norm).unsqueeze(1)
        absolute = (underflow(x.shape[1]) * (1 + x_norm)).unsqueeze(1)
        product = torch.empty(x.shape[0] * width, dtype=torch.float32, device=x.device)
        for start in range(0, self.W.shape[0], width):
            part = slice(start, min(start + width, self.W.shape[0]))
            columns = part.stop - part.start
            screened = product[: x.shape[0] * columns].view(x.shape[0], columns)
            # An output tensor keeps autocast from narrowing the product.
            torch.mm(x, self.W[part].float().t(), out=screened)
            norms = self.norms[part].double()
            gate = None
            if self.gate_bias is not None:
                offset = self._offset(self.gate_bias[part], norms, x.shape[1])
                gate = (
                    screened + self.gate_bias[part],
                    _rounded_up(relative * norms + offset + 2 * absolute),
                )
            screened += self.bias[part]
            offset = self._offset(self.bias[part], norms, x.shape[1])
            if self.scale is None:
                margins = relative * norms + offset + absolute
            else:
                screened *= self.scale[part]
                size = self.scale[part].double().abs()
                margins = relative * (norms * size) + offset * size + absolute * (1 + size)
            theta = torch.zeros((), dtype=torch.float32, device=x.device).expand(columns)
            if self.theta is not None:
                theta = self.theta[part]
            yield _Tile(start, screened, _rounded_up(margins), theta, gate)

    @staticmethod
    def _offset(bias: Tensor, norms: Tensor, d_in: int) -> Tensor:
        return OUTER_ROUNDINGS * bias.double().abs() + underflow(d_in) * norms


def _rounded_up(margins: Tensor) -> Tensor:
    return (margins * (1 + 2.0**-20)).float()


@dataclass(frozen=True)
class _Tile:
    """Screened scores of some columns, for all rows of a chunk.

    Attributes:
        start: First column.
        screened: Scores.
        margins: How far they can lie from the exact ones.
        theta: Thresholds of the columns.
        gate: Screened gates and their margins, if there is a gate.
    """

    start: int
    screened: Tensor
    margins: Tensor
    theta: Tensor
    gate: tuple[Tensor, Tensor] | None

    def possible(self) -> Tensor:
        """Where a feature may be active."""
        may_be = self.screened + self.margins > self.theta
        return may_be if self.gate is None else may_be & (self.gate[0] + self.gate[1] > 0)

    def lower(self) -> Tensor:
        """Lower bounds on the scores of certainly active features, -inf elsewhere."""
        lower = self.screened - self.margins
        certain = lower > self.theta
        if self.gate is not None:
            certain &= self.gate[0] - self.gate[1] > 0
        return torch.where(certain, lower, -torch.inf)


def in_pool(pool_bits: Tensor, columns: Tensor) -> Tensor:
    """Whether each of these features is in the pool."""
    return ((pool_bits[columns >> 5] >> (columns & 31)) & 1).bool()


def padded(rows: Tensor, n_rows: int, *payload: tuple[Tensor, float]) -> list[Tensor]:
    """Turn row-sorted lists into [n_rows, longest] arrays filled up on the right."""
    counts = torch.bincount(rows, minlength=n_rows)
    longest = int(counts.max()) if n_rows else 0
    first = counts.cumsum(0) - counts
    slot = torch.arange(rows.shape[0], device=rows.device) - first[rows]
    arrays = []
    for values, fill in payload:
        array = torch.full((n_rows, longest), fill, dtype=values.dtype, device=values.device)
        array[rows, slot] = values
        arrays.append(array)
    return arrays


class _Best:
    """The exact top k of every row among the columns seen so far, ties to the lowest index."""

    def __init__(self, n_rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self.values = torch.full((n_rows, k), -torch.inf, dtype=torch.float32, device=device)
        self.indices = torch.full((n_rows, k), -1, dtype=torch.int64, device=device)

    @property
    def worst(self) -> Tensor:
        return self.values[:, -1:]

    def merge(self, values: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add scored columns; they must be sorted by row, then column, after all seen columns."""
        new_values, new_indices = padded(
            rows, self.values.shape[0], (values, -torch.inf), (columns, -1)
        )
        # Columns arrive in ascending order, so a stable sort leaves ties to the lowest index.
        joined = torch.cat([self.values, new_values], 1)
        self.values, order = joined.sort(dim=1, descending=True, stable=True)
        self.values = self.values[:, : self.k]
        order = order[:, : self.k]
        self.indices = torch.cat([self.indices, new_indices], 1).gather(1, order)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        used = self.values > -torch.inf
        return (
            self.values.where(used, torch.zeros_like(self.values)),
            torch.where(used, self.indices, -1).int(),
            used.sum(1).int(),
        )


def topk_encode(
    x: Tensor,
    encoder: Encoder,
    k: int,
    pool_bits: Tensor | None,
    row_chunk: int | None,
    column_tile: int | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The k largest active features of every row, and the k largest among the pool's.

    Returns:
        Values, indices and counts over all features; the same over the pool, if there is one.
    """
    slots = min(k, encoder.W.shape[0])
    rows = row_chunk or ROW_CHUNK
    everything, pooled = [], []
    for start in range(0, x.shape[0], rows):
        best = _topk_rows(
            x[start : start + rows], encoder, slots, pool_bits, column_tile or COLUMN_TILE
        )
        everything.append(best[0].result())
        pooled.append(best[-1].result())
    empty = _Best(0, slots, x.device).result()

    def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [torch.cat(column) for column in zip(empty, *parts, strict=True)]

    return joined(everything), None if pool_bits is None else joined(pooled)


def _topk_rows(
    x: Tensor, encoder: Encoder, slots: int, pool_bits: Tensor | None, width: int
) -> list[_Best]:
    lists = [_Best(x.shape[0], slots, x.device) for _ in range(1 if pool_bits is None else 2)]
    for tile in encoder.tiles(x, width):
        columns = torch.arange(tile.start, tile.start + tile.screened.shape[1], device=x.device)
        members = [None] if pool_bits is None else [None, in_pool(pool_bits, columns)]
        possible, lower = tile.possible(), tile.lower()
        upper = tile.screened + tile.margins
        wanted = torch.zeros_like(possible)
        for best, member in zip(lists, members, strict=True):
            floor = best.worst
            if lower.shape[1] >= slots:
                sure = lower if member is None else torch.where(member, lower, -torch.inf)
                floor = torch.maximum(floor, sure.topk(slots, dim=1).values[:, -1:])
            mask = possible & (upper >= floor)
            wanted |= mask if member is None else mask & member
        rows, at = wanted.nonzero(as_tuple=True)
        column = columns[at]
        values = encoder.scores(x, rows, column)
        active = values > -torch.inf
        for best, member in zip(lists, members, strict=True):
            keep = active if member is None else active & member[at]
            best.merge(values[keep], rows[keep], column[keep])
    return lists


def threshold_encode(
    x: Tensor, encoder: Encoder, row_chunk: int | None, column_tile: int | None
) -> list[Tensor]:
    """All active features of every row, index ascending.

    Returns:
        Values, indices and counts; as many slots as the busiest row needs.
    """
    step = row_chunk or ROW_CHUNK
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, x.shape[0], step):
        chunk = x[first : first + step]
        for tile in encoder.tiles(chunk, column_tile or COLUMN_TILE):
            rows, at = tile.possible().nonzero(as_tuple=True)
            values = encoder.scores(chunk, rows, at + tile.start)
            active = values > -torch.inf
            found.append((values[active], (at[active] + tile.start).int(), rows[active] + first))
    if not found:
        found = [(x.new_zeros(0), x.new_zeros(0, dtype=torch.int32), x.new_zeros(0).long())]
    values, columns, rows = (torch.cat(part) for part in zip(*found, strict=True))
    # Tiles of one row chunk come one after another: bring each row's columns together.
    order = rows.argsort(stable=True)
    slots = padded(rows[order], x.shape[0], (values[order], 0.0), (columns[order], -1))
    return [*slots, torch.bincount(rows, minlength=x.shape[0]).int()]
