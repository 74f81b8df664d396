"""A run's evidence as it was sealed: every file beside its hash, every sequence once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saelens_certify.bounds import cluster_order
from saelens_certify.errors import EvidenceError
from saelens_certify.evidence import (
    CALIBRATION,
    CERTIFICATE,
    CLUSTER,
    CLUSTER_SIZE,
    MANIFEST,
    RunFolder,
    read_json,
    reading,
)
from saelens_certify.storage import sha256_file

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate


def file_hashes(folder: RunFolder) -> dict[str, str]:
    """Hash every file that a certificate rests on, by name relative to the run's folder."""
    files = [folder.path / MANIFEST, folder.path / CALIBRATION, *folder.parts()]
    return {file.relative_to(folder.path).as_posix(): sha256_file(file) for file in files}


def check_seal(folder: RunFolder) -> None:
    """If the folder holds a finished run, check that its files are still those it was sealed over.

    Raises:
        EvidenceError: Naming the file that is missing or not the one that was certified.
    """
    if (folder.path / CERTIFICATE).exists():
        compare_hashes(folder, read_json(folder.path / CERTIFICATE))


def compare_hashes(folder: RunFolder, stored: Mapping[str, Any]) -> dict[str, str]:
    """Compare every file of a run with the hash in its certificate.

    Returns:
        The hashes, by name.

    Raises:
        EvidenceError: Naming the file.
    """
    try:
        hashes = file_hashes(folder)
    except FileNotFoundError as error:
        raise EvidenceError(f"{error.filename} is missing; the certificate rests on it") from None
    with reading(folder.path / CERTIFICATE):
        recorded: dict[str, str] = dict(stored["eval_result_unstructured"]["files"])
    for name in sorted(hashes.keys() | recorded.keys()):
        if name not in hashes:
            raise EvidenceError(f"{folder.path / name} is missing; the certificate rests on it")
        if hashes[name] != recorded.get(name):
            raise EvidenceError(
                f"{folder.path / name} is not the file that was certified: its SHA-256 is "
                f"{hashes[name][:12]}…, the certificate has {str(recorded.get(name))[:12]}…"
            )
    return hashes


def join_parts(tables: list[pa.Table], where: Path) -> pa.Table:
    """Join evidence parts and check that every sequence is there once, in order.

    Raises:
        EvidenceError: If there is no part, columns differ, or a sequence is doubled.
    """
    if not tables:
        raise EvidenceError(f"{where} holds no evidence: the run has not measured anything yet")
    try:
        evidence = pa.concat_tables(tables).combine_chunks()
    except pa.ArrowException as error:
        raise EvidenceError(f"the parts in {where} have different columns: {error}") from error
    ids = evidence.column("sequence").to_pylist()
    if len(set(ids)) != len(ids):
        raise EvidenceError(f"the parts in {where} hold some sequences twice")
    if not _in_order(evidence, ids):
        raise EvidenceError(f"the parts in {where} are not in the order of their sequences")
    return evidence


def check_complete(certificate: Certificate, where: Path) -> None:
    """Check that all sequences that the manifest announces were calibrated and measured, or enough to stop.

    Raises:
        EvidenceError: If not.
    """
    data = certificate.manifest["data"]
    for name, found in (
        ("calibration", certificate.calibration.n_sequences),
        ("evaluation", certificate.evidence.num_rows),
    ):
        announced = data[name]["n_sequences"]
        stopped = name == "evaluation" and found < announced and certificate.stop is not None
        if found != announced and not stopped:
            raise EvidenceError(
                f"{where} holds {found} {name} sequences, its manifest announces {announced}; run again "
                "with the same settings to finish it"
            )
    _check_clusters(certificate, where)
    contradicted = certificate.column("violation") != (
        certificate.column("rarest") < certificate.config.tau
    )
    if contradicted.any():
        raise EvidenceError(
            f"in {where} columns 'violation' and 'rarest' of sequence "
            f"{certificate.evidence.column('sequence')[int(contradicted.argmax())]} contradict each other"
        )


def _check_clusters(certificate: Certificate, where: Path) -> None:
    """Check that every cluster is whole, and that clusters were looked for if the settings say so.

    Raises:
        EvidenceError: If not.
    """
    table, looked_for = certificate.evidence, certificate.config.dependence != "ignore"
    if (CLUSTER in table.column_names) != looked_for:
        raise EvidenceError(
            f"{where} has {'no' if looked_for else 'a'} column {CLUSTER!r}, the settings have dependence="
            f"{certificate.config.dependence!r}"
        )
    if not looked_for:
        return
    names = table.column(CLUSTER).to_pylist()
    found = Counter(names)
    for name, size in zip(names, table.column(CLUSTER_SIZE).to_pylist(), strict=True):
        if size != (1 if name is None else found[name]):
            raise EvidenceError(f"{where} does not hold all {size} sequences of cluster {name}")
    recorded = certificate.manifest["dependence"]["within_evaluation"]
    n_clusters = len(found) - (None in found) + found[None]
    if table.num_rows == recorded["n_sequences"] and n_clusters != recorded["n_clusters"]:
        raise EvidenceError(
            f"{where} holds {n_clusters} clusters, the manifest records {recorded['n_clusters']}"
        )


def _in_order(evidence: pa.Table, ids: list[str]) -> bool:
    """Whether the sequences stand in the order that their hashes and clusters give them."""
    if CLUSTER not in evidence.column_names:
        return ids == sorted(ids)
    names = evidence.column(CLUSTER).to_pylist()
    labels = [name or own for name, own in zip(names, ids, strict=True)]
    return bool((cluster_order(labels, ids) == np.arange(len(ids))).all())
