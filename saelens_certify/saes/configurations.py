"""What an SAE's configuration tells before any weights are fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from saelens_certify.errors import CertifyError
from saelens_certify.saes.architectures import check_architecture, check_config
from saelens_certify.saes.sources import CONFIG_FILE, SAESpec, near_releases, registry
from saelens_certify.saes.sparsify import SPARSIFY_WEIGHTS, is_sparsify_folder, sparsify_config


def check_source(source: Path | SAESpec) -> tuple[Any, bool]:
    """Check all that an SAE's configuration tells by itself; see `read_source`.

    Raises:
        CertifyError: With the reason, if it cannot be certified.
    """
    config, folds = read_source(source)
    check_config(config)
    return config, folds


def read_source(source: Path | SAESpec) -> tuple[Any, bool]:
    """Read the configuration of an SAE in any format; no weights are fetched or read.

    Returns:
        The configuration, and whether SAELens folds a scale into the weights while it loads them.

    Raises:
        CertifyError: If it cannot be read, or is of a kind that cannot be certified.
    """
    sparse_coder = sparsify_folder(source, weights=False)
    if sparse_coder is not None:
        return sparsify_config(sparse_coder), False
    if isinstance(source, SAESpec):
        check_decoders(source)
    return read_config(source)


def read_config(source: Path | SAESpec) -> tuple[Any, bool]:
    """Read a configuration in SAELens's format.

    Args:
        source: An SAE folder in SAELens's format, or a published SAE.

    Returns:
        The ``sae.cfg`` that loading would give, and whether SAELens folds a scale of the activations
        into the weights while it loads them.

    Raises:
        CertifyError: If it cannot be read, its architecture cannot be certified, or nobody knows
            the architecture.
    """
    from sae_lens.loading.pretrained_sae_loaders import (
        get_sae_lens_config_from_disk,
        handle_config_defaulting,
        load_sae_config_from_huggingface,
    )

    with reading(source):
        if isinstance(source, SAESpec):
            values = load_sae_config_from_huggingface(source.release, source.sae_id)
        else:
            values = get_sae_lens_config_from_disk(source)
            if not isinstance(values, dict):
                raise _incomplete(source, f"holds {json.dumps(values)[:40]}, no object")
            if not isinstance(values.get("metadata", {}), dict):
                raise _incomplete(source, "has a metadata that is no object")
            # SAELens fills in defaults by architecture, and fails on one that it does not know.
            sae_class(values.get("architecture", "standard"))
            values = handle_config_defaulting(values)
        config_class = sae_class(values["architecture"])[1]
        missing = [name for name in _required(config_class) if name not in values]
        if missing:
            raise _incomplete(source, f"has no {' and no '.join(missing)}")
        config = config_class.from_dict(values)
    folds = (
        isinstance(source, SAESpec)
        and config.normalize_activations == "expected_average_only_in"
        and source.norm_scaling_factor is not None
    )
    if folds:
        config.normalize_activations = "none"
    return config, folds


def _required(config_class: Any) -> list[str]:
    """Names of the settings that have no default."""
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def _incomplete(source: Path | SAESpec, problem: str) -> CertifyError:
    return CertifyError(
        f"the {CONFIG_FILE} of SAE {str(source)!r} {problem}; it must be a JSON object with "
        "architecture, d_in, d_sae and metadata (hook_name, model_name), as sae.save_model(folder) "
        "writes it"
    )


def sae_class(architecture: str) -> tuple[Any, Any]:
    """Return the class of an architecture, of SAELens's registry or our own, and that of its ``cfg``.

    Raises:
        CertifyError: If it cannot be certified, or there is none.
    """
    from sae_lens.registry import SAE_CLASS_REGISTRY

    from saelens_certify.saes.classes import OWN_CLASSES

    check_architecture(architecture)
    if architecture in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY[architecture]
    if architecture in OWN_CLASSES:
        return OWN_CLASSES[architecture], OWN_CLASSES[architecture].config_class
    raise CertifyError(
        f"SAELens has no SAE architecture {architecture!r} (it has {', '.join(SAE_CLASS_REGISTRY)}); "
        "import the package that registers it first"
    )


def check_decoders(source: SAESpec) -> None:
    """Check that the SAE's decoder writes to one layer.

    Raises:
        CertifyError: If it is a cross-layer transcoder, whose decoders SAELens adds up.
    """
    entry = registry().get(source.release)
    folder = entry.saes_map.get(source.sae_id, "") if entry is not None else ""
    if source.loader == "mntss_clt_layer_transcoder" or (
        source.loader == "gemma_3" and "clt" in folder
    ):
        raise CertifyError(
            "it is one layer of a cross-layer transcoder: SAELens adds up its decoders of all later "
            "layers, which serves to find active features and reconstructs nothing; certify a "
            "transcoder of one layer"
        )


def sparsify_folder(source: Path | SAESpec, *, weights: bool = True) -> Path | None:
    """Return the local folder of a sparsify checkpoint, fetching it if it is a repository's.

    Args:
        source: A folder or a published SAE.
        weights: Whether to fetch the weights too.

    Returns:
        The folder; None if the source is in SAELens's format.
    """
    if isinstance(source, Path):
        return source if is_sparsify_folder(source) else None
    if source.release in registry():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with reading(source):
        config = Path(hf_hub_download(source.release, f"{source.sae_id}/{CONFIG_FILE}"))
        if "expansion_factor" not in json.loads(config.read_text(encoding="utf-8")):
            return None
        if weights:
            hf_hub_download(source.release, f"{source.sae_id}/{SPARSIFY_WEIGHTS}")
        with contextlib.suppress(EntryNotFoundError):  # the training run's settings
            parent = PurePosixPath(source.sae_id).parent
            hf_hub_download(source.release, str(parent / "config.json"))
    return config.parent


@contextmanager
def reading(source: Path | SAESpec) -> Iterator[None]:
    """Turn whatever goes wrong while an SAE is read into an error that names it."""
    try:
        yield
    except CertifyError:
        raise
    except Exception as error:
        hint = ""
        if isinstance(source, SAESpec) and source.release not in registry():
            hint = (
                f". {source.release!r} is no release of SAELens and was taken for a Hugging Face "
                f"repository{near_releases(source.release.partition('/')[0])}"
            )
        raise CertifyError(
            f"SAE {str(source)!r} cannot be read: {type(error).__name__}: {error}{hint}"
        ) from error
