"""Features of like frequency: deciles of how often calibration saw them, and permutations within."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

N_GROUPS = 10


def frequency_groups(counts: Int[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """Divide features by the number of calibration tokens on which they were active.

    Args:
        counts: Number of tokens for each feature.

    Returns:
        0 for features that were never active, which form a group of their own: they differ from all others
        in what matters here. 1 to 10 for the deciles of the others. Features of one count are in one group,
        so groups may be of different sizes, or empty.
    """
    counts = counts.cpu()
    active = counts[counts > 0].sort().values
    if len(active) == 0:
        return torch.zeros_like(counts, dtype=torch.int64)
    # The largest count of each decile but the last.
    ranks = torch.arange(1, N_GROUPS, device="cpu")
    last = (ranks * len(active) + N_GROUPS - 1) // N_GROUPS - 1
    groups = 1 + torch.searchsorted(active[last], counts)
    return groups * (counts > 0)


def permutation_within(
    groups: Int[Tensor, " d_sae"], generator: torch.Generator
) -> Int[Tensor, " d_sae"]:
    """Draw a permutation, all that keep every feature in its group being equally likely.

    Args:
        groups: Group of each feature.
        generator: Where randomness comes from.

    Returns:
        int64; the only feature of a group stays where it is.
    """
    permutation = torch.arange(len(groups), device=groups.device)
    for group in groups.unique().tolist():
        members = (groups == group).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        permutation[members] = members[order]
    return permutation


def n_movable(groups: Int[Tensor, " d_sae"]) -> int:
    """Number of features that are not the only ones of their group."""
    sizes = torch.bincount(groups)
    return int((sizes[groups] > 1).sum())
