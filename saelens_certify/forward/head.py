"""The model's head, where it is nothing but a matrix, a bias and perhaps a softcap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PlainHead:
    """Logits are ``residual @ W_U + b_U``, soft-capped if there is a cap.

    Attributes:
        W_U: Weights, float32, any strides.
        b_U: Bias.
        softcap: Cap of the logits, if any.
    """

    W_U: Float[Tensor, "d_model d_vocab_out"]
    b_U: Float[Tensor, " d_vocab_out"]
    softcap: float | None

    def logits(self, residual: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens V"]:
        """Compute logits from a normalised residual; for comparisons on a few tokens."""
        logits = torch.addmm(self.b_U, residual, self.W_U)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def plain_head(model: Any) -> PlainHead | None:
    """Return the model's head if calling it computes nothing else.

    Anything attached to the unembedding (hooks, a replaced forward, a subclass) makes the answer
    None, and so do 16-bit weights: there the model's own rounded logits are the prediction.
    """
    unembed = model.unembed
    inner = getattr(unembed, "original_component", None)
    if not _is_plain(unembed, ("Unembed", "UnembeddingBridge")):
        return None
    if inner is not None and not (type(inner) is torch.nn.Linear and _is_plain(inner, ("Linear",))):
        return None
    try:
        W_U, b_U = unembed.W_U, unembed.b_U
    except (AttributeError, AssertionError, RuntimeError):
        return None
    if not (isinstance(W_U, Tensor) and isinstance(b_U, Tensor)):
        return None
    shapes_fit = W_U.dim() == 2 and b_U.shape == W_U.shape[1:]
    if not shapes_fit or {W_U.dtype, b_U.dtype} != {torch.float32}:
        return None
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return PlainHead(W_U.detach(), b_U.detach(), float(cap) if cap and cap > 0 else None)


def _is_plain(module: torch.nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module is of the named class, with the class's forward and nothing attached."""
    if type(module).__name__ not in names or "forward" in vars(module):
        return False
    parts = [module, *(vars(module).get("_modules") or {}).values()]
    attached = (
        "_forward_hooks", "_forward_pre_hooks", "fwd_hooks", "bwd_hooks"
    )  # fmt: skip
    return not any(getattr(part, name, None) for part in parts for name in attached)
