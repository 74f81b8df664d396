"""What a study has done of a pass that is not finished: kept beside the runs' folders until they are sealed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from saelens_certify.data import Sequences
from saelens_certify.errors import EvidenceError
from saelens_certify.evidence import SEQUENCE, dump_table, read_table
from saelens_certify.manifest import Manifest
from saelens_certify.pool import Calibration
from saelens_certify.storage import write_atomically
from saelens_certify.subject import Reader

FOLDER = "in-progress"
_DONE = "n_sequences_done"
_SEAL = "sha256"
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
        return CalibrationPlace(self._folder(what))

    def evaluation(self, name: str, sequences: Sequences) -> EvaluationPlace:
        """Where the evidence of a run over these sequences is kept."""
        return EvaluationPlace(self._folder([sequences.digest, self.identities[name]]))

    def remove(self, places: Iterable[CalibrationPlace | EvaluationPlace]) -> None:
        """Delete what the runs' folders have now; what other studies left stays."""
        for place in places:
            shutil.rmtree(place.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _folder(self, what: Any) -> Path:
        text = json.dumps(what, sort_keys=True)
        return self.path / hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CalibrationPlace:
    """A calibration after the parts that were done.

    Attributes:
        folder: Its folder.
    """

    folder: Path

    @property
    def file(self) -> Path:
        """The file."""
        return self.folder / "calibration.safetensors"

    def load(self, empty: tuple[int, Calibration]) -> tuple[int, Calibration]:
        """Return the number of sequences that were read and the calibration after these.

        Raises:
            EvidenceError: If the file is damaged.
        """
        if not self.file.exists():
            return empty
        try:
            tensors = safetensors.torch.load(self.file.read_bytes())
            if not torch.equal(tensors.pop(_SEAL), _seal(tensors)):
                raise ValueError("its contents are not those that were written")
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
        tensors[_SEAL] = _seal(tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, safetensors.torch.save(tensors))


@dataclass(frozen=True)
class EvaluationPlace:
    """Measured parts of one run.

    Attributes:
        folder: The folder.
    """

    folder: Path

    def read(self, index: int, hashes: Sequence[str]) -> pa.Table | None:
        """Return a part, or None if it was not measured yet.

        Args:
            index: Its number.
            hashes: The sequences that it must hold.

        Raises:
            EvidenceError: If the file is damaged, or holds other sequences.
        """
        file = self._file(index)
        if not file.exists():
            return None
        table = read_table(file)
        if SEQUENCE not in table.column_names or table.column(SEQUENCE).to_pylist() != list(hashes):
            raise EvidenceError(
                f"{file} does not hold the sequences of part {index} of this study; delete it and run again"
            )
        return table.drop_columns([SEQUENCE])

    def write(self, index: int, hashes: Sequence[str], table: pa.Table) -> None:
        """Keep a part that was measured on these sequences."""
        self.folder.mkdir(parents=True, exist_ok=True)
        named = table.append_column(SEQUENCE, pa.array(hashes))
        write_atomically(self._file(index), dump_table(named))

    def _file(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.parquet"


def _seal(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of tensors by name, as a tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")
