"""Calling a SAELens SAE without leaving a trace on it.

``encode`` and ``decode`` keep what they need of each other on the module (``ln_mu``, ``x_norm_coeff``,
``d_head``, ``reshape_fn_in``), and an exception in between leaves it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def borrowed(sae: Any, *, flat_heads: bool = False) -> Iterator[Any]:
    """Use an SAE; its attributes are what they were when the block ends, also when it raises.

    Args:
        sae: A SAELens SAE.
        flat_heads: Whether an SAE on ``hook_z`` is to take and return heads that are already
            joined, ``[..., n_heads * d_head]``.

    Yields:
        The SAE itself.
    """
    before = dict(vars(sae))
    try:
        if flat_heads and getattr(sae, "hook_z_reshaping_mode", False):
            sae.turn_off_forward_pass_hook_z_reshaping()
        with torch.no_grad():
            yield sae
    finally:
        vars(sae).clear()
        vars(sae).update(before)
