"""Evidence on disk: one row a sequence, in parts that survive a crash."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from saelens_certify.errors import CertifyError, EvidenceError
from saelens_certify.manifest import Manifest, differences
from saelens_certify.outputs import Columns
from saelens_certify.pool import Calibration
from saelens_certify.storage import dump_json, write_atomically

MANIFEST = "manifest.json"
CALIBRATION = "calibration.safetensors"
EVIDENCE = "evidence"
CERTIFICATE = "certificate.json"
SEQUENCE = "sequence"
"""Column with the content hash of a sequence."""
CLUSTER = "cluster"
"""Column with the name of the cluster of a sequence that repeats others; null for all others."""
CLUSTER_SIZE = "cluster_size"
"""Column with the number of sequences in that cluster; 1 for all others."""


def to_table(
    sequence_ids: Sequence[str],
    document_ids: Sequence[str],
    columns: Columns,
    clusters: Sequence[str | None] | None = None,
    cluster_sizes: Sequence[int] | None = None,
) -> pa.Table:
    """Put measured columns into a table, one row a sequence.

    Args:
        sequence_ids: Content hashes.
        document_ids: Names of the documents.
        columns: Output of `measure`.
        clusters: Clusters of the sequences, None for one by itself; no such column if they were not
            looked for.
        cluster_sizes: Number of sequences in the cluster of each.

    Returns:
        A table with ``sequence``, ``document``, ``cluster`` and the measured columns in alphabetical order; a
        column of several numbers per sequence becomes one of fixed-size lists.
    """
    return with_names(measured_table(columns), sequence_ids, document_ids, clusters, cluster_sizes)


def measured_table(columns: Columns) -> pa.Table:
    """Put measured columns into a table, in alphabetical order; several numbers per sequence become a list."""
    arrays: dict[str, pa.Array] = {}
    for name in sorted(columns):
        values = columns[name]
        flat = pa.array(
            values.ravel() if values.dtype == np.bool_ else values.ravel().astype(np.float64)
        )
        if values.ndim == 2:
            # Parquet calls the items so; with one name, what was read again is written alike.
            kind = pa.list_(pa.field("element", flat.type), values.shape[1])
            flat = pa.FixedSizeListArray.from_arrays(flat, type=kind)
        arrays[name] = flat
    return pa.table(arrays)


def with_names(
    measured: pa.Table,
    sequence_ids: Sequence[str],
    document_ids: Sequence[str],
    clusters: Sequence[str | None] | None = None,
    cluster_sizes: Sequence[int] | None = None,
) -> pa.Table:
    """Put the names of the sequences before what was measured on them; arguments as in `to_table`."""
    named = {SEQUENCE: pa.array(sequence_ids), "document": pa.array(document_ids)}
    if clusters is not None:
        named[CLUSTER] = pa.array(clusters, type=pa.string())
        named[CLUSTER_SIZE] = pa.array(cluster_sizes, type=pa.int64())
    return pa.table({**named, **{name: measured.column(name) for name in measured.column_names}})


def part_name(index: int) -> str:
    """File name of part ``index``, relative to the run's folder."""
    return f"{EVIDENCE}/part-{index:05d}.parquet"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: manifest, calibration, evidence parts.

    Every file in it is either whole or absent.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest) -> tuple[RunFolder, Manifest]:
        """Start a run in an empty folder, or go on with the same run.

        Args:
            path: The folder; made if missing.
            manifest: Manifest of the run that is about to start.

        Returns:
            The folder, and the manifest that counts: that of the finished run, or this one with the
            time at which the run began.

        Raises:
            EvidenceError: If the folder holds another run, or files of something else.
        """
        folder = cls(Path(path))
        if folder.path.exists() and not folder.path.is_dir():
            raise CertifyError(f"output {str(path)!r} is a file; give a folder")
        manifest_file = folder.path / MANIFEST
        if manifest_file.exists():
            found = folder.manifest()
            differ = differences(manifest, found)
            if differ:
                raise EvidenceError(
                    f"{str(path)!r} holds another run: {'; '.join(differ)}. Choose another output "
                    "folder, or repeat that run's settings to resume it"
                )
            current = {**manifest, "created_epoch_millis": found.get("created_epoch_millis", 0)}
            if not (folder.path / CERTIFICATE).exists():
                write_atomically(manifest_file, dump_json(current))
                return folder, current
            return folder, found
        if folder.path.is_symlink() and not folder.path.exists():
            raise CertifyError(f"output {str(path)!r} is a broken link; choose another folder")
        foreign = sorted(p.name for p in folder.path.glob("*")) if folder.path.exists() else []
        foreign = [name for name in foreign if not name.endswith(".partial")]
        if foreign:
            raise EvidenceError(
                f"{str(path)!r} is not empty ({', '.join(foreign[:3])}, …) and holds no run's "
                f"{MANIFEST}; choose an empty or new output folder"
            )
        # The manifest is the first thing in the folder: a kill right after leaves a run to resume.
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CertifyError(f"output folder {str(path)!r} cannot be made: {error}") from None
        write_atomically(manifest_file, dump_json(manifest))
        return folder, manifest

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            EvidenceError: If it is missing or damaged.
        """
        return read_json(self.path / MANIFEST)

    def save_calibration(self, calibration: Calibration) -> None:
        """Write the calibration so far."""
        write_atomically(self.path / CALIBRATION, dump_calibration(calibration))

    def load_calibration(self) -> Calibration | None:
        """Read the calibration so far, or None before the first part.

        Raises:
            EvidenceError: If the file is damaged.
        """
        file = self.path / CALIBRATION
        return load_calibration(file) if file.exists() else None

    def write_part(self, index: int, table: pa.Table) -> None:
        """Write one part of the evidence."""
        (self.path / EVIDENCE).mkdir(exist_ok=True)
        write_atomically(self.path / part_name(index), dump_table(table))

    def read_part(self, index: int, expected_sequences: Sequence[str]) -> pa.Table | None:
        """Read a part, or None if it is not there yet.

        Args:
            index: Number of the part.
            expected_sequences: The sequence ids that it must hold.

        Raises:
            EvidenceError: If the part is damaged or holds other sequences.
        """
        file = self.path / part_name(index)
        if not file.exists():
            return None
        table = read_table(file)
        if table.column("sequence").to_pylist() != list(expected_sequences):
            raise EvidenceError(
                f"{file} does not hold the sequences of part {index} of this run; delete it and "
                "run again"
            )
        return table

    def parts(self) -> list[Path]:
        """Files of the evidence, in order.

        Raises:
            EvidenceError: If a part is missing between others.
        """
        files = sorted((self.path / EVIDENCE).glob("part-*.parquet"))
        for index, file in enumerate(files):
            if file != self.path / part_name(index):
                raise EvidenceError(
                    f"evidence part {self.path / part_name(index)} is missing; run again with the "
                    "same settings to fill the gap"
                )
        return files


def finished_run(path: Any) -> RunFolder:
    """Return the folder of a finished run that somebody names.

    Args:
        path: The folder, or the ``certificate.json`` in it.

    Raises:
        EvidenceError: If there is no ``certificate.json`` in it.
        CertifyError: If there is no such folder, or it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CertifyError(
            f"give the folder of a run, not {type(path).__name__} ({CERTIFICATE} and the evidence are "
            "in it; certificate.save(folder) writes one)"
        )
    folder = Path(path)
    if folder.name == CERTIFICATE and not folder.is_dir():
        folder = folder.parent
    if not folder.exists():
        raise CertifyError(f"there is no folder {str(folder)!r}; give the folder of a run")
    if not folder.is_dir():
        raise CertifyError(f"{str(folder)!r} is a file; give the folder of a run")
    if (folder / MANIFEST).exists() and not (folder / CERTIFICATE).exists():
        raise EvidenceError(
            f"{folder / CERTIFICATE} is missing: the run did not finish; repeat the same command (or "
            "call) with the same output folder, which resumes it"
        )
    return RunFolder(folder)


