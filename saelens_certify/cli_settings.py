"""The settings of a certificate as options of a command, each declared once: in `CertifyConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.config_help import setting_descriptions, setting_kind


def add_settings(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None
) -> None:
    """Add one option for every field of `CertifyConfig`, under its own name.

    Args:
        parser: The parser of a command.
        defaults: Defaults that are not those of `CertifyConfig`.
    """
    defaults = defaults or {}
    help_texts = setting_descriptions()
    group = parser.add_argument_group("settings of the certificate")
    for field in dataclasses.fields(CertifyConfig):
        default = defaults.get(field.name, field.default)
        keywords: dict[str, Any] = {
            "default": default,
            "help": help_texts[field.name].replace("%", "%%"),
        }
        if isinstance(field.default, bool):
            keywords["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            keywords |= {"type": int, "nargs": "*", "metavar": "INT"}
        else:
            kind = setting_kind(field)
            keywords |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(f"--{field.name}", **keywords)


def config_of(options: argparse.Namespace) -> CertifyConfig:
    """Return the settings that the options of `add_settings` make.

    Raises:
        CertifyError: If a value is none that its setting can have.
    """
    return CertifyConfig.from_dict(
        {field.name: getattr(options, field.name) for field in dataclasses.fields(CertifyConfig)}
    )
