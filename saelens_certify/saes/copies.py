"""Copies of an SAE to compute with, so that nobody else sees what its methods leave on it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch


def working_copy(sae: Any) -> Any:
    """Return an SAE that shares the weights and nothing else.

    SAELens's methods keep norms, means and head sizes on the module; here they stay on the copy. It has none
    of the hooks that were attached to the SAE, and takes heads of ``hook_z`` that are already joined.

    Args:
        sae: A SAELens SAE; it is not changed.
    """
    working = copy.copy(sae)
    working._modules = {name: _without_hooks(module) for name, module in sae._modules.items()}
    return _set_up(working)


def float32_copy(sae: Any) -> Any:
    """Return an SAE with the same weights in float32, that computes in float32; see `working_copy`."""
    working = working_copy(copy.deepcopy(sae))
    return working.to(dtype=torch.float32)


def _set_up(sae: Any) -> Any:
    # SAELens stores these as functions that are bound to the object that they were made for.
    if hasattr(sae, "_setup_activation_normalization"):
        sae._setup_activation_normalization()
    if getattr(sae, "hook_z_reshaping_mode", False):
        sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def _without_hooks(module: Any) -> Any:
    if not hasattr(module, "fwd_hooks"):
        return module
    bare = copy.copy(module)
    bare.fwd_hooks, bare.bwd_hooks = [], []
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(bare, name, OrderedDict())
    return bare