@contextlib.contextmanager
def reading(where: Path) -> Iterator[None]:
    """Turn what damaged contents cause further on into an error about the folder.

    Raises:
        EvidenceError: In place of lookup, type and value errors inside the block.
    """
    try:
        yield
    except EvidenceError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
        raise EvidenceError(
            f"{where} holds contents that no run writes ({type(error).__name__}: {error}); it is "
            "damaged or was edited"
        ) from error


def dump_table(table: pa.Table) -> bytes:
    """Encode a table as Parquet; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=True)
    return sink.getvalue()


def read_table(file: Path) -> pa.Table:
    """Read a Parquet part.

    Raises:
        EvidenceError: Naming the file, if it is truncated or damaged.
    """
    try:
        return pq.read_table(io.BytesIO(file.read_bytes()))
    except FileNotFoundError:
        raise EvidenceError(f"evidence part {file} is missing") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EvidenceError(
            f"evidence part {file} cannot be read ({error}); it is truncated or damaged: delete it "
            "and run again with the same settings to measure it anew"
        ) from error


def read_json(file: Path) -> dict:
    """Read a JSON object.

    Raises:
        EvidenceError: Naming the file, if it is missing or damaged.
    """
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise EvidenceError(f"{file} is missing: not a run's folder, or not finished") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvidenceError(f"{file} is not valid JSON ({error}); it is damaged") from error
    if not isinstance(value, dict):
        raise EvidenceError(f"{file} does not hold a JSON object; it is damaged")
    return value


def dump_calibration(calibration: Calibration) -> bytes:
    """Encode a calibration as safetensors."""
    return safetensors.torch.save(
        {
            "counts": calibration.counts,
            "target_counts": calibration.target_counts,
            "activation_sums": calibration.activation_sums.contiguous(),
            "activation_tokens": calibration.activation_tokens,
            "n_sequences": torch.tensor(calibration.n_sequences, dtype=torch.int64, device="cpu"),
        }
    )


def load_calibration(file: Path) -> Calibration:
    """Read a calibration.

    Raises:
        EvidenceError: Naming the file, if it is missing or damaged.
    """
    try:
        tensors = safetensors.torch.load(file.read_bytes())
        return Calibration(
            counts=tensors["counts"],
            target_counts=tensors["target_counts"],
            activation_sums=tensors["activation_sums"],
            activation_tokens=tensors["activation_tokens"],
            n_sequences=int(tensors["n_sequences"]),
        )
    except FileNotFoundError:
        raise EvidenceError(f"{file} is missing: the run did not finish its calibration") from None
    except (safetensors.SafetensorError, KeyError, ValueError, struct.error) as error:
        raise EvidenceError(
            f"{file} cannot be read ({error}); it is truncated or damaged"
        ) from error
