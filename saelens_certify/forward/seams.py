"""Running part of a model: up to a block, or from a block on.

TransformerLens's two model classes differ only here. `HookedTransformer` restarts at a block by itself;
on a `TransformerBridge` the blocks before the restart are made to pass their input through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.forward.hooks import known_hooks

Hook = tuple[str, Callable[..., Tensor | None]]


class Seams(Protocol):
    """What the engine needs from a model class."""

    def to_block(
        self, tokens: Int[Tensor, "batch pos"], stop: int, hooks: Sequence[Hook]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the embedding and blocks ``0 .. stop - 1``; return the residual after them."""
        ...

    def from_block(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        start: int,
        tokens: Int[Tensor, "batch pos"],
        hooks: Sequence[Hook],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run blocks ``start ..`` on a residual; return the residual after the last."""
        ...

    def logits(
        self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook]
    ) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Run the whole model as the user would."""
        ...


def seams_of(model: Any) -> Seams:
    """Choose by what the model can do, never by its class.

    Raises:
        CertifyError: If the object is no TransformerLens model.
    """
    for needed in ("run_with_hooks", "hook_dict", "cfg", "blocks", "unembed"):
        if not hasattr(model, needed):
            raise CertifyError(
                f"{type(model).__name__} has no {needed!r}; pass a HookedTransformer, "
                "HookedSAETransformer, TransformerBridge or SAETransformerBridge"
            )
    if hasattr(model, "original_model"):
        return _BridgeSeams(model)
    return _HookedSeams(model)


class _HookedSeams:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._n_layers = int(model.cfg.n_layers)

    def to_block(self, tokens: Tensor, stop: int, hooks: Sequence[Hook]) -> Tensor:
        return self._model.run_with_hooks(
            tokens, stop_at_layer=stop, fwd_hooks=list(hooks), prepend_bos=False
        )

    def from_block(
        self, residual: Tensor, start: int, tokens: Tensor, hooks: Sequence[Hook]
    ) -> Tensor:
        return self._model.run_with_hooks(
            residual,
            start_at_layer=start,
            stop_at_layer=self._n_layers,
            fwd_hooks=list(hooks),
            tokens=tokens,
        )

    def logits(self, tokens: Tensor, hooks: Sequence[Hook]) -> Tensor:
        return self._model.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Carries the residual out of a forward pass whose remainder is not wanted."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


class _BridgeSeams:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._blocks = list(model.blocks)
        self._names = known_hooks(model)
        # Hugging Face blocks return a tensor or a tuple, by architecture; learned from a real pass.
        self._tuple_length: list[int | None] | None = None

    def to_block(self, tokens: Tensor, stop: int, hooks: Sequence[Hook]) -> Tensor:
        return self._run_until(tokens, stop, hooks)

    def from_block(
        self, residual: Tensor, start: int, tokens: Tensor, hooks: Sequence[Hook]
    ) -> Tensor:
        def inject(_activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - TL's hook signature
            return residual

        with self._passing_through(start):
            return self._run_until(
                tokens, len(self._blocks), [(f"blocks.{start}.hook_in", inject), *hooks]
            )

    def logits(self, tokens: Tensor, hooks: Sequence[Hook]) -> Tensor:
        return self._model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=self._resolved(hooks)
        )

    def _resolved(self, hooks: Sequence[Hook]) -> list[Hook]:
        return [(self._names.get(name, name), function) for name, function in hooks]

    def _run_until(self, tokens: Tensor, stop: int, hooks: Sequence[Hook]) -> Tensor:
        def leave(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - TL's hook signature
            raise _StopForward(activation)

        # TransformerLens stops before a block; after the last one only an exception does.
        last = stop == len(self._blocks)
        name = f"blocks.{stop - 1}.hook_out" if last else f"blocks.{stop}.hook_in"
        try:
            self._model.run_with_hooks(
                tokens,
                return_type=None,
                fwd_hooks=[*self._resolved(hooks), (name, leave)],
                use_cache=False,
            )
        except _StopForward as stopped:
            return stopped.residual
        raise CertifyError(f"hook {name} did not fire: the model does not run its blocks in order")

    @contextmanager
    def _passing_through(self, start: int) -> Iterator[None]:
        """Make blocks ``0 .. start - 1`` return their input unchanged."""
        lengths = self._output_forms()
        try:
            for block, length in zip(self._blocks[:start], lengths[:start], strict=True):
                # Attribute assignment is delegated to the wrapped Hugging Face block (and recurses):
                # the instance dictionary is the seam.
                block.__dict__["forward"] = _pass_through(length)
            yield
        finally:
            for block in self._blocks[:start]:
                block.__dict__.pop("forward", None)

    def _output_forms(self) -> list[int | None]:
        if self._tuple_length is None:
            forms: list[int | None] = []

            def note(_module: Any, _args: Any, output: Any) -> None:
                forms.append(len(output) if isinstance(output, tuple) else None)

            handles = [block.register_forward_hook(note) for block in self._blocks]
            try:
                device = next(self._model.parameters()).device
                self._model(
                    torch.zeros((1, 2), dtype=torch.int64, device=device),
                    return_type=None,
                    use_cache=False,
                )
            finally:
                for handle in handles:
                    handle.remove()
            self._tuple_length = forms
        return self._tuple_length


def _pass_through(length: int | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if length is None else (hidden, *[None] * (length - 1))

    return forward
