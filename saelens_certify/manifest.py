"""Where a certificate came from: everything needed to tell whether two runs are the same run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_certify.build_info import build_info
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.forward import ForwardEngine
from saelens_certify.positions import special_token_ids
from saelens_certify.saes import SAEAdapter
from saelens_certify.version import __version__

FORMAT_VERSION = 1

Manifest = dict[str, Any]

_NOT_COMPUTED = frozenset(
    {
        "metadata",
        "device",
        "n_devices",
        "model_name",
        "_name_or_path",
        "transformers_version",
        "seed",
    }
)
_RECORDED_PACKAGES = ("torch", "sae-lens", "transformer-lens", "transformers", "numpy", "pyarrow")


def build_manifest(
    *,
    engine: ForwardEngine,
    sae: Any,
    adapter: SAEAdapter,
    calibration: Sequences,
    evaluation: Sequences,
    dependence: Mapping[str, Any],
    config: CertifyConfig,
    self_check: Mapping[str, Any],
    sae_id: str | None = None,
    origin: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
    sae_sha256: str | None = None,
) -> Manifest:
    """Collect the provenance of a run.

    Args:
        engine: The model and how its passes are run.
        sae: The SAELens object (its parameters are hashed).
        adapter: The adapter made from it.
        calibration: Calibration sequences.
        evaluation: Evaluation sequences.
        dependence: Which of them repeat each other, or calibration sequences.
        config: Settings.
        self_check: Result of comparing the adapter with ``sae.forward``.
        sae_id: How the user named the SAE: ``release/sae_id`` or a folder.
        origin: Where it was loaded from (`saes.loading.LoadedSAE.origin`).
        model_sha256: Hash of the model's parameters, where it is known (`model_hash`).
        sae_sha256: Hash of the SAE's parameters, where it is known.

    Returns:
        Plain JSON values. ``manifest["identity"]`` holds what must agree for a run to be resumed.
    """
    model = engine.model
    hf_model = getattr(model, "original_model", model)
    model_sha256 = model_sha256 or model_hash(model)
    sae_sha256 = sae_sha256 or parameters_sha256(sae.named_parameters())
    return {
        "identity": {
            "format": FORMAT_VERSION,
            "saelens_certify": __version__,
            "config": config.statement(),
            "model_sha256": model_sha256,
            "model_config_sha256": settings_sha256(_model_settings(hf_model)),
            "d_vocab": engine.d_vocab,
            "special_ids": list(special_token_ids(model)),
            "sae_sha256": sae_sha256,
            "sae_config_sha256": settings_sha256(adapter.config),
            "hook_in": adapter.input_hook,
            "hook_out": adapter.output_hook,
            "calibration_sha256": calibration.digest,
            "evaluation_sha256": evaluation.digest,
        },
        "created_epoch_millis": int(time.time() * 1000),
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "build": build_info(),
        "model": {
            "name": getattr(model.cfg, "model_name", None),
            "class": type(model).__name__,
            "n_layers": engine.n_layers,
            "d_model": int(model.cfg.d_model),
            "d_vocab": engine.d_vocab,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": str(engine.device),
            "n_parameters": sum(p.numel() for p in hf_model.parameters()),
            "suffix_reuse": engine.strategy.suffix,
            "chunked_head": engine.strategy.chunked_head,
            "fused_head": engine.strategy.fused_head,
            "suffix_difference": engine.strategy.suffix_difference,
            "head_difference": engine.strategy.head_difference,
            "fused_difference": engine.strategy.fused_difference,
        },
        "sae": {
            "id": sae_id,
            "origin": dict(origin or {}),
            "architecture": adapter.architecture,
            "encoder": type(adapter).__name__,
            "d_in": adapter.d_in,
            "d_sae": adapter.d_sae,
            "dtype": str(next(sae.parameters()).dtype).removeprefix("torch."),
            "device": str(adapter.device),
            "config": _plain(dict(adapter.config)),
            "self_check": dict(self_check),
        },
        "data": {
            name: {
                "n_sequences": len(sequences),
                "seq_len": sequences.seq_len,
                "sha256": sequences.digest,
                "source": sequences.source.to_dict(),
            }
            for name, sequences in (("calibration", calibration), ("evaluation", evaluation))
        },
        "dependence": dict(dependence),
    }


def model_hash(model: Any) -> str:
    """Hash the parameters of a TransformerLens model."""
    return parameters_sha256(getattr(model, "original_model", model).named_parameters())


def provenance(manifest: Manifest) -> dict[str, Any]:
    """Return what a reader of ``certificate.json`` alone needs; local paths lose their folders."""
    model, sae = manifest["model"], manifest["sae"]
    return {
        "model": {name: model[name] for name in ("name", "class", "dtype")},
        "sae": {name: sae.get(name) for name in ("architecture", "dtype", "origin")},
        "data": {
            name: {"n_sequences": side["n_sequences"], "source": _without_folders(side["source"])}
            for name, side in manifest["data"].items()
        },
        "dependence": manifest["dependence"],
        "versions": manifest["versions"],
    }


def differences(ours: Manifest, theirs: Manifest) -> list[str]:
    """Say in which entries of their identity two manifests differ, each as ``"name: a, not b"``."""
    a, b = _flat(ours["identity"]), _flat(theirs.get("identity", {}))
    return [
        f"{key} is {_short(b.get(key))} there, {_short(a.get(key))} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


@torch.no_grad()
def parameters_sha256(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash parameters by name, dtype, shape and bytes, in the order of their names.

    Args:
        parameters: ``module.named_parameters()``.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        raw = parameter.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """Hash what a configuration says about the computation: not names, devices or metadata."""
    kept = {
        key: value
        for key, value in _plain(settings).items()
        if key not in _NOT_COMPUTED and " at 0x" not in str(value)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _model_settings(model: Any) -> Mapping[str, Any]:
    """Return the settings of a Hugging Face model or a HookedTransformer."""
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    return config.to_dict() if config is not None and hasattr(config, "to_dict") else {}


def _without_folders(source: Mapping[str, Any]) -> dict[str, Any]:
    location = source.get("location")
    if location is not None and source.get("kind") != "hub":
        location = Path(location).name
    return {**source, "location": location}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES}


def _plain(value: Any) -> Any:
    """Reduce a configuration to JSON values; what is none becomes its repr."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    return repr(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out |= _flat(item, f"{prefix}{key}.")
        else:
            out[prefix + key] = item
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:14]}…"
