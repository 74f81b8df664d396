"""Certificates of many evaluations: one folder each, and none issued twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.errors import CertifyError
from saelens_certify.manifest import parameters_sha256, settings_sha256

Group = dict[str, Any]


class Certificates:
    """The certificates that SAELens's functions ask for while the group is registered.

    ``multiple_evals`` goes through several SAEs, and evaluates each with several context lengths and
    datasets. Each SAE on each set of documents gets a folder of its own, and where only SAELens's context length
    differs, which a certificate does not depend on, the certificate is the one already issued.

    Args:
        root: Folder of the folders; None keeps numbers only.

    Raises:
        CertifyError: If root is a file.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = None if root is None else Path(root)
        if self.root is not None and self.root.exists() and not self.root.is_dir():
            raise CertifyError(
                f"output={str(root)!r} is a file; while registered it is a folder, with a folder in it "
                "for each SAE"
            )
        self._groups: dict[str, Group] = {}

    def group(
        self,
        issue: Callable[[Sequences, Sequences, Path | None], Group],
        *,
        model: Any,
        sae: Any,
        calibration: Sequences,
        evaluation: Sequences,
        config: CertifyConfig,
    ) -> Group:
        """The numbers of one certificate: issued now, unless they are known.

        Args:
            issue: Issues the certificate on calibration and evaluation sequences into a folder.
            model: The model to be certified on.
            sae: The SAE to be certified.
            calibration: Its calibration sequences.
            evaluation: Its evaluation sequences.
            config: Settings.

        Returns:
            The numbers.
        """
        key = _identity(model, sae, calibration, evaluation, config)
        if key not in self._groups:
            folder = None
            if self.root is not None:
                name = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(sae.cfg.metadata.hook_name))
                folder = self.root / f"{name}-{key[:16]}"
            self._groups[key] = issue(calibration, evaluation, folder)
        return dict(self._groups[key])


def _identity(
    model: Any, sae: Any, calibration: Sequences, evaluation: Sequences, config: CertifyConfig
) -> str:
    """Hash everything that a certificate is about."""
    hf_model = getattr(model, "original_model", model)
    parts = [
        type(model).__name__,
        *(
            parameters_sha256(itertools.chain(part.named_parameters(), part.named_buffers()))
            for part in (hf_model, sae)
        ),
        type(sae).__name__,
        settings_sha256(sae.cfg.to_dict()),
        sae.cfg.metadata.hook_name,
        calibration.digest,
        evaluation.digest,
        config.statement(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
