"""Hook names: whether a model has one, where a forward pass can restart, and what was meant."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from saelens_certify.errors import CertifyError

_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_BLOCK_INPUTS = ("hook_resid_pre", "hook_in")
_BLOCK_OUTPUTS = ("hook_resid_post", "hook_out")


@dataclass(frozen=True)
class HookSite:
    """Where a hook sits in the model.

    Attributes:
        name: The hook's name.
        restart: First block that must run again when the hook's activation changes, or ``None`` when
            the hook is before all blocks.
        replaces_residual: Whether the activation is the whole input of block ``restart`` (then
            nothing before it is needed), rather than something inside that block.
    """

    name: str
    restart: int | None
    replaces_residual: bool

    @property
    def stop(self) -> int:
        """First block that need not run for the hook to fire (what ``stop_at_layer`` takes)."""
        if self.restart is None:
            return 0
        return self.restart if self.replaces_residual else self.restart + 1


def locate(name: str) -> HookSite:
    """Work out from its name where a hook sits.

    Args:
        name: A TransformerLens hook name, e.g. ``"blocks.6.hook_resid_post"``.
    """
    match = _BLOCK_HOOK.fullmatch(name)
    if match is None:
        return HookSite(name, restart=None, replaces_residual=False)
    layer, rest = int(match.group(1)), match.group(2)
    if rest in _BLOCK_OUTPUTS:
        return HookSite(name, restart=layer + 1, replaces_residual=True)
    return HookSite(name, restart=layer, replaces_residual=rest in _BLOCK_INPUTS)


def block_input(layer: int) -> str:
    """Name of the hook at the input of a block."""
    return f"blocks.{layer}.hook_resid_pre"


def known_hooks(model: Any) -> dict[str, str]:
    """Return every hook name that the model has, with the name under which its hooks are found.

    A TransformerBridge answers to aliases (``blocks.1.hook_resid_pre`` for ``blocks.1.hook_in``). A
    SAETransformerBridge has forgotten them, and its ``run_with_hooks`` leaves a hook on an alias out
    without a word; there each alias comes with the canonical name.
    """
    points: dict[str, Any] = {}
    for model_class in reversed(type(model).__mro__):
        listed = vars(model_class).get("hook_dict")
        if isinstance(listed, property) and listed.fget is not None:
            points |= listed.fget(model)
    own = model.hook_dict
    # By identity: a hook point that SAELens has put back after an SAE carries no name.
    canonical = {id(point): name for name, point in own.items()}
    names = {name: canonical[id(point)] for name, point in points.items() if id(point) in canonical}
    return names | {name: name for name in own}


def resolve_hook(model: Any, name: str) -> str:
    """Return the name under which ``model.run_with_hooks`` finds a hook; see `known_hooks`."""
    return known_hooks(model).get(name, name)


def check_hook(model: Any, name: str) -> None:
    """Check that the model has a hook.

    Raises:
        CertifyError: With the nearest names, if it has not.
    """
    names = known_hooks(model)
    if name in names:
        if hasattr(model, "original_model"):
            try:
                model.check_hooks_to_add(names[name])
            except ValueError as error:
                raise CertifyError(
                    f"hook {name!r} did not fire: it is switched off: {error}"
                ) from None
        return
    attached = list(getattr(model, "acts_to_saes", None) or ())
    if name in attached:
        raise CertifyError(
            f"an SAE is attached to the model at {name!r}; call model.reset_saes() first"
        )
    if name.endswith(".mlp.hook_in"):
        raise CertifyError(
            f"a {type(model).__name__} has no hook {name!r}, the input of the MLP after its norm; load "
            "the model as a TransformerBridge or a HookedSAETransformer, which have it"
        )
    near = difflib.get_close_matches(name, sorted(names), n=4, cutoff=0.5)
    n_layers = getattr(model.cfg, "n_layers", None)
    raise CertifyError(
        f"the model has no hook {name!r} (it has {n_layers} layers, numbered from 0)"
        + (f"; near names: {', '.join(near)}" if near else "")
    )
