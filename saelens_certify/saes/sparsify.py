"""Checkpoints of EleutherAI's sparsify (``cfg.json`` + ``sae.safetensors``) as SAELens objects.

What a sparse coder computes, with ``encoder.weight`` and ``W_dec`` both stored ``[d_sae, d_in]``::

    u   = x - b_dec                for autoencoders, x for transcoders
    z   = select(relu(u encoder.weight.T + encoder.bias))
    out = z W_dec + b_dec (+ x W_skip.T)

``normalize_decoder`` and ``multi_topk`` concern training only. (With ``multi_topk`` sparsify's own
``forward`` returns the 4 k features' reconstruction of its extra loss; its ``encode`` keeps k.)
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.checkpoint import DTYPES, check_dtype
from saelens_certify.saes.hookpoints import hooks_of
from saelens_certify.saes.sources import CONFIG_FILE

SPARSIFY_WEIGHTS = "sae.safetensors"
_KNOWN = {
    "activation", "d_in", "expansion_factor", "k", "multi_topk", "normalize_decoder", "num_latents",
    "signed", "skip_connection", "transcode",
}  # fmt: skip
# Written by some versions whether or not the setting they belong to is on.
_WITHOUT_EFFECT = {"gram_table_hash", "lookup_max_order", "naive_decoder"}


@dataclass(frozen=True)
class SparseCoderSettings:
    """What ``cfg.json`` says about the computation.

    Attributes:
        d_in: Width of the activations.
        d_sae: Number of features.
        k: Number of features kept per token.
        activation: ``"topk"``, ``"groupmax"``, or ``"abstopk"`` for the ``signed`` coders of 2024.
        transcode: Whether the input of the module is encoded, without subtracting ``b_dec``.
        skip: Whether a linear map of the input is added.
    """

    d_in: int
    d_sae: int
    k: int
    activation: str
    transcode: bool
    skip: bool


def is_sparsify_folder(path: str | Path) -> bool:
    """Return whether a folder holds one sparsify checkpoint."""
    folder = Path(path)
    return (folder / CONFIG_FILE).is_file() and (folder / SPARSIFY_WEIGHTS).is_file()


def load_sparsify(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    hookpoint: str | None = None,
    model_name: str | None = None,
) -> Any:
    """Load a sparsify checkpoint as a SAELens object that computes the same.

    Args:
        folder: Folder with ``cfg.json`` and ``sae.safetensors``. sparsify names it by the
            hookpoint, ``layers.5`` or ``layers.5/seed0``.
        device: Where to put the weights.
        dtype: Dtype of the weights; None keeps that of the checkpoint.
        hookpoint: Path of the Hugging Face module, where the folder's name is not it; or, for an
            autoencoder, a TransformerLens hook.
        model_name: Model it was trained on; by default what the run's ``config.json`` one folder
            up says, if it is there.

    Returns:
        A `TopKSAE`, or for other settings an object of SAELens's form: ``AbsTopKSAE``,
        `TopKTranscoder`, `TopKSkipTranscoder`, `GroupMaxSAE`, `GroupMaxTranscoder` or
        `GroupMaxSkipTranscoder`. An autoencoder with a skip connection becomes the transcoder of a
        hook to itself.

    Raises:
        CertifyError: If a file is missing or damaged, a setting or tensor is not understood, or the
            hookpoint cannot be translated.
    """
    folder = _absolute(folder)
    if not is_sparsify_folder(folder):
        missing = [
            name for name in (CONFIG_FILE, SPARSIFY_WEIGHTS) if not (folder / name).is_file()
        ]
        raise CertifyError(
            f"{folder} is no sparsify checkpoint: it has no {' and no '.join(missing)}"
        )
    settings, raw = _read_settings(folder)
    metadata = _metadata(folder, settings, raw, hookpoint, model_name)
    tensors = _read_tensors(folder, settings, device)
    stored = {tensor.dtype for tensor in tensors.values()}
    if dtype is None and len(stored) > 1:
        raise CertifyError(
            f"{folder / SPARSIFY_WEIGHTS} mixes dtypes {sorted(map(str, stored))}; say which one the SAE is to "
            "compute in with dtype="
        )
    wanted = stored.pop() if dtype is None else DTYPES[check_dtype(str(dtype))]
    weights = _weights(tensors, settings, wanted, folder)
    sae_class, config = _class_and_config(settings, wanted)
    # On the meta device it needs no memory until it has the weights.
    sae = sae_class(config)
    sae.load_state_dict(weights, assign=True)
    sae.to(device=torch.device(device))
    sae.cfg.metadata = metadata
    return sae


def sparsify_config(
    folder: str | Path, *, hookpoint: str | None = None, model_name: str | None = None
) -> Any:
    """Read the configuration that `load_sparsify` would give, from ``cfg.json`` alone.

    Args:
        folder: Folder with ``cfg.json``; weights are not read.
        hookpoint: As for `load_sparsify`.
        model_name: As for `load_sparsify`.

    Returns:
        What ``sae.cfg`` would be, but for ``device`` and ``dtype``, which the weights decide.

    Raises:
        CertifyError: As `load_sparsify` does.
    """
    folder = _absolute(folder)
    settings, raw = _read_settings(folder)
    config = _class_and_config(settings, torch.float32)[1]
    config.device = "cpu"
    config.metadata = _metadata(folder, settings, raw, hookpoint, model_name)
    return config


def _absolute(folder: str | Path) -> Path:
    # Not resolve(): the name that counts is the one the folder is reached by.
    return Path(os.path.abspath(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CertifyError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CertifyError(f"{path} holds a {type(content).__name__}, not a table of settings")
    return content


def _read_settings(folder: Path) -> tuple[SparseCoderSettings, dict[str, Any]]:
    path = folder / CONFIG_FILE
    raw = _read_json(path)
    # Settings of later or private versions are harmless where they are off; sparsify ignores them.
    unknown = {key: raw[key] for key in raw.keys() - _KNOWN - _WITHOUT_EFFECT if raw[key]}
    if unknown:
        raise CertifyError(
            f"{path} has settings that may change what the SAE computes and that are not understood: "
            f"{unknown}; known are {sorted(_KNOWN)}"
        )
    d_in = _whole(raw, "d_in", None, path)
    d_sae = _whole(raw, "num_latents", 0, path) or d_in * _whole(raw, "expansion_factor", 32, path)
    signed, transcode = bool(raw.get("signed")), bool(raw.get("transcode"))
    skip = bool(raw.get("skip_connection"))
    activation = raw.get("activation") or "topk"
    if activation not in ("topk", "groupmax"):
        raise CertifyError(f"{path}: activation {activation!r} is not known; known: topk, groupmax")
    if signed:
        if activation != "topk" or transcode or skip:
            raise CertifyError(
                f"{path}: signed=true is known for plain top-k autoencoders only, not with "
                f"activation={activation!r}, transcode={transcode}, skip_connection={skip}"
            )
        activation = "abstopk"
    k = _whole(raw, "k", 32, path)
    if k > d_sae or (activation == "groupmax" and d_sae % k):
        fault = "cannot be kept" if k > d_sae else "cannot be made equal groups"
        raise CertifyError(f"{path}: k = {k} {fault} of {d_sae} features")
    return SparseCoderSettings(d_in, d_sae, k, activation, transcode, skip), raw


def _whole(raw: dict[str, Any], key: str, default: int | None, path: Path) -> int:
    value = raw.get(key)
    value = default if value is None else value
    lowest = 0 if key == "num_latents" else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise CertifyError(f"{path}: {key} = {value!r}, but must be a whole number >= {lowest}")
    return value


def _read_run(folder: Path) -> dict[str, Any]:
    """Return the training run's settings, or nothing where they are not beside the checkpoint."""
    path = _named(folder).parent / "config.json"
    if not path.is_file():
        return {}
    run = _read_json(path)
    return run if isinstance(run.get("sae"), dict) else {}


