"""How forward passes are run: tried out on real tokens before a run."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.forward.engine import ForwardEngine, Strategy
from saelens_certify.forward.head import plain_head

# Largest difference of logits, relative to their spread, that is still rounding.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def choose_strategy(model: Any, tokens: Int[Tensor, "batch pos"], hook: str) -> Strategy:
    """Compare suffix passes and both forms of the head with whole forwards on real tokens.

    The activation at the hook is scaled by 0.9, so that a suffix which ignored its input would be
    seen.

    Args:
        model: The model.
        tokens: A few real sequences.
        hook: The hook that will be patched.

    Returns:
        The fastest strategy whose logits differ from the whole forward's by no more than rounding.

    Raises:
        CertifyError: If two passes over the same tokens differ.
    """
    engine = ForwardEngine(model)
    tolerance = _ROUNDING.get(engine.dtype, 1e-4)
    base = engine.base(tokens, [hook], [hook])
    repeated = engine.base(tokens, [hook]).final
    if _relative_difference(repeated, base.final) > tolerance:
        raise CertifyError(
            "the model computes something else every time (dropout in training mode?), so there is no "
            "frozen model to certify; call model.eval()"
        )
    changed = base.activations[hook] * 0.9
    rows = torch.arange(tokens.shape[0], device=base.tokens.device)
    fast = engine.patched(base, rows, hook, changed)
    everything = slice(0, tokens.shape[0])
    whole = ForwardEngine(model, Strategy(suffix=False, chunked_head=False))
    patched = whole.patched(base, rows, hook, changed)
    expected = whole.logits(patched, everything)
    head_only = engine.logits(patched, everything)
    head_difference = _relative_difference(head_only, expected)
    head = plain_head(model)
    fused_difference = None
    if head is not None:
        fused = head.logits(engine.head_input(patched.residual))
        fused_difference = _relative_difference(fused, expected)
    suffix_difference = _relative_difference(engine.logits(fast, everything), head_only)
    strategy = Strategy(
        suffix=suffix_difference <= tolerance,
        chunked_head=head_difference <= tolerance,
        fused_head=fused_difference is not None and fused_difference <= tolerance,
        suffix_difference=suffix_difference,
        head_difference=head_difference,
        fused_difference=fused_difference,
    )
    if not (strategy.suffix and strategy.chunked_head):
        warnings.warn(
            f"{type(model).__name__} at {hook}: partial forwards differ from whole ones (suffix "
            f"{suffix_difference:.1e}, head {head_difference:.1e} of the logits' spread); whole "
            "forwards are used, which are slower but right",
            stacklevel=2,
        )
    return strategy


def _relative_difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    spread = b.double().std().clamp_min(1e-12)
    return float((a.double() - b.double()).abs().max() / spread)
