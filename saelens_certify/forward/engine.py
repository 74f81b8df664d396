"""The frozen model as the measurement needs it: one base pass, cheap suffixes, logits in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.forward.head import PlainHead, plain_head
from saelens_certify.forward.hooks import HookSite, block_input, check_hook, locate
from saelens_certify.forward.seams import Hook, seams_of


@dataclass(frozen=True)
class Strategy:
    """How forward passes are run, decided once on real tokens and written into the manifest.

    Attributes:
        suffix: Whether a variant runs only the blocks after its hook. If not, every variant is a
            whole hooked forward.
        chunked_head: Whether the final norm and unembedding are applied to chunks of the residual.
            If not, logits come from the model's own forward on a few sequences at a time.
        fused_head: Whether statistics of predictions are computed from the normalised residual and
            the head's weights, so that no logits are kept. Only where the head is plain (see
            `plain_head`) and of float32.
        suffix_difference: Largest difference of logits between the two ways, relative to their
            standard deviation.
        head_difference: The same between the chunked head and the model's own logits.
        fused_difference: The same between the plain head and the model's own logits; None where
            there is no plain head.
    """

    suffix: bool = True
    chunked_head: bool = True
    fused_head: bool = False
    suffix_difference: float = 0.0
    head_difference: float = 0.0
    fused_difference: float | None = None

    @classmethod
    def right_for_all(cls, strategies: Sequence[Strategy]) -> Strategy:
        """Return the fastest strategy that is right at several hooks of one model."""
        fused = [each.fused_difference for each in strategies]
        known = [difference for difference in fused if difference is not None]
        return cls(
            suffix=all(each.suffix for each in strategies),
            chunked_head=all(each.chunked_head for each in strategies),
            fused_head=all(each.fused_head for each in strategies),
            suffix_difference=max(each.suffix_difference for each in strategies),
            head_difference=max(each.head_difference for each in strategies),
            fused_difference=max(known) if len(known) == len(fused) else None,
        )


@dataclass(frozen=True)
class BasePass:
    """One pass of the unchanged model over a batch.

    Attributes:
        tokens: Token ids, on the model's device.
        final: Residual after the last block.
        activations: Activation at each hook that was asked for, by hook name.
        block_inputs: Residual at the input of each block at which a suffix must restart, or that was
            asked for.
    """

    tokens: Int[Tensor, "batch pos"]
    final: Float[Tensor, "batch pos d_model"]
    activations: dict[str, Tensor]
    block_inputs: dict[int, Float[Tensor, "batch pos d_model"]]


@dataclass(frozen=True)
class FinalState:
    """What the logits of a (possibly patched) forward pass are computed from.

    Attributes:
        tokens: Token ids.
        residual: Residual after the last block.
        patch: Hook and activation put in place of the model's own, if any.
        block_inputs: Residual at the input of each block that was asked for.
    """

    tokens: Int[Tensor, "batch pos"]
    residual: Float[Tensor, "batch pos d_model"]
    patch: tuple[str, Tensor] | None = None
    block_inputs: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)


@dataclass
class ForwardEngine:
    """Runs a frozen TransformerLens model.

    The model's weights, hooks and settings are the same after every call as before it.

    Attributes:
        model: The model.
        strategy: How forward passes are run; see `choose_strategy`.
    """

    model: Any
    strategy: Strategy = field(default_factory=Strategy)

    def __post_init__(self) -> None:
        self._seams = seams_of(self.model)
        check_frozen(self.model)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def d_vocab(self) -> int:
        """The model's true vocabulary size V (a padded head may have more columns)."""
        return int(self.model.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where tokens go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's parameter dtype."""
        return next(self.model.parameters()).dtype

    @torch.inference_mode()
    def capture(self, tokens: Int[Tensor, "batch pos"], hooks: Iterable[str]) -> dict[str, Tensor]:
        """Run the model only as far as the deepest hook and return the hooks' activations.

        Args:
            tokens: Token ids.
            hooks: Hook names.

        Returns:
            Activations by hook name, ``[batch, pos, ...]``.

        Raises:
            CertifyError: If a hook does not fire.
        """
        names = sorted(set(hooks))
        for name in names:
            check_hook(self.model, name)
        caught: dict[str, Tensor] = {}
        stop = max(self._stop(locate(name)) for name in names)
        residual = self._seams.to_block(
            tokens.to(self.device), stop, [_catch(name, caught) for name in names]
        )
        self._note_boundary(names, stop, residual, caught)
        _check_fired(names, caught)
        return caught

    @torch.inference_mode()
    def base(
        self,
        tokens: Int[Tensor, "batch pos"],
        hooks: Iterable[str],
        restarts: Iterable[str] = (),
        blocks: Iterable[int] = (),
    ) -> BasePass:
        """Run the unchanged model once.

        Args:
            tokens: Token ids.
            hooks: Hooks whose activations are wanted.
            restarts: Hooks that will be patched: the block inputs their suffixes start from are
                kept.
            blocks: Further blocks whose inputs are wanted.

        Returns:
            Everything that the variants of this batch need.
        """
        names = sorted(set(hooks))
        sites = [locate(name) for name in set(restarts)]
        restarted = (s.restart for s in sites if not s.replaces_residual)
        inner = sorted({*(layer for layer in restarted if layer is not None), *blocks})
        for name in names:
            check_hook(self.model, name)
        caught: dict[str, Tensor] = {}
        inputs = [block_input(layer) for layer in inner]
        wanted = [*names, *(name for name in inputs if name not in names)]
        tokens = tokens.to(self.device)
        final = self._seams.to_block(
            tokens, self.n_layers, [_catch(name, caught) for name in wanted]
        )
        self._note_boundary(names, self.n_layers, final, caught)
        _check_fired(wanted, caught)
        return BasePass(
            tokens=tokens,
            final=final,
            activations={name: caught[name] for name in names},
            block_inputs={layer: caught[name] for layer, name in zip(inner, inputs, strict=True)},
        )

    @torch.inference_mode()
    def patched(
        self,
        base: BasePass,
        rows: Int[Tensor, " rows"],
        hook: str,
        activation: Float[Tensor, "rows pos ..."],
        blocks: Iterable[int] = (),
    ) -> FinalState:
        """Run what follows a hook after its activation was replaced.

        Args:
            base: The base pass of the batch.
            rows: Sequences of the batch, one for each replaced activation (repeats allowed: several
                variants of one sequence run in one call).
            hook: The hook whose activation is replaced.
            activation: The replacement, in any float dtype.
            blocks: Later blocks whose inputs are wanted.

        Returns:
            The state after the last block.
        """
        site = locate(hook)
        tokens = base.tokens[rows]
        activation = activation.to(base.activations[hook])
        put = (hook, _replace_with(activation))
        caught: dict[str, Tensor] = {}
        wanted = {layer: block_input(layer) for layer in blocks}
        catch = [_catch(name, caught) for name in wanted.values()]
        if not self.strategy.suffix or site.restart is None:
            residual = self._seams.to_block(tokens, self.n_layers, [put, *catch])
        elif not site.replaces_residual:
            before = base.block_inputs[site.restart]
            residual = self._seams.from_block(
                before[rows.to(before.device)], site.restart, tokens, [put, *catch]
            )
        elif site.restart == self.n_layers:
            residual = activation
        else:
            residual = self._seams.from_block(activation, site.restart, tokens, catch)
        inputs = {layer: caught[name] for layer, name in wanted.items()}
        return FinalState(tokens, residual, (hook, activation), inputs)

    @torch.inference_mode()
    def logits(self, state: FinalState, rows: slice) -> Float[Tensor, "tokens d_vocab_out"]:
        """Compute next-token logits of a few sequences, the last position left out.

        Args:
            state: A base or patched state.
            rows: Sequences; keep them few, this is the only place where logits exist.

        Returns:
            Logits of positions 0 .. L-2, sequence after sequence, in the model's dtype (float32 for
            float64 models).
        """
        if self.strategy.chunked_head:
            return _at_most_float32(self._head(state.residual[rows, :-1]))
        hooks: list[Hook] = []
        if state.patch is not None:
            hooks.append((state.patch[0], _replace_with(state.patch[1][rows])))
        logits = self._seams.logits(state.tokens[rows], hooks)
        return _at_most_float32(logits[:, :-1].flatten(0, 1))

    def plain_head(self) -> PlainHead | None:
        """Return the head to compute statistics with, or None if logits are to be used.

        Asked anew each time, so that what was attached to the unembedding meanwhile takes part.
        """
        return plain_head(self.model) if self.strategy.fused_head else None

    @torch.inference_mode()
    def head_input(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Apply the final norm to all positions but the last, sequence after sequence."""
        return self._normalised(residual[:, :-1])[0]

    def _normalised(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "1 tokens d_model"]:
        flat = residual.reshape(1, -1, residual.shape[-1])
        final_norm = getattr(self.model, "ln_final", None)
        if (
            final_norm is not None
            and getattr(self.model.cfg, "normalization_type", "LN") is not None
        ):
            flat = final_norm(flat)
        return flat

    def _head(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "tokens V"]:
        logits = self.model.unembed(self._normalised(residual))[0]
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits

    def _stop(self, site: HookSite) -> int:
        return min(site.stop, self.n_layers)

    def _note_boundary(
        self, names: Sequence[str], stop: int, residual: Tensor, caught: dict[str, Tensor]
    ) -> None:
        """A hook that is the input of the block we stop at is the residual that came back."""
        for name in names:
            site = locate(name)
            if name not in caught and site.replaces_residual and site.restart == stop:
                caught[name] = residual


def check_frozen(model: Any) -> None:
    """Check that no dropout module is active.

    Raises:
        CertifyError: If dropout is active.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            raise CertifyError(
                f"the model is in training mode: dropout {name!r} (p = {module.p}) is active, so "
                "there is no frozen model to certify; call model.eval()"
            )


def _at_most_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == torch.float64 else logits


def _catch(name: str, caught: dict[str, Tensor]) -> Hook:
    def hook_function(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - TL's hook signature
        caught[name] = activation

    return name, hook_function


def _replace_with(value: Tensor) -> Callable[..., Tensor]:
    def hook_function(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - TL's signature
        return value.reshape(activation.shape)

    return hook_function


def _check_fired(names: Sequence[str], caught: dict[str, Tensor]) -> None:
    missing = [name for name in names if name not in caught]
    if missing:
        raise CertifyError(
            f"hook {missing[0]!r} exists but did not fire in a forward pass; some hooks are off by "
            "default (e.g. hook_mlp_in needs model.set_use_hook_mlp_in(True)), and on a "
            "SAETransformerBridge the hook of an SAE that was attached and removed stays dead (load "
            "the model anew)"
        )
