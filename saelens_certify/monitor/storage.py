"""A monitor's state on disk, so that a restarted service goes on with the same guarantee."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.monitor.state import State
from saelens_certify.storage import dump_json, write_atomically

FORMAT_VERSION = 1

Arrived = tuple[int, int]


def write_state(
    path: str | Path,
    certificate: Certificate,
    settings: dict[str, Any],
    state: State,
    arrived: Arrived,
) -> None:
    """Write a state; the file is either the old one or the new one, never a part.

    Args:
        path: The file; its folder is made if missing.
        certificate: What is monitored.
        settings: Settings that must be the same to go on.
        state: The state.
        arrived: Requests and sequences that have been seen, which number the next ones.

    Raises:
        CertifyError: If it cannot be written.
    """
    values = {
        "format": FORMAT_VERSION,
        "identity": certificate.manifest["identity"],
        "settings": settings,
        "arrived": list(arrived),
        "state": state.to_dict(),
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_json(values))
    except OSError as error:
        raise CertifyError(f"the state cannot be written to {str(path)!r}: {error}") from error


def read_state(
    path: str | Path, certificate: Certificate, settings: dict[str, Any], fresh: State
) -> tuple[State, Arrived]:
    """Read a state.

    Args:
        path: The file.
        certificate: What is monitored.
        settings: The monitor's settings.
        fresh: A state of the monitor, whose reference is kept.

    Returns:
        The state and the numbers of the next request and sequence.

    Raises:
        CertifyError: If the file is missing, damaged, or of another certificate or other settings.
    """
    try:
        values = json.loads(Path(path).read_bytes())
        version, identity, stored = values["format"], values["identity"], values["settings"]
    except FileNotFoundError:
        raise CertifyError(f"there is no monitor state at {str(path)!r}") from None
    except OSError as error:
        raise CertifyError(f"the state {str(path)!r} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CertifyError(f"{str(path)!r} is no monitor state ({error!r})") from error
    if version != FORMAT_VERSION:
        raise CertifyError(
            f"{str(path)!r} has format {version}, this version reads {FORMAT_VERSION}"
        )
    if identity != certificate.manifest["identity"]:
        raise CertifyError(f"{str(path)!r} was saved by a monitor of another certificate")
    for name, value in settings.items():
        if stored.get(name) != value:
            raise CertifyError(
                f"{str(path)!r} was saved with {name} = {stored.get(name)!r}, the monitor has {value!r}; "
                "the guarantee is about one setting throughout"
            )
    try:
        requests, sequences = (int(n) for n in values["arrived"])
        return fresh.restored(values["state"]), (requests, sequences)
    except (ValueError, KeyError, TypeError) as error:
        raise CertifyError(f"{str(path)!r} is damaged ({error!r})") from error
