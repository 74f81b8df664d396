"""What each setting of a certificate means, taken from the docstring of `CertifyConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from saelens_certify.config import CertifyConfig


def setting_descriptions() -> dict[str, str]:
    """Return the description of every setting, in plain text."""
    names = {field.name for field in dataclasses.fields(CertifyConfig)}
    texts: dict[str, str] = {}
    for line in (CertifyConfig.__doc__ or "").split("Attributes:")[1].splitlines():
        stripped = line.strip()
        name, colon, rest = stripped.partition(": ")
        if colon and name in names:
            texts[name] = rest
        elif stripped and texts:
            texts[next(reversed(texts))] += f" {stripped}"
    return {name: text.replace("``", "") for name, text in texts.items()}


def setting_kind(field: dataclasses.Field[Any]) -> type:
    """Return the type in which a setting is given on a command line."""
    if field.default is not None:
        return type(field.default)
    # Settings that default to None are rules, or numbers that depend on the machine.
    return str if "str" in str(field.type) else int