def _named(folder: Path) -> Path:
    """Return the folder that has the hookpoint's name."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _read_tensors(
    folder: Path, settings: SparseCoderSettings, device: str | torch.device
) -> dict[str, Tensor]:
    path = folder / SPARSIFY_WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CertifyError(f"{path} cannot be read: {error}") from None
    d_in, d_sae = settings.d_in, settings.d_sae
    expected = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if settings.skip:
        expected["W_skip"] = (d_in, d_in)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise CertifyError(
            f"{path} does not hold what {CONFIG_FILE} says: expected {expected}, found {found}"
        )
    odd = {name: str(t.dtype) for name, t in tensors.items() if t.dtype not in DTYPES.values()}
    if odd:
        raise CertifyError(f"{path} holds tensors that are not plain floating point: {odd}")
    return tensors


def _weights(
    tensors: dict[str, Tensor], settings: SparseCoderSettings, dtype: torch.dtype, folder: Path
) -> dict[str, Tensor]:
    """Name and turn the tensors the way SAELens does."""
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if settings.skip:
        weights["W_skip"] = tensors["W_skip"]
        if not settings.transcode:
            if dtype in (torch.bfloat16, torch.float16):
                raise CertifyError(
                    f"{folder}: an autoencoder with a skip connection has to have b_dec folded into "
                    f"its encoder bias, which {dtype} is too coarse for; load it with dtype='float32'"
                )
            shift = tensors["encoder.weight"].double() @ tensors["b_dec"].double()
            weights["b_enc"] = weights["b_enc"].double() - shift
    return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def _class_and_config(settings: SparseCoderSettings, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the SAE's class and its configuration, on the meta device and without metadata."""
    from sae_lens import AbsTopKSAE, AbsTopKSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.util import dtype_to_str

    from saelens_certify.saes.classes import groupmax, topk_transcoder

    grouped = settings.activation == "groupmax"
    # sparsify ranks features by their score alone, whatever the norms of the decoder rows.
    extra: dict[str, Any] = {"rescale_acts_by_decoder_norm": False}
    if settings.skip or settings.transcode:
        extra = {"d_out": settings.d_in}
        cls: Any
        if settings.skip:
            cls = groupmax.GroupMaxSkipTranscoder if grouped else topk_transcoder.TopKSkipTranscoder
        else:
            cls = groupmax.GroupMaxTranscoder if grouped else topk_transcoder.TopKTranscoder
        config_class = cls.config_class
    elif grouped:
        extra = {}
        cls, config_class = groupmax.GroupMaxSAE, groupmax.GroupMaxSAEConfig
    elif settings.activation == "abstopk":
        cls, config_class = AbsTopKSAE, AbsTopKSAEConfig
    else:
        cls, config_class = TopKSAE, TopKSAEConfig
    config = config_class(
        d_in=settings.d_in,
        d_sae=settings.d_sae,
        dtype=dtype_to_str(dtype),
        device="meta",
        apply_b_dec_to_input=not (settings.transcode or settings.skip),
        k=settings.k,
        **extra,
    )
    return cls, config


def _metadata(
    folder: Path,
    settings: SparseCoderSettings,
    raw: dict[str, Any],
    hookpoint: str | None,
    model_name: str | None,
) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    run = _read_run(folder)
    hookpoint = hookpoint or _named(folder).name
    try:
        hooks = hooks_of(hookpoint, settings.transcode)
    except CertifyError as error:
        raise CertifyError(f"{folder}: {error}") from None
    two_hooks = settings.transcode or settings.skip
    known: dict[str, Any] = {
        "model_name": model_name or run.get("model"),
        "hook_name": hooks.input,
        # SAELens reads hook_name_out of transcoders; of others it must not be set.
        "hook_name_out": hooks.output if two_hooks else None,
        "hf_hook_name": hooks.hf_input,
        "hf_hook_name_out": hooks.hf_output if two_hooks else None,
        "context_size": run.get("ctx_len"),
        "dataset_path": run.get("dataset"),
        "sparsify_hookpoint": hookpoint,
        "sparsify_config": raw,
    }
    return SAEMetadata(**{key: value for key, value in known.items() if value is not None})
