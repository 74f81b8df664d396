"""The SAELens-style classes of this package, by architecture."""

from __future__ import annotations

from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class

from saelens_certify.errors import CertifyError
from saelens_certify.saes.classes.groupmax import (
    GroupMaxSAE,
    GroupMaxSkipTranscoder,
    GroupMaxTranscoder,
)
from saelens_certify.saes.classes.topk_transcoder import TopKSkipTranscoder, TopKTranscoder

OWN_CLASSES: dict[str, Any] = {
    cls.config_class.architecture(): cls
    for cls in (
        TopKTranscoder,
        TopKSkipTranscoder,
        GroupMaxSAE,
        GroupMaxTranscoder,
        GroupMaxSkipTranscoder,
    )
}


def register_with_sae_lens() -> None:
    """Let ``sae_lens.SAE.load_from_disk`` load the classes of this package too.

    The registry belongs to the user's whole process, so nothing here fills it unasked: without
    this call, ``OWN_CLASSES[architecture].load_from_disk(folder)`` loads what ``save_model``
    wrote, and so does every function of this package that takes a folder. Calling it again does
    nothing.

    Raises:
        CertifyError: If another class is registered under one of the names; then none is added.
    """
    for architecture, cls in OWN_CLASSES.items():
        known = SAE_CLASS_REGISTRY.get(architecture)
        if known is not None and known[0] is not cls:
            raise CertifyError(
                f"SAELens already knows an SAE class for architecture {architecture!r}: "
                f"{known[0].__module__}.{known[0].__qualname__}; nothing was registered"
            )
    for architecture, cls in OWN_CLASSES.items():
        if architecture not in SAE_CLASS_REGISTRY:
            register_sae_class(architecture, cls, cls.config_class)
