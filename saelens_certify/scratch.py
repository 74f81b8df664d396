"""What a study has done of a pass that is not finished: kept beside the runs' folders until they are sealed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch

from saelens_certify.data import Sequences
from saelens_certify.errors import EvidenceError
from saelens_certify.evidence import dump_table, read_table
from saelens_certify.manifest import Manifest
from saelens_certify.pool import Calibration
from saelens_certify.storage import write_atomically
from saelens_certify.subject import Reader

FOLDER = "in-progress"
_DONE = "n_sequences_done"
_FIELDS = ("counts", "target_counts", "activation_sums", "activation_tokens")
# What decides the counts of a run, beside its reader.
_COUNTED = (
    "saelens_certify", "model_sha256", "model_config_sha256", "special_ids", "sae_sha256", "sae_config_sha256",
    "hook_in", "hook_out", "calibration_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Scratch:
    """A study's unfinished passes.

    Everything in it is filed under a hash of what it depends on, so that what another study left behind
    is never read.

    Attributes:
        path: The folder.
        identities: ``manifest["identity"]`` of each run that is not finished.
    """

    path: Path
    identities: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, output: Path, manifests: Mapping[str, Manifest]) -> Scratch:
        """Return the scratch of the runs that are not finished."""
        return cls(output / FOLDER, {name: m["identity"] for name, m in manifests.items()})

    def calibration(self, name: str, reader: Reader) -> CalibrationPlace:
        """Where the calibration of a run is kept; runs that count alike have one place."""
        identity = self.identities[name]
        config = reader.config
        what = [
            {key: identity[key] for key in _COUNTED},
            [config.coding, config.positions, config.part_sequences, reader.length],
            None if reader.rows is None else reader.rows.nonzero().flatten().tolist(),
        ]
        return CalibrationPlace(self._folder(what) / "calibration.safetensors")

    def evaluation(self, name: str, sequences: Sequences) -> EvaluationPlace:
        """Where the evidence of a run over these sequences is kept."""
        return EvaluationPlace(self._folder([sequences.digest, self.identities[name]]))

    def remove(self) -> None:
        """Delete everything: the runs' folders have it now."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _folder(self, what: Any) -> Path:
        text = json.dumps(what, sort_keys=True)
        folder = self.path / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class CalibrationPlace:
    """A calibration after the parts that were done.

    Attributes:
        file: The file.
    """

    file: Path

    def load(self, empty: tuple[int, Calibration]) -> tuple[int, Calibration]:
        """Return the number of sequences that were read and the calibration after these.

        Raises:
            EvidenceError: If the file is damaged.
        """
        if not self.file.exists():
            return empty
        try:
            tensors = safetensors.torch.load(self.file.read_bytes())
            fields = {field: tensors[field] for field in _FIELDS}
            found = Calibration(**fields, n_sequences=int(tensors["n_sequences"]))
            return int(tensors[_DONE]), found
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise EvidenceError(
                f"{self.file} cannot be read ({error}); it is damaged: delete it and run again"
            ) from error

    def save(self, done: int, calibration: Calibration) -> None:
        """Keep the calibration after so many sequences were read."""
        tensors = {field: getattr(calibration, field).contiguous() for field in _FIELDS}
        tensors[_DONE] = torch.tensor(done, device="cpu")
        tensors["n_sequences"] = torch.tensor(calibration.n_sequences, device="cpu")
        write_atomically(self.file, safetensors.torch.save(tensors))


@dataclass(frozen=True)
class EvaluationPlace:
    """Measured parts of one run.

    Attributes:
        folder: The folder.
    """

    folder: Path

    def read(self, index: int) -> pa.Table | None:
        """Return a part, or None if it was not measured yet.

        Raises:
            EvidenceError: If the file is damaged.
        """
        file = self._file(index)
        return read_table(file) if file.exists() else None

    def write(self, index: int, table: pa.Table) -> None:
        """Keep a part that was measured."""
        write_atomically(self._file(index), dump_table(table))

    def _file(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.parquet"
