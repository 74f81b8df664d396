"""In which dtype a checkpoint stores an SAE; SAELens casts it before anybody can ask."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from saelens_certify.errors import CertifyError
from saelens_certify.saes.sources import SAESpec, registry

WEIGHTS_FILE = "sae_weights.safetensors"

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The dtypes that SAELens loads, by name."""

_HEADER = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}

_FILES: dict[str, Callable[[str], str]] = {
    "sae_lens": lambda folder: f"{folder}/{WEIGHTS_FILE}",
    "llama_scope": lambda folder: f"{folder}/checkpoints/final.safetensors",
    "llama_scope_r1_distill": lambda folder: f"{folder}/{WEIGHTS_FILE}",
    "gemma_3": lambda folder: f"{folder}/params.safetensors",
    "mwhanna_transcoder": lambda folder: folder,
    "temporal": lambda folder: f"{folder}/latest_ckpt.safetensors",
    "gemma_2": lambda folder: f"{folder}/params.npz",
    "gemma_2_transcoder": lambda folder: f"{folder}/params.npz",
}
"""The file in which each SAELens loader finds the weights, where it tells their dtype by itself."""

_AS_STORED = frozenset({"dictionary_learning_1", "deepseek_r1", "qwen_scope", "connor_rob_hook_z"})
"""Loaders that hand over the tensors of a pickled checkpoint as they are."""

FLOAT32_LOADERS = frozenset({"gemma_2", "gemma_2_transcoder", "goodfire"})
"""Loaders that cast to float32 whatever they are asked for."""


def check_dtype(name: str) -> str:
    """Return the name of a dtype if an SAE can be loaded in it.

    Raises:
        CertifyError: If not.
    """
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise CertifyError(f"unknown dtype of an SAE {name!r}; use one of {', '.join(DTYPES)}")
    return short


def file_dtype(path: Path) -> str | None:
    """Read from the headers of a weights file the narrowest dtype that holds all its tensors.

    Args:
        path: A ``.safetensors`` or ``.npz`` file.

    Returns:
        Its name; None if the file holds a kind of number that SAELens does not load.
    """
    if path.suffix == ".npz":
        kinds = set(_npz_dtypes(path))
    else:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            stored = {str(part.get_dtype()) for part in slices}
        kinds = {_HEADER.get(kind, kind) for kind in stored if kind[0] in "FB" and kind != "BOOL"}
    if not kinds or not kinds <= DTYPES.keys():
        return None
    return widest(DTYPES[kind] for kind in kinds)


def _npz_dtypes(path: Path) -> Iterator[str]:
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                dtype = headers[version](file)[2] if version in headers else "unknown"
            yield str(dtype)


def published_dtype(spec: SAESpec) -> str | None:
    """Find the dtype of a published checkpoint; its file is fetched, as loading will.

    Returns:
        Its name; None if the format does not tell before it is loaded.
    """
    from huggingface_hub import hf_hub_download

    entry = registry().get(spec.release)
    repository = spec.release if entry is None else entry.repo_id
    folder = spec.sae_id if entry is None else entry.saes_map[spec.sae_id]
    if spec.loader not in _FILES:
        return None
    return file_dtype(Path(hf_hub_download(repository, _FILES[spec.loader](folder))))


def observing_loader(spec: SAESpec, seen: list[str]) -> Callable[..., Any] | None:
    """Return a SAELens converter that also notes the dtype of what it read.

    Args:
        spec: The published SAE.
        seen: Receives the dtype's name.

    Returns:
        The converter; None where SAELens's own casts the tensors itself.
    """
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    if spec.loader not in _AS_STORED:
        return None
    load = NAMED_PRETRAINED_SAE_LOADERS[spec.loader]

    def observed(*args: Any, **kwargs: Any) -> Any:
        config, weights, sparsity = load(*args, **kwargs)
        dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        if dtypes <= set(DTYPES.values()):
            seen.append(widest(dtypes))
        return config, weights, sparsity

    return observed


def widest(dtypes: Iterable[torch.dtype]) -> str:
    """Return the name of the narrowest dtype that holds values of all these exactly."""
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def holds(wide: str, narrow: str) -> bool:
    """Whether every value of ``narrow`` is one of ``wide`` too."""
    return torch.promote_types(DTYPES[wide], DTYPES[narrow]) == DTYPES[wide]
