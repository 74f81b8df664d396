"""What can be refused from configurations alone: an audit of many SAEs fails before it starts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.preflight import check_settings, pair_rules
from saelens_certify.saes.architectures import check_architecture
from saelens_certify.saes.architectures import check_config as check_sae_config
from saelens_certify.saes.configurations import read_source
from saelens_certify.saes.sources import SAESpec, parse_spec, sae_folder


def check_config(sae: Any, model: Any = None, config: CertifyConfig | None = None) -> None:
    """Check, without weights of the SAE, whether it would be refused.

    These are the rules of `certify` as far as configurations tell: architecture, normalisation, hooks,
    single heads, decoders of several layers, widths, the model's name and context. What needs
    weights or activations is checked when the SAE is certified.

    Args:
        sae: A folder, ``"release/sae_id"``, a `SAESpec`, an SAE's configuration (``sae.cfg``), or an SAE.
        model: The model, or its configuration (``model.cfg``), of which fewer rules can be checked.
        config: Settings of the certificate.

    Raises:
        CertifyError: With every reason.
    """
    check_configs([sae], model, config)


def check_configs(
    saes: Iterable[Any], model: Any = None, config: CertifyConfig | None = None
) -> None:
    """Check many SAEs without their weights; see `check_config`.

    Raises:
        CertifyError: Naming every SAE that would be refused, with every reason.
    """
    saes = list(saes)
    if config is not None:
        CertifyConfig.check(config)
    refused = {_name(sae): reasons for sae in saes if (reasons := refusals(sae, model, config))}
    if not refused:
        return
    if len(saes) == 1:
        [(name, reasons)] = refused.items()
        listed = f" {reasons[0]}" if len(reasons) == 1 else "".join(f"\n- {r}" for r in reasons)
        raise CertifyError(f"SAE {name!r} cannot be certified:{listed}")
    lines = [f"\n- {name}: {text}" for name, reasons in refused.items() for text in reasons]
    raise CertifyError(
        f"{len(refused)} of {len(saes)} SAEs cannot be certified; nothing was measured:"
        + "".join(lines)
    )


def refusals(sae: Any, model: Any = None, config: CertifyConfig | None = None) -> list[str]:
    """Return every reason for which an SAE would be refused; see `check_config`.

    Raises:
        CertifyError: If the model is neither a model nor its configuration.
    """
    reasons: list[str] = []
    if model is not None and not (hasattr(model, "hook_dict") or hasattr(model, "d_model")):
        raise CertifyError(
            f"{type(model).__name__} ({model!r:.60}) is neither a model of TransformerLens nor its "
            "configuration; pass the model or model.cfg"
        )

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except CertifyError as error:
            reasons.append(str(error))
            return None

    settings = attempt(_settings, sae)
    if settings is None:
        return reasons
    attempt(check_sae_config, settings)
    if config is not None:
        _warn_about_context(settings, config, _name(sae))
    if model is None:
        return reasons
    if config is not None:
        model_config = model.cfg if hasattr(model, "hook_dict") else model
        attempt(check_settings, SimpleNamespace(cfg=model_config), config)
    with contextlib.suppress(CertifyError):  # hooks that are missing are among the reasons already
        for rule in pair_rules(model, settings):
            attempt(rule)
    return reasons


def _settings(sae: Any) -> Any:
    """Return the configuration of an SAE in any form that `check_config` takes."""
    if isinstance(sae, (str, Path)):
        sae = sae_folder(sae) if Path(sae).is_dir() else parse_spec(str(sae))
    if isinstance(sae, (Path, SAESpec)):
        return read_source(sae)[0]
    settings = getattr(sae, "cfg", sae)
    if not hasattr(settings, "architecture"):
        raise CertifyError(
            f"{type(sae).__name__} is neither an SAE nor its configuration; pass a folder, "
            "'release/sae_id', a SAESpec, sae.cfg or the SAE"
        )
    check_architecture(settings.architecture())
    return settings


def _warn_about_context(settings: Any, config: CertifyConfig, name: str) -> None:
    context = settings.metadata.context_size
    if isinstance(context, int) and config.seq_len > context:
        warnings.warn(
            f"SAE {name!r} was trained on contexts of {context} tokens; with seq_len = "
            f"{config.seq_len} it is certified on positions that it never saw",
            stacklevel=5,
        )


def _name(sae: Any) -> str:
    if isinstance(sae, (str, Path, SAESpec)):
        return str(sae)
    metadata = getattr(getattr(sae, "cfg", sae), "metadata", None)
    return str(getattr(metadata, "hook_name", None) or type(sae).__name__)
