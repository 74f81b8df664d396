"""The selection that SAELens itself makes: dense scores in the SAE's own type, then ``torch.topk``.

For replicating published numbers. Near ties depend on the machine, the batch size and the layout
of the weights, as they do in SAELens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelens_certify.ops.reference.encode import Encoder, in_pool, padded

_CHUNK_BYTES = 1 << 28


def _activations(x: Tensor, encoder: Encoder, relu: bool = True) -> Tensor:
    """Dense activations, zero where a feature is not active (or scores, where only ReLU follows)."""
    dtype = encoder.W.dtype
    product = x.to(dtype) @ encoder.W.t()
    if encoder.scale is None:
        score = product + encoder.bias.to(dtype)
    elif encoder.gate_bias is None:
        score = (product + encoder.bias.to(dtype)) * encoder.scale.to(dtype)
    else:  # a gated SAE scales its weights, and multiplies once more
        magnitude = x.to(dtype) @ (encoder.W * encoder.scale.to(dtype)[:, None]).t()
        score = magnitude + (encoder.bias * encoder.scale).to(dtype)
    if not relu and encoder.theta is None and encoder.gate_bias is None:
        return score
    active = score > (0 if encoder.theta is None else encoder.theta.to(dtype))
    if encoder.gate_bias is not None:
        active &= product + encoder.gate_bias.to(dtype) > 0
    return torch.where(active, score, 0)


def _chunks(x: Tensor, encoder: Encoder) -> tuple[Tensor, ...]:
    rows = max(1, _CHUNK_BYTES // (encoder.W.shape[0] * encoder.W.element_size()))
    return x.split(rows)


def topk_as_sae_lens(
    x: Tensor, encoder: Encoder, k: int, pool_bits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest positive activations of every row, of the pool's features if one is given."""
    k = min(k, encoder.W.shape[0])
    member = None
    if pool_bits is not None:
        member = in_pool(pool_bits, torch.arange(encoder.W.shape[0], device=x.device))
    found = []
    for part in _chunks(x, encoder):
        # SAELens ranks before its ReLU; ties depend on that too.
        dense = _activations(part, encoder, relu=False)
        if member is not None:
            dense = torch.where(member, dense, 0)
        # The very call that SAELens makes (ties depend on it); only then put in order.
        values, indices = dense.topk(k, dim=1, sorted=False)
        values, order = values.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
        used = values > 0
        found.append(
            (values.float(), torch.where(used, indices, -1).int(), used.sum(1, dtype=torch.int32))
        )
    values, indices, counts = (torch.cat(column) for column in zip(*found, strict=True))
    return values.clamp(min=0), indices, counts


def threshold_as_sae_lens(x: Tensor, encoder: Encoder) -> list[Tensor]:
    """All active features of every row, index ascending."""
    rows, columns, values, first = [], [], [], 0
    for part in _chunks(x, encoder):
        dense = _activations(part, encoder)
        at, column = (dense != 0).nonzero(as_tuple=True)
        rows.append(at + first)
        columns.append(column.int())
        values.append(dense[at, column].float())
        first += len(part)
    row = torch.cat(rows)
    lists = padded(row, x.shape[0], (torch.cat(values), 0.0), (torch.cat(columns), -1))
    return [*lists, torch.bincount(row, minlength=x.shape[0]).int()]
