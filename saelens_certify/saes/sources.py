"""Where an SAE is: a folder, or an entry of SAELens's registry."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelens_certify.errors import CertifyError

CONFIG_FILE = "cfg.json"


@dataclass(frozen=True)
class SAESpec:
    """A published SAE, by the two names that ``SAE.from_pretrained`` takes.

    Attributes:
        release: A release of SAELens's registry, or a Hugging Face repository ``owner/name``.
        sae_id: The SAE's id in the release, or its folder in the repository.
    """

    release: str
    sae_id: str

    def __str__(self) -> str:
        return f"{self.release}/{self.sae_id}"

    @property
    def registered(self) -> bool:
        """Whether SAELens's registry has this SAE."""
        entry = registry().get(self.release)
        return entry is not None and self.sae_id in entry.saes_map

    @property
    def loader(self) -> str:
        """Name of the SAELens loader that converts this SAE."""
        entry = registry().get(self.release)
        return (entry.conversion_func if entry is not None else None) or "sae_lens"

    @property
    def norm_scaling_factor(self) -> float | None:
        """Factor that SAELens folds into the weights for ``expected_average_only_in``."""
        entry = registry().get(self.release)
        return None if entry is None else entry.norm_scaling_factor.get(self.sae_id)


def registry() -> dict[str, Any]:
    """Return SAELens's registry of published SAEs, by release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def parse_spec(text: str) -> SAESpec:
    """Split ``"release/sae_id"`` where the release ends.

    Args:
        text: A registered release and one of its ids, or a Hugging Face repository and a folder in it:
            ``"owner/name/sub/folder"``. If SAELens's registry has that very folder, its entry is used:
            it alone carries the conversion, the overrides and the scale of normalisation.

    Returns:
        The two names. Whether a repository exists is not looked up.

    Raises:
        CertifyError: If the registry has no such release or id and the text can be no repository.
    """
    first, _, rest = text.partition("/")
    if not rest or text.startswith((".", "/", "~")):
        raise CertifyError(
            f"SAE {text!r} is neither an existing folder nor of the form 'release/sae_id', "
            "e.g. 'gpt2-small-res-jb/blocks.6.hook_resid_pre'"
        )
    if first in registry():
        return _registered(SAESpec(first, rest))
    name, _, folder = rest.partition("/")
    if not folder:
        raise CertifyError(
            f"SAELens knows no release {first!r} and there is no such folder{near_releases(first)}"
        )
    return _entry_of(SAESpec(f"{first}/{name}", folder))


def _registered(spec: SAESpec) -> SAESpec:
    ids = list(registry()[spec.release].saes_map)
    if spec.sae_id not in ids:
        near = difflib.get_close_matches(spec.sae_id, ids, n=4) or ids[:4]
        raise CertifyError(
            f"release {spec.release!r} has no SAE {spec.sae_id!r}; it has {len(ids)}, e.g. "
            f"{', '.join(near)}"
        )
    return spec


def _entry_of(spec: SAESpec) -> SAESpec:
    """Return the registered name of a folder of a repository, if it has one."""
    for release, entry in registry().items():
        if entry.repo_id == spec.release:
            for sae_id, folder in entry.saes_map.items():
                if folder == spec.sae_id:
                    return SAESpec(release, sae_id)
    return spec


def matching(release_pattern: str, sae_pattern: str) -> list[SAESpec]:
    """Choose registered SAEs by two regular expressions, as ``sae_lens.evals`` does.

    Args:
        release_pattern: Must match the whole name of the release.
        sae_pattern: Must match the whole id of the SAE.

    Returns:
        The SAEs, in the order of the registry.

    Raises:
        CertifyError: If a pattern is no regular expression, or nothing matches: with the releases or
            ids that it would have matched in part, or near ones.
    """
    release_rx, sae_rx = _compiled(release_pattern), _compiled(sae_pattern)
    releases = [name for name in registry() if release_rx.fullmatch(name)]
    if not releases:
        raise CertifyError(
            f"no release of SAELens matches {release_pattern!r} as a whole"
            f"{_near_pattern(release_rx, registry())}"
        )
    ids = [
        SAESpec(release, sae_id) for release in releases for sae_id in registry()[release].saes_map
    ]
    found = [spec for spec in ids if sae_rx.fullmatch(spec.sae_id)]
    if not found:
        raise CertifyError(
            f"none of the {len(ids)} SAEs of {_some(releases)} matches {sae_pattern!r} as a whole"
            f"{_near_pattern(sae_rx, [spec.sae_id for spec in ids])}"
        )
    return found


def sae_folders(root: str | Path) -> list[Path]:
    """Find the SAE folders below a folder, in the order of their names.

    Args:
        root: A folder; if it is an SAE's own folder, the list holds it alone.
    """
    root = Path(root)
    if (root / CONFIG_FILE).exists():
        return [root]
    return sorted(path.parent for path in root.rglob(CONFIG_FILE))


def sae_folder(path: str | Path) -> Path:
    """Return the SAE folder that a path names.

    Raises:
        CertifyError: If it holds no ``cfg.json``; with the SAE folders below it, if there are any.
    """
    path = Path(path)
    if (path / CONFIG_FILE).exists():
        return path
    inside = [str(folder.relative_to(path)) for folder in sae_folders(path)]
    raise CertifyError(
        f"{str(path)!r} is no SAE folder: it has no {CONFIG_FILE}"
        + (f"; it holds SAE folders {_some(inside)}" if inside else "")
    )


def near_releases(name: str) -> str:
    """Say which releases are called alike, as the end of a message."""
    near = difflib.get_close_matches(name, list(registry()), n=4)
    return f"; near releases: {', '.join(near)}" if near else ""


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CertifyError(f"{pattern!r} is no regular expression: {error}") from None


def _near_pattern(pattern: re.Pattern[str], names: Iterable[str]) -> str:
    """Say which names the pattern matches in part or, if none, which look like it."""
    names = list(names)
    partly = [name for name in names if pattern.search(name)]
    if partly:
        return f", but in part {_some(partly)}; allow for the rest with '.*'"
    plain = re.sub(r"\\(.)", r"\1", pattern.pattern)
    near = difflib.get_close_matches(plain, names, n=4)
    return f"; near names: {', '.join(near)}" if near else f"; there are {_some(names)}"


def _some(names: list[str], n: int = 4) -> str:
    rest = len(names) - n
    return ", ".join(names[:n]) + (f" and {rest} more" if rest > 0 else "")
