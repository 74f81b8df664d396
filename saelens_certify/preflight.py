"""Checks before any long work: does this SAE belong to this model, at this hook?"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.errors import CertifyError
from saelens_certify.forward import check_hook
from saelens_certify.ops._library import use_native
from saelens_certify.saes import SAEAdapter
from saelens_certify.saes.architectures import input_and_output_hook
from saelens_certify.saes.hookpoints import check_hookpoint
from saelens_certify.saes.processing import check_processing


def check_settings(model: Any, config: CertifyConfig) -> None:
    """Check that the settings fit the model and that nothing around the call changes numbers.

    Args:
        model: The model, or an object with its ``cfg`` alone: then its devices are not looked at.
        config: Settings.

    Raises:
        CertifyError: If sequences are longer than the model's context, autocast is on, or compiled
            operators are demanded that the model's device does not have.
    """
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx and config.seq_len > n_ctx:
        raise CertifyError(
            f"seq_len = {config.seq_len} is longer than the model's context of {n_ctx} tokens"
        )
    parameters = model.parameters() if hasattr(model, "parameters") else ()
    devices = {parameter.device for parameter in parameters}
    for device in devices:
        use_native(config.impl, device)
    if any(map(torch.is_autocast_enabled, {"cpu", "cuda", *(device.type for device in devices)})):
        raise CertifyError(
            "torch.autocast is on, so the model and the SAE would not compute what they are; call "
            "certify outside of it (load the model in the dtype you want)"
        )


def check_bare(model: Any, sae: Any) -> None:
    """Check that nothing is attached: a certificate is about the model and the SAE as they are.

    Raises:
        CertifyError: If hooks or other SAEs are attached to the model, or hooks to the SAE.
    """
    for name, point in (*model.hook_dict.items(), *getattr(sae, "hook_dict", {}).items()):
        if getattr(point, "fwd_hooks", None):
            raise CertifyError(
                f"a hook is attached at {name!r}, so the certificate would be about something else "
                "than the named model and SAE; call reset_hooks(including_permanent=True) first"
            )
    attached = list(
        getattr(model, "acts_to_saes", None) or getattr(model, "_acts_to_saes", None) or ()
    )
    if attached:
        raise CertifyError(
            f"an SAE is attached to the model at {attached[0]!r}; call model.reset_saes() first"
        )


def check_pair(model: Any, sae: Any) -> None:
    """Check that model and SAE fit together, without a forward pass.

    Raises:
        CertifyError: By the first of `pair_rules` that is broken.
    """
    for rule in pair_rules(model, sae.cfg):
        rule()


def pair_rules(model: Any, config: Any) -> list[Callable[[], None]]:
    """Return everything that is checked about an SAE's configuration and a model.

    Args:
        model: The model, or its configuration (``model.cfg``), for which there are fewer rules.
        config: ``sae.cfg``.

    Returns:
        Checks, each of which raises `CertifyError` if its rule is broken.

    Raises:
        CertifyError: If the SAE's configuration names no hooks.
    """
    hooks = input_and_output_hook(config)
    whole = hasattr(model, "hook_dict")
    model_config = model.cfg if whole else model
    rules: list[Callable[[], None]] = []
    if whole:
        rules.append(partial(check_hookpoint, model, config))
    for hook in dict.fromkeys(hooks):
        rules.append(partial(check_hook if whole else check_layer, model, hook))
    if whole:
        rules.append(partial(check_output_hook, model, hooks[1]))
    rules.append(partial(check_model_name, model_config, config.metadata))
    rules.append(partial(check_stream_width, model_config, hooks[0], config.d_in))
    if whole:
        rules.append(partial(check_processing, model, config))
    return rules


def check_layer(model_config: Any, hook: str) -> None:
    """Check that a model of this configuration has the hook's layer.

    Raises:
        CertifyError: If it has too few.
    """
    match = re.match(r"blocks\.(\d+)\.", hook)
    n_layers = getattr(model_config, "n_layers", None)
    if match and n_layers is not None and int(match.group(1)) >= n_layers:
        raise CertifyError(
            f"the model has no hook {hook!r} (it has {n_layers} layers, numbered from 0)"
        )


def check_output_hook(model: Any, hook: str) -> None:
    """Check that what is put at a hook of this model reaches everything that it should.

    Raises:
        CertifyError: If it does not.
    """
    if hook.startswith(("ln_final.", "unembed.", "hook_unembed")):
        raise CertifyError(
            f"{hook} comes after the last block, and only activations up to the last block's output can be "
            "replaced; its output is "
            f"'blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post'"
        )
    bridge = hasattr(model, "original_model")
    if bridge and hook.endswith(".hook_resid_mid"):
        raise CertifyError(
            f"on a TransformerBridge {hook} is the input of the MLP branch only: a "
            "reconstruction put there misses the residual stream. Use a HookedTransformer for this SAE"
        )


def check_stream_width(model_config: Any, hook: str, d_in: int) -> None:
    """Check that an SAE on the residual stream has the stream's width.

    Raises:
        CertifyError: If it has not.
    """
    if ".hook_resid_" in hook and d_in != int(model_config.d_model):
        raise CertifyError(
            f"the SAE reads activations of width {d_in}, but {hook} of this "
            f"model has width {int(model_config.d_model)}: the SAE belongs to another model"
        )


def check_model_name(model_config: Any, metadata: Any) -> None:
    """Check that an SAE was trained on this model, as far as both say where they come from.

    Raises:
        CertifyError: If they name different models.
    """
    trained_on = metadata.model_name
    given = getattr(model_config, "model_name", None)
    if not trained_on or not given or given == "custom" or Path(given).is_dir():
        return  # nothing is known about where the weights come from
    if _canonical(trained_on) != _canonical(given):
        raise CertifyError(
            f"the SAE's metadata says that it was trained on {trained_on!r}, the model is {given!r}; "
            "load that model, or, if the two are the same weights under two names, set "
            "sae.cfg.metadata.model_name to the model's name"
        )


def check_width(adapter: SAEAdapter, activations: dict[str, Tensor]) -> None:
    """Check the width of each hook's real activation.

    Raises:
        CertifyError: If it is not the SAE's.
    """
    for hook, width in ((adapter.input_hook, adapter.d_in), (adapter.output_hook, adapter.d_out)):
        shape = tuple(activations[hook].shape)
        found = activations[hook][0, 0].numel()
        if found != width:
            raise CertifyError(
                f"the activation at {hook} has width {found} (shape {shape}), the SAE expects "
                f"{width}; it belongs to another hook or another model"
            )


def check_order(adapter: SAEAdapter, activations: dict[str, Tensor]) -> None:
    """Check that what the SAE reads is computed before what it replaces.

    Args:
        adapter: The SAE.
        activations: What a forward pass gave, in the order in which the hooks fired.

    Raises:
        CertifyError: If not: replacing the output would have to change an input already used.
    """
    fired = list(activations)
    if fired.index(adapter.input_hook) > fired.index(adapter.output_hook):
        raise CertifyError(
            f"the SAE reads {adapter.input_hook}, which this model computes after "
            f"{adapter.output_hook}, the activation to be replaced; check hook_name and hook_name_out "
            "in the SAE's metadata"
        )


def warn_about_training_positions(metadata: Any) -> None:
    """Warn if the SAE was trained on some positions only, which the certificate does not know of.

    Args:
        metadata: ``sae.cfg.metadata``.
    """
    trained_on = metadata.seqpos_slice
    if any(edge is not None for edge in trained_on or ()):
        warnings.warn(
            f"the SAE's metadata says seqpos_slice = {tuple(trained_on)}: it was trained on these "
            "positions only, and the certificate is about all positions of its sequences",
            stacklevel=3,
        )


def warn_about_bos(model: Any, sequences: Sequences, name: str) -> None:
    """Warn if token data lacks the BOS that the model's convention asks for."""
    if getattr(model.cfg, "default_prepend_bos", False) and not sequences.source.prepends_bos:
        warnings.warn(
            f"the {name} sequences do not begin with BOS although the model's convention "
            "(cfg.default_prepend_bos) asks for it; the certificate is about text without BOS",
            stacklevel=3,
        )


def _canonical(name: str) -> str:
    """Reduce a model name to what its aliases share: official name, without owner, lower case."""
    from transformer_lens import loading_from_pretrained as loading

    with contextlib.suppress(ValueError):
        name = loading.get_official_model_name(name)
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
