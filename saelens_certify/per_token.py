"""From values of the coded tokens to one value per sequence."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from saelens_certify.ops import SparseCodes

NO_FEATURE = 2**53
"""Stands for the calibration count where no feature is active: above every count."""


class PerToken:
    """Per-token values of the coded positions, laid out by sequence and position.

    Args:
        coded: Coded positions.
        length: Only the first so many positions count in means; None: all.
    """

    def __init__(self, coded: Bool[Tensor, "batch pos"], length: int | None = None) -> None:
        self.coded = coded
        self.length = length

    def __call__(self, values: Tensor) -> Tensor:
        """Put values of the coded tokens at their places [batch, pos]; 0 elsewhere."""
        out = torch.zeros(self.coded.shape, dtype=values.dtype, device=values.device)
        out[self.coded] = values
        return out

    def mean(self, values: Tensor, first: bool = True) -> NDArray[np.float64]:
        """Mean over the coded positions of each sequence, float64; 0 where there are none."""
        return self.mean_placed(self(values.double()), first)

    def mean_placed(
        self, placed: Float64[Tensor, "batch pos"], first: bool = True
    ) -> NDArray[np.float64]:
        """As `mean`, of values at their places."""
        counted = slice(0 if first else 1, self.length)
        placed, weight = placed[:, counted], self.coded[:, counted].double()
        return (placed.sum(dim=1) / weight.sum(dim=1).clamp(min=1)).cpu().numpy()


def rarest(
    counts: Int[Tensor, " d_sae"] | None, features: SparseCodes, per_token: PerToken
) -> dict[str, NDArray[np.float64]]:
    """Smallest calibration count among the features active in each sequence; `NO_FEATURE` without any."""
    if counts is None:
        return {}
    of_slot = counts.to(features.device)[features.indices.clamp(min=0).long()]
    of_slot = of_slot.masked_fill(~features.used(), NO_FEATURE)
    shape = per_token.coded.shape
    of_position = torch.full(shape, NO_FEATURE, dtype=torch.int64, device=features.device)
    if features.slots:
        of_position[per_token.coded] = of_slot.amin(dim=1)
    return {"rarest": of_position[:, : per_token.length].amin(dim=1).double().cpu().numpy()}
