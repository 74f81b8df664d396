"""`certify`: from a model, an SAE and documents to a certificate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa

from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, check_disjoint
from saelens_certify.dependence import Draws, independent_draws
from saelens_certify.evidence import EVIDENCE, RunFolder, reading, to_table
from saelens_certify.forward import ForwardEngine
from saelens_certify.manifest import Manifest, build_manifest
from saelens_certify.outputs import Columns
from saelens_certify.passes import calibration_pass, empty_calibration, evaluation_pass
from saelens_certify.pool import Calibration
from saelens_certify.preflight import warn_about_bos
from saelens_certify.preparation import PROBE_SEQUENCES, prepare, sequences_for, try_out
from saelens_certify.saes import SAEAdapter
from saelens_certify.schedule import looked_at, part_slices
from saelens_certify.sealing import check_seal, join_parts
from saelens_certify.store_draws import resolve_stores
from saelens_certify.subject import Reader, Subject
from saelens_certify.workers import Workers, workers_for

_NAME = "sae"


def certify(
    model: Any,
    sae: Any,
    *,
    calibration: Any,
    evaluation: Any,
    config: CertifyConfig | None = None,
    until: str | float | None = None,
    output: str | Path | None = None,
    sae_id: str | None = None,
) -> Certificate:
    """Issue a faithfulness certificate.

    The concept pool is built from the calibration documents, everything else is measured on the
    evaluation documents. All checks that need no long work come first. With ``output``, work is written
    as it is done: a run that was killed goes on where it stopped when the same call is made again,
    and ends with the same evidence.

    Args:
        model: A TransformerLens model (HookedTransformer, HookedSAETransformer, TransformerBridge,
            SAETransformerBridge). It is not changed.
        sae: A SAELens SAE, a folder, ``"release/sae_id"``, or what `open_sae` returned. It is not
            changed.
        calibration: Calibration documents: anything `as_sequences` accepts (token ids
            ``[n_sequences, >= L]``, texts, a Hugging Face dataset, a path, a hub name), or a SAELens
            ActivationsStore (see `resolve_stores`).
        evaluation: Evaluation documents, disjoint from the calibration documents.
        config: Settings; the published protocol is ``CertifyConfig(coding="topk:64")``.
        until: In place of ``config.until``: stop as soon as the verdict is valid (``"nonvacuous"``), valid or
            out of reach (``"decided"``), or the bound is at most so many bits per token. Every bound of
            such a certificate is time-uniform; `Certificate.stop` says why and when it was decided.
        output: Folder for manifest, evidence and certificate. None keeps everything in memory.
        sae_id: Name under which a live SAE is recorded.

    Returns:
        The certificate.

    Raises:
        CertifyError: Before any long work, if the pieces do not fit together: naming the thing,
            the value and the remedy.
        EvidenceError: If ``output`` holds another run or damaged files.
    """
    config = CertifyConfig.check(config)
    if until is not None:
        config = dataclasses.replace(config, until=until)
    engine = ForwardEngine(model)
    prepared = prepare(model, sae, [config])
    documents = read_sides(model, calibration, evaluation, config)
    draws = independent_draws(*documents, config)
    probe = documents[0].tokens[:PROBE_SEQUENCES]
    engine, checks = try_out(engine, {_NAME: prepared}, probe, [config])
    manifest = build_manifest(
        engine=engine,
        sae=prepared.loaded.sae,
        adapter=prepared.adapter,
        calibration=documents[0],
        evaluation=draws.sequences,
        dependence=draws.found,
        config=config,
        self_check=checks[_NAME],
        sae_id=sae_id or prepared.loaded.name,
        origin=prepared.loaded.origin(),
    )
    folder = None
    if output is not None:
        folder, manifest = RunFolder.open(output, manifest)
        check_seal(folder)
    adapter = prepared.adapter
    with workers_for(engine, config) as workers:
        calibrated = calibrate_folder(workers, adapter, documents[0], config, folder)
        certificate = _evaluate(workers, adapter, manifest, calibrated, draws, config, folder)
    if folder is not None:
        with reading(folder.path):
            certificate.seal(folder)
    return certificate


def read_sides(
    model: Any, calibration: Any, evaluation: Any, config: CertifyConfig
) -> tuple[Sequences, Sequences]:
    """Cut calibration and evaluation documents to sequences, in the order of their hashes.

    Args:
        model: The model.
        calibration: Anything `certify` takes.
        evaluation: Anything `certify` takes.
        config: Settings.

    Raises:
        CertifyError: If they cannot be read, or share a document.
    """
    sides = resolve_stores(model, calibration, evaluation, config)
    found = [sequences_for(model, data, config).canonical for data in sides]
    check_disjoint(*found)
    for name, sequences in zip(("calibration", "evaluation"), found, strict=True):
        warn_about_bos(model, sequences, name)
    return found[0], found[1]


def calibrate_folder(
    workers: Workers,
    adapter: SAEAdapter,
    sequences: Sequences,
    config: CertifyConfig,
    folder: RunFolder | None,
) -> Calibration:
    """Calibrate part by part, going on after what the folder already has.

    Args:
        workers: Who does the parts.
        adapter: The SAE.
        sequences: Calibration sequences in the order of their hashes.
        config: Settings.
        folder: Where the calibration is kept; None: nowhere.

    Raises:
        EvidenceError: If the folder holds a calibration of something else.
    """
    readers = {_NAME: Reader(adapter, config)}
    so_far = empty_calibration(workers.engine, readers[_NAME])
    found = None if folder is None else folder.load_calibration()
    if folder is not None and found is not None:
        found.check_resumable(so_far, len(sequences), sequences.seq_len, str(folder.path))
        so_far = found

    def keep(_name: str, _done: int, total: Calibration) -> None:
        if folder is not None:
            folder.save_calibration(total)

    done = {_NAME: (so_far.n_sequences, so_far)}
    return calibration_pass(workers, readers, sequences, config, so_far=done, keep=keep)[_NAME]


def _evaluate(
    workers: Workers,
    adapter: SAEAdapter,
    manifest: Manifest,
    calibration: Calibration,
    draws: Draws,
    config: CertifyConfig,
    folder: RunFolder | None,
) -> Certificate:
    """Measure part by part, skipping the parts that the folder already has, until the run is decided."""
    subject = Subject.of(adapter, calibration, config)  # an empty pool is an error now, not later
    sequences, clusters = draws.sequences, draws.clusters
    parts = part_slices(config, clusters or [None] * len(sequences))

    def kept(index: int, _name: str) -> pa.Table | None:
        return None if folder is None else folder.read_part(index, sequences.hashes[parts[index]])

    def made(index: int, _name: str, columns: Columns) -> pa.Table:
        part = parts[index]
        table = to_table(
            sequences.hashes[part],
            sequences.document_ids[part],
            columns,
            None if clusters is None else clusters[part],
            None if draws.sizes is None else draws.sizes[part],
        )
        if folder is not None:
            folder.write_part(index, table)
        return table

    tables: list[pa.Table] = []
    measured = evaluation_pass(
        workers, {_NAME: subject}, sequences, parts, config, kept=kept, made=made
    )
    for part, look in zip(measured, looked_at(parts), strict=True):
        tables.append(part[_NAME])
        if config.until is not None and look:
            so_far = Certificate(manifest, calibration, pa.concat_tables(tables))
            if so_far.stop is not None:
                break
    where = Path(EVIDENCE) if folder is None else folder.path / EVIDENCE
    return Certificate(manifest, calibration, join_parts(tables, where))
