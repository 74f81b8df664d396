"""sparsify's hookpoints, which are paths of Hugging Face modules, as TransformerLens hooks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from saelens_certify.errors import CertifyError

# Checked numerically for GPT-2, GPT-NeoX (Pythia) and Llama; the trainer leaves the prefix out,
# because it looks modules up in the model without its head.
_MODULE = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?")
_EMBEDDING = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)?(?:embed_tokens|wte|embed_in)")
_ATTENTION = ("attn", "self_attn", "attention")
_HOOK = re.compile(r"(?:blocks\.\d+\.)?(?:\w+\.)*hook_\w+")


@dataclass(frozen=True)
class Hooks:
    """Where a sparse coder reads and writes.

    Attributes:
        input: TransformerLens hook whose activation is encoded.
        output: TransformerLens hook whose activation is reconstructed.
        hf_input: The same as the input or output of a Hugging Face module, if known.
        hf_output: The same for the output.
    """

    input: str
    output: str
    hf_input: str | None = None
    hf_output: str | None = None


def hooks_of(hookpoint: str, transcode: bool) -> Hooks:
    """Translate a hookpoint.

    Args:
        hookpoint: Path of a Hugging Face module, e.g. ``"layers.5"``, ``"h.3.mlp"`` or
            ``"gpt_neox.layers.3.attention"``: an autoencoder encodes and reconstructs the module's
            output, a transcoder encodes its input. For an autoencoder also a TransformerLens hook.
        transcode: Whether it belongs to a transcoder.

    Returns:
        The hooks.

    Raises:
        CertifyError: If it is a module without known hooks.
    """
    if not transcode and _HOOK.fullmatch(hookpoint):
        return Hooks(hookpoint, hookpoint)
    if not transcode and _EMBEDDING.fullmatch(hookpoint):
        return _autoencoder("hook_embed", hookpoint)
    match = _MODULE.fullmatch(hookpoint)
    block, module = (f"blocks.{match[1]}", match[2]) if match else (None, None)
    if block is None or module not in (None, "mlp", *_ATTENTION):
        raise CertifyError(
            f"hookpoint {hookpoint!r} is no module whose hooks are known; pass hookpoint= with one of "
            "'layers.N', 'h.N', 'layers.N.mlp', 'layers.N.attn' (or self_attn, attention)"
            + (
                "; a transcoder's hookpoint is the module whose input it encodes"
                if transcode
                else ", 'embed_tokens', or a TransformerLens hook such as 'blocks.5.hook_resid_post'"
            )
        )
    if module is None:
        names = Hooks(f"{block}.hook_resid_pre", f"{block}.hook_resid_post")
    elif module == "mlp":
        # After the norm: hook_mlp_in is before it, and ln2.hook_normalized lacks an RMS norm's weight.
        names = Hooks(f"{block}.mlp.hook_in", f"{block}.hook_mlp_out")
    else:
        names = Hooks(f"{block}.attn.hook_in", f"{block}.hook_attn_out")
    if not transcode:
        return _autoencoder(names.output, hookpoint)
    return Hooks(names.input, names.output, f"{hookpoint}.input", f"{hookpoint}.output")


def check_hookpoint(model: Any, config: Any) -> None:
    """Check that a converted sparse coder's hooks show what its module computes in transformers.

    Args:
        model: A TransformerLens model.
        config: ``sae.cfg`` of an SAE from `load_sparsify`; for others nothing is checked.

    Raises:
        CertifyError: If the hook is not at the module's input and output in this model.
    """
    metadata = config.metadata
    if metadata.get("sparsify_hookpoint") is None:
        return
    read, written = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    is_bridge = hasattr(model, "original_model")
    if (
        read.endswith((".mlp.hook_in", ".attn.hook_in"))
        and not is_bridge
        and read not in model.hook_dict
    ):
        raise CertifyError(
            f"the transcoder reads {metadata.hf_hook_name}, which is {read} on a TransformerBridge"
            + (" or HookedSAETransformer" if ".mlp." in read else "")
            + f"; a {type(model).__name__} has no such hook"
        )
    _check_post_norm(model, metadata, written, is_bridge)


def _check_post_norm(model: Any, metadata: Any, written: str, is_bridge: bool) -> None:
    """Refuse models (Gemma 2 and 3) that normalise what attention and MLP return.

    TransformerLens shows what is added to the residual stream, not the module's own output.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(mlp|attn)_out", written)
    if match is None or int(match[1]) >= len(model.blocks):
        return
    norm = {"mlp": "ln2_post", "attn": "ln1_post"}[match[2]]
    if norm not in dict(model.blocks[int(match[1])].named_children()):
        return
    inner = f"blocks.{match[1]}.{match[2]}.hook_out"
    if is_bridge:
        key = "hook_name_out" if metadata.hook_name_out else "hook_name"
        remedy = f"set sae.cfg.metadata.{key} = {inner!r}"
    else:
        remedy = f"use a TransformerBridge, where it is {inner!r}"
    raise CertifyError(
        f"{written} of this model is after the norm {norm}, but sparsify reconstructs "
        f"{metadata.hf_hook_name_out or metadata.hf_hook_name}, which is before it; {remedy}"
    )


def _autoencoder(hook: str, hookpoint: str) -> Hooks:
    return Hooks(hook, hook, f"{hookpoint}.output", f"{hookpoint}.output")
