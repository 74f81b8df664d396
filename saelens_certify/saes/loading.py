"""From what the user has to a SAELens object: a live SAE, a folder, or ``release/sae_id``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE

from saelens_certify.saes.checkpoint import (
    DTYPES,
    FLOAT32_LOADERS,
    WEIGHTS_FILE,
    check_dtype,
    file_dtype,
    holds,
    observing_loader,
    published_dtype,
)
from saelens_certify.saes.classes import OWN_CLASSES
from saelens_certify.saes.configurations import (
    check_source,
    reading,
    sparsify_folder,
)
from saelens_certify.saes.sources import SAESpec, parse_spec, sae_folder
from saelens_certify.saes.sparsify import SPARSIFY_WEIGHTS, is_sparsify_folder, load_sparsify


@dataclass(frozen=True)
class LoadedSAE:
    """An SAE and where it came from.

    Attributes:
        sae: The SAELens object.
        name: What it was asked for by; None for a live object.
        release: SAELens release or Hugging Face repository, if it came from one.
        sae_id: Its id there; of a folder, the folder's name.
        checkpoint_dtype: Dtype in which the checkpoint stores it; None if that is not known.
    """

    sae: Any
    name: str | None = None
    release: str | None = None
    sae_id: str | None = None
    checkpoint_dtype: str | None = None

    @property
    def dtype(self) -> str:
        """Name of the dtype in which the SAE computes."""
        return str(next(self.sae.parameters()).dtype).removeprefix("torch.")

    def origin(self) -> dict[str, str | None]:
        """Return what a manifest records beside the name, as plain JSON values."""
        return {
            "release": self.release,
            "sae_id": self.sae_id,
            "checkpoint_dtype": self.checkpoint_dtype,
        }


def load_sae(spec: Any, device: str = "cpu", dtype: str | None = None) -> tuple[Any, str | None]:
    """Load an SAE; see `open_sae`.

    Returns:
        The SAE, and the name by which it was asked for.
    """
    loaded = open_sae(spec, device, dtype)
    return loaded.sae, loaded.name


def open_sae(spec: Any, device: str = "cpu", dtype: str | None = None) -> LoadedSAE:
    """Load an SAE in the dtype of its checkpoint, with where it came from.

    SAELens loads published SAEs in float32 and folders in the dtype that their ``cfg.json`` names,
    whatever the file holds. Here the file decides; a change is a warning.

    Args:
        spec: A SAELens SAE or `LoadedSAE` (taken as it is), a folder with ``cfg.json`` and
            ``sae_weights.safetensors``, a folder of EleutherAI's sparsify, a `SAESpec`,
            ``"release/sae_id"`` or ``"owner/repository/folder"``.
        device: Where to put a loaded SAE.
        dtype: Dtype to load it in, in place of the checkpoint's.

    Returns:
        The SAE and its origin.

    Raises:
        CertifyError: If there is no such folder, release or id; or, before weights are fetched, if
            the configuration cannot be certified.
    """
    if isinstance(spec, LoadedSAE):
        return spec
    if dtype is not None:
        dtype = check_dtype(dtype)
    if isinstance(spec, SAESpec):
        return _published(spec, device, dtype)
    if not isinstance(spec, (str, Path)):
        return LoadedSAE(spec)
    if Path(spec).is_dir():
        return _from_folder(sae_folder(spec), str(spec), device, dtype)
    return _published(parse_spec(str(spec)), device, dtype)


def _from_folder(folder: Path, name: str, device: str, dtype: str | None) -> LoadedSAE:
    named = LoadedSAE(None, name, sae_id=folder.absolute().name)
    if is_sparsify_folder(folder):
        return _sparse_coder(folder, named, device, dtype)
    config, _ = check_source(folder)
    own = OWN_CLASSES.get(config.architecture(), SAE)
    declared = check_dtype(config.dtype)
    with reading(folder):
        stored = file_dtype(folder / WEIGHTS_FILE)
        target = dtype or _natural(declared, stored)
        sae = own.load_from_disk(folder, device=device, dtype=target)
    loaded = replace(named, sae=sae, checkpoint_dtype=stored)
    return _reported(loaded, declared, None if dtype else declared)


def _published(spec: SAESpec, device: str, dtype: str | None) -> LoadedSAE:
    sparse_coder = sparsify_folder(spec)
    if sparse_coder is not None:
        named = LoadedSAE(None, str(spec), spec.release, spec.sae_id)
        return _sparse_coder(sparse_coder, named, device, dtype)
    config, folds = check_source(spec)
    # Other loaders than SAELens's own make the configuration up.
    declared = check_dtype(config.dtype) if spec.loader == "sae_lens" else None
    seen: list[str] = []
    with reading(spec):
        stored = published_dtype(spec)
        target = dtype or _natural(declared, stored)
        if dtype is None and (spec.loader in FLOAT32_LOADERS or folds):
            # A factor is multiplied into the weights: 16 bits would round it.
            target = target if folds and holds(target, "float32") else "float32"
        sae = SAE.from_pretrained(
            spec.release,
            spec.sae_id,
            device=device,
            dtype=target,
            converter=observing_loader(spec, seen),
        )
    if seen:
        stored = seen[0]
        if dtype is None and not folds and stored != target:
            sae = sae.to(dtype=DTYPES[stored])
    loaded = LoadedSAE(sae, str(spec), spec.release, spec.sae_id, stored)
    return _reported(loaded, declared, None if dtype else "float32")


def _sparse_coder(folder: Path, named: LoadedSAE, device: str, dtype: str | None) -> LoadedSAE:
    with reading(folder):
        stored = file_dtype(folder / SPARSIFY_WEIGHTS)
    sae = load_sparsify(folder, device=device, dtype=dtype or stored)
    return _reported(replace(named, sae=sae, checkpoint_dtype=stored), None)


def _natural(declared: str | None, stored: str | None) -> str:
    """Choose what the configuration declares if that keeps every weight, else what the file holds."""
    if declared is not None and (stored is None or holds(declared, stored)):
        return declared
    return stored or "float32"


def _reported(loaded: LoadedSAE, declared: str | None, saelens: str | None = None) -> LoadedSAE:
    """Warn where the SAE computes in another dtype than its checkpoint, or than SAELens would choose.

    Args:
        loaded: The SAE.
        declared: The dtype that the checkpoint's own configuration names.
        saelens: The dtype in which SAELens loads it by default, if nobody asked for another.
    """
    stored, used = loaded.checkpoint_dtype, loaded.dtype
    text = None
    if stored is None:
        text = f"nothing tells in which dtype its checkpoint is stored; it was loaded in {used}"
    elif not holds(used, stored):
        text = f"its checkpoint is stored in {stored}; loading it in {used} rounded its weights"
    elif used not in (stored, declared):
        text = (
            f"its checkpoint is stored in {stored} and was loaded in {used}, which changes no weight "
            "but the arithmetic"
        )
    elif saelens not in (None, used):
        text = (
            f"it was loaded in {used}, as it was saved; SAELens by itself would cast it to {saelens} "
            f"(dtype={saelens!r}, or --sae_dtype {saelens}, does so too)"
        )
    if text is not None:
        warnings.warn(f"SAE {loaded.name!r}: {text}", stacklevel=4)
    return loaded
