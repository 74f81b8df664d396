"""The SAEs of an experiment, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from saelens_certify.errors import CertifyError
from saelens_certify.saes import adapt
from saelens_certify.saes.loading import open_sae


def named_saes(saes: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Open SAEs and name those that have no name.

    Args:
        saes: SAEs by name; or a list of them, which are named by their output hooks (``blocks.6.hook_resid_post``,
            and ``blocks.6.hook_resid_post_2`` for the next at the same). Each is what `certify` takes.

    Returns:
        What `open_sae` returned, by name, in the order given.

    Raises:
        CertifyError: If there is none, one SAE was given in place of several, or one cannot be opened.
    """
    if isinstance(saes, Mapping):
        if len({str(name) for name in saes}) < len(saes):
            raise CertifyError(f"two of the names {list(saes)} are the same as text; rename one")
        opened = {str(name): open_sae(sae) for name, sae in saes.items()}
    elif isinstance(saes, Sequence) and not isinstance(saes, (str, bytes)):
        opened, at = {}, Counter()
        for sae in saes:
            loaded = open_sae(sae)
            hook = adapt(loaded.sae).output_hook
            at[hook] += 1
            opened[hook if at[hook] == 1 else f"{hook}_{at[hook]}"] = loaded
    else:
        raise CertifyError(
            f"saes must be {{name: SAE}} or a list of SAEs, got {type(saes).__name__}; put a single one into a list"
        )
    if not opened:
        raise CertifyError("saes is empty: give at least one SAE")
    return opened
