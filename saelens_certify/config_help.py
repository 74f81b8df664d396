"""What each setting of a certificate means, taken from the docstring of `CertifyConfig`."""

from __future__ import annotations

import dataclasses

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
