"""What the forwards of a thread or task belong to: one request, its token ids and its padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_certify.errors import CertifyError


@dataclass
class Scope:
    """What the user said about the request that is being served.

    Attributes:
        tokens: Token ids of its first forward, where known.
        mask: Which positions of that are real; None: all.
        forwards: Forwards of the request so far.
    """

    tokens: Int[Tensor, "batch pos"] | None = None
    mask: Bool[Tensor, "batch pos"] | None = None
    forwards: int = 0

    @classmethod
    def of(cls, tokens: Any, attention_mask: Any, continuation: bool) -> Scope:
        """Build a scope.

        Raises:
            CertifyError: If one cannot be made a tensor, a shape is not [batch, pos], or the two differ.
        """
        tokens = _as_tensor("tokens", tokens)
        attention_mask = _as_tensor("attention_mask", attention_mask)
        for name, given in (("tokens", tokens), ("attention_mask", attention_mask)):
            if given is not None and given.dim() != 2:
                raise CertifyError(f"{name} has shape {tuple(given.shape)}, not [batch, pos]")
        if tokens is not None and attention_mask is not None:
            shapes = tuple(tokens.shape), tuple(attention_mask.shape)
            if shapes[0] != shapes[1]:
                raise CertifyError(
                    f"tokens have shape {shapes[0]}, their attention_mask {shapes[1]}"
                )
        return cls(
            None if tokens is None else tokens.detach().cpu(),
            None if attention_mask is None else attention_mask.detach().cpu() != 0,
            int(continuation),
        )

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Check that a forward is the one that the scope describes.

        Raises:
            CertifyError: If it has another shape.
        """
        for name, given in (("tokens", self.tokens), ("attention_mask", self.mask)):
            if given is not None and given.shape != shape:
                raise CertifyError(
                    f"{name} of the request have shape {tuple(given.shape)}, the forward is of {shape}"
                )

    def lengths(self, shape: tuple[int, int]) -> Int[Tensor, " batch"]:
        """Number of real tokens of each sequence."""
        if self.mask is not None:
            return self.mask.sum(dim=1)
        return torch.full(shape[:1], shape[1], dtype=torch.int64, device="cpu")

    def without(self, first_token: int | None) -> int | None:
        """Count the sequences whose first real token is another; None where that is not known."""
        if self.tokens is None or first_token is None:
            return None
        firsts = self.tokens[:, 0]
        if self.mask is not None:
            begins = self.mask.to(torch.int8).argmax(dim=1, keepdim=True)
            firsts = self.tokens.gather(1, begins)[:, 0]
        return int((firsts != first_token).sum())


def _as_tensor(name: str, given: Any) -> Tensor | None:
    if given is None:
        return None
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CertifyError(
            f"{name} of the request must be [batch, pos], a tensor or rows of equal length, got "
            f"{type(given).__name__} ({error})"
        ) from None
