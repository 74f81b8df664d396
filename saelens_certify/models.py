"""From a name to a frozen model: a hub name, a local Hugging Face folder, or ``"demo"``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from saelens_certify.errors import CertifyError
from saelens_certify.saes.checkpoint import DTYPES
from saelens_certify.saes.processing import PROCESSING

ModelClass = Literal["TransformerBridge", "HookedTransformer"]

DEMO = "demo"
"""Name of the bundled model."""


def load_model(
    name: str,
    *,
    model_class: ModelClass = "TransformerBridge",
    device: str = "cpu",
    dtype: str = "float32",
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model as SAELens does: with unprocessed weights, but for what an SAE's metadata says.

    Args:
        name: A hub name, a local folder with ``config.json``, weights and tokenizer, or ``"demo"``.
        model_class: TransformerLens class. Local folders load as TransformerBridge.
        device: Where to put it.
        dtype: Dtype of its parameters: float32, bfloat16, float16 or float64.
        arguments: ``model_from_pretrained_kwargs`` of the SAE's metadata (see `common_arguments`):
            processing of weights (``center_writing_weights=True``) and, of hub names, ``revision`` or
            ``checkpoint_index``.

    Returns:
        The model.

    Raises:
        CertifyError: If the name is neither, or the combination is not available.
    """
    if dtype not in DTYPES:
        raise CertifyError(f"unknown dtype {dtype!r}; use one of {sorted(DTYPES)}")
    if model_class not in ("TransformerBridge", "HookedTransformer"):
        raise CertifyError(
            f"unknown model class {model_class!r}; use 'TransformerBridge' or 'HookedTransformer'"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CertifyError(f"device {device!r} is not available: {error}") from None
    others = dict(arguments or {})
    processing = {key: bool(others.pop(key, False)) for key in PROCESSING}
    if name == DEMO:
        from saelens_certify import demo

        model = demo.load_model(model_class, device=device).to(DTYPES[dtype])
    elif Path(name).is_dir():
        model = _load_folder(Path(name), model_class, device, DTYPES[dtype])
    elif str(name).startswith((".", "/", "~")):
        raise CertifyError(f"model folder {name!r} does not exist")
    else:
        model = _load_published(name, model_class, device, DTYPES[dtype], others)
    return _processed(model, processing) if any(processing.values()) else model


def _processed(model: Any, processing: Mapping[str, bool]) -> Any:
    if hasattr(model, "original_model"):
        model.enable_compatibility_mode(**processing)
    else:
        model.load_and_process_state_dict(model.state_dict(), **processing)
    return model.eval()


def _load_published(
    name: str, model_class: ModelClass, device: str, dtype: torch.dtype, others: dict[str, Any]
) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    known = inspect.signature(TransformerBridge.boot_transformers).parameters
    if model_class == "TransformerBridge" and not others.keys() <= known.keys():
        raise CertifyError(
            f"the SAE's metadata asks for a model loaded with {sorted(others.keys() - known.keys())}, "
            "which a TransformerBridge does not take; use model class 'HookedTransformer'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            if model_class == "HookedTransformer":
                return HookedTransformer.from_pretrained_no_processing(
                    name, device=device, dtype=dtype, **others
                ).eval()
            return TransformerBridge.boot_transformers(
                name, device=device, dtype=dtype, **others
            ).eval()
        except (OSError, ValueError) as error:
            raise CertifyError(
                f"model {name!r} cannot be loaded as a {model_class}: {error}. It is not a local "
                f"folder either; use a hub name, a folder, or {DEMO!r}"
            ) from error


def _load_folder(folder: Path, model_class: ModelClass, device: str, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").exists():
        raise CertifyError(
            f"{str(folder)!r} is no model folder: it has no config.json (save one with "
            "model.save_pretrained(folder) and tokenizer.save_pretrained(folder))"
        )
    if model_class == "HookedTransformer":
        raise CertifyError(
            "local folders load as TransformerBridge; for a HookedTransformer build it yourself and "
            "pass the object to certify(...)"
        )
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=hf_model.eval(), tokenizer=tokenizer, device=device
    ).eval()
