"""Were the model's weights processed on loading, and as the SAE's metadata says?

TransformerLens can fold the norms' weights into the next layer (``fold_ln``) and centre what is written
to the residual stream (``center_writing_weights``). Neither changes predictions, both change activations:
folding those after a norm, centring those of the residual stream. (``center_unembed`` changes nothing
that an SAE reads.) SAELens trains on unprocessed weights, but for what
``metadata.model_from_pretrained_kwargs`` says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.architectures import input_and_output_hook

PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""What `from_pretrained` and `enable_compatibility_mode` of TransformerLens can do to weights."""

_PLACEMENT = ("device", "device_map", "dtype", "n_devices", "torch_dtype")

_AFTER_NORM = re.compile(
    r"(?:.*\.)?(?:ln\w*\.hook_out|(?:mlp|attn)(?:\.(?:in|gate|[qkv]))?\.hook_in|unembed\.hook_in)"
)
_STREAM = re.compile(
    r"(?:.*\.)?(?:hook_resid_\w+|hook_(?:attn|mlp)_out|hook_(?:pos_)?embed|(?:pos_)?embed\.hook_out"
    r"|(?:attn|mlp)(?:\.(?:o|out))?\.hook_out|ln\w*\.hook_in|hook_(?:attn|mlp)_in|hook_[qkv]_input"
    r"|blocks\.\d+\.hook_(?:in|out))"
)


def check_processing(model: Any, config: Any) -> None:
    """Check that the weights were processed as for the SAE's training, where that changes its hooks.

    Where nothing says how the SAE was trained, SAELens's default is a warning.

    Args:
        model: A TransformerLens model.
        config: ``sae.cfg``.

    Raises:
        CertifyError: If they were not: with the call that loads the model so.
    """
    hooks = input_and_output_hook(config)
    for key, pattern, found, states in (
        ("fold_ln", _AFTER_NORM, folded, ("folded into the next layer", "the norms' weights are")),
        ("center_writing_weights", _STREAM, centred, ("centred", "what is written to the residual stream is")),
    ):  # fmt: skip
        if not any(pattern.fullmatch(hook) for hook in hooks):
            continue
        wanted, why, known = _training(config.metadata, key)
        is_so = found(model)
        if is_so is None or is_so == wanted or (wanted and not _can_be(model, key)):
            continue
        state, what = states
        text = f"in this model {what} {'' if is_so else 'not '}{state}, but {why}; {_remedy(model, config)}"
        if known:
            raise CertifyError(text)
        warnings.warn(text, stacklevel=3)


def common_arguments(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which SAEs that share a model want it loaded.

    Args:
        configs: ``sae.cfg`` of each, by name.

    Returns:
        Their ``model_from_pretrained_kwargs``, without those that say where the model is put.

    Raises:
        CertifyError: If they want different ones.
    """
    wanted = {
        name: {
            key: value
            for key, value in (config.metadata.model_from_pretrained_kwargs or {}).items()
            if key not in _PLACEMENT and not (key in PROCESSING and not value)
        }
        for name, config in configs.items()
    }
    if any(arguments != next(iter(wanted.values())) for arguments in wanted.values()):
        raise CertifyError(
            "these SAEs were trained on differently loaded models; certify them in several runs:"
            + "".join(f"\n- {name}: {arguments}" for name, arguments in wanted.items())
        )
    return next(iter(wanted.values()), {})


def folded(model: Any) -> bool | None:
    """Whether the norms' weights were folded into the next layer; None if there are none."""
    norm = getattr(model.cfg, "normalization_type", None) if hasattr(model, "cfg") else None
    if not hasattr(model, "original_model"):
        return None if norm is None else str(norm).endswith("Pre")
    if not getattr(model, "_weights_processed", False):
        return False
    # Some processing was done; folding leaves norms whose weights are all alike.
    weight = getattr(getattr(next(iter(model.blocks), None), "ln1", None), "weight", None)
    return not isinstance(weight, Tensor) or bool(weight.min() == weight.max())


def centred(model: Any) -> bool | None:
    """Whether the rows that an MLP writes have mean 0, which trained ones only have by chance.

    Random rows of width d have means of about 1/sqrt(d) of their entries' size, centred ones of a
    rounding error over sqrt(d).

    Returns:
        None if the model's first block has no such rows.
    """
    block = next(iter(getattr(model, "blocks", ())), None)
    rows = getattr(getattr(block, "mlp", None), "W_out", None)
    if not isinstance(rows, Tensor):
        return None
    sizes = rows.detach().float().abs().mean()
    means = rows.detach().float().mean(dim=-1).abs().mean()
    error = 2 * max(torch.finfo(rows.dtype).eps, 1e-5) / rows.shape[-1] ** 0.5
    return bool(means < error * sizes)


def _training(metadata: Any, key: str) -> tuple[bool, str, bool]:
    """Return whether training was on weights so processed, how that is known, and whether it is."""
    if metadata.get("sparsify_hookpoint") is not None:
        return False, "sparsify was trained on activations of the Hugging Face model as it is", True
    arguments = metadata.model_from_pretrained_kwargs or {}
    if key in arguments:
        said = f"the SAE's metadata says model_from_pretrained_kwargs = {arguments}"
        return bool(arguments[key]), said, True
    if metadata.hf_hook_name:
        said = f"the SAE was trained on {metadata.hf_hook_name} of the Hugging Face model as it is"
        return False, said, True
    return (
        False,
        "SAELens trains on weights as they are, and the SAE's metadata says nothing",
        False,
    )


def _can_be(model: Any, key: str) -> bool:
    """Whether TransformerLens would process this model so: only layer norms can be centred."""
    norm = str(getattr(model.cfg, "normalization_type", None))
    if key == "fold_ln":
        return norm != "None"
    return norm.startswith("LN") and not getattr(model.cfg, "final_rms", False)


def _remedy(model: Any, config: Any) -> str:
    arguments = dict(config.metadata.model_from_pretrained_kwargs or {})
    asked = {key: bool(arguments.get(key)) for key in PROCESSING}
    told = "; if it was trained on this very model, say so in sae.cfg.metadata.model_from_pretrained_kwargs"
    if hasattr(model, "original_model"):
        if not any(asked.values()):
            return f"do not call enable_compatibility_mode(), or with no_processing=True{told}"
        call = ", ".join(f"{key}={value}" for key, value in asked.items())
        return f"load it anew and call model.enable_compatibility_mode({call}){told}"
    call = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"load it with from_pretrained_no_processing(name{call}){told}"
