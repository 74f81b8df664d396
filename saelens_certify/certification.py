"""`certify`: from a model, an SAE and documents to a certificate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, as_sequences, check_disjoint
from saelens_certify.data.stores import is_store
from saelens_certify.dependence import Draws, independent_draws
from saelens_certify.evidence import EVIDENCE, RunFolder, reading, to_table
from saelens_certify.forward import ForwardEngine, choose_strategy
from saelens_certify.manifest import Manifest, build_manifest
from saelens_certify.measure import Subject, calibrate, measure
from saelens_certify.pool import Calibration
from saelens_certify.positions import special_token_ids
from saelens_certify.preflight import (
    check_bare,
    check_order,
    check_pair,
    check_settings,
    check_width,
    warn_about_bos,
    warn_about_training_positions,
)
from saelens_certify.proxies import check_controls, variants_of
from saelens_certify.saes import SAEAdapter, adapt
from saelens_certify.saes.loading import open_sae
from saelens_certify.saes.selfcheck import self_check
from saelens_certify.schedule import looked_at, part_slices
from saelens_certify.sealing import check_seal, join_parts
from saelens_certify.store_draws import resolve_stores, sequences_of_store

_PROBE_SEQUENCES = 4
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
    loaded = open_sae(sae)
    sae = loaded.sae
    adapter = adapt(sae)
    engine = ForwardEngine(model)
    check_settings(model, config)
    check_bare(model, sae)
    check_pair(model, sae)
    check_controls(adapter, config)
    calibration, evaluation = resolve_stores(model, calibration, evaluation, config)
    documents = {
        name: sequences_for(model, data, config).canonical()
        for name, data in (("calibration", calibration), ("evaluation", evaluation))
    }
    check_disjoint(documents["calibration"], documents["evaluation"])
    draws = independent_draws(documents["calibration"], documents["evaluation"], config)
    warn_about_training_positions(sae.cfg.metadata)
    for name, sequences in documents.items():
        warn_about_bos(model, sequences, name)

    probe = documents["calibration"].tokens[:_PROBE_SEQUENCES]
    activations = engine.capture(probe, {adapter.input_hook, adapter.output_hook})
    check_order(adapter, activations)
    check_width(adapter, activations)
    checked = self_check(sae, adapter, activations[adapter.input_hook])
    engine = ForwardEngine(model, choose_strategy(model, probe, adapter.output_hook))
    manifest = build_manifest(
        engine=engine,
        sae=sae,
        adapter=adapter,
        calibration=documents["calibration"],
        evaluation=draws.sequences,
        dependence=draws.found,
        config=config,
        self_check=dataclasses.asdict(checked),
        sae_id=sae_id or loaded.name,
        origin=loaded.origin(),
    )
    folder = None
    if output is not None:
        folder, manifest = RunFolder.open(output, manifest)
        check_seal(folder)
    calibrated = _calibrate(engine, adapter, documents["calibration"], config, folder)
    certificate = _evaluate(engine, adapter, manifest, calibrated, draws, config, folder)
    if folder is not None:
        with reading(folder.path):
            certificate.seal(folder)
    return certificate


def sequences_for(model: Any, data: Any, config: CertifyConfig, **options: Any) -> Sequences:
    """Cut documents to sequences by the model's conventions.

    Args:
        model: The model: its tokenizer, vocabulary and BOS convention are used.
        data: Anything `as_sequences` accepts. A SAELens ActivationsStore keeps its own ``prepend_bos``,
            and with ``limit`` gives a random sample (see `sequences_of_store`).
        config: Settings (``seq_len``, ``progress``).
        **options: Further arguments of `as_sequences` (``split``, ``revision``, ``limit``, …).

    Returns:
        The sequences, in the order of the data.
    """
    if is_store(data):
        return sequences_of_store(data, config, model=model, **options)
    return as_sequences(
        data,
        seq_len=config.seq_len,
        d_vocab=int(model.cfg.d_vocab),
        tokenizer=getattr(model, "tokenizer", None),
        prepend_bos=getattr(model.cfg, "default_prepend_bos", None),
        progress=config.progress,
        **options,
    )


def _calibrate(
    engine: ForwardEngine,
    adapter: SAEAdapter,
    sequences: Sequences,
    config: CertifyConfig,
    folder: RunFolder | None,
) -> Calibration:
    """Calibrate part by part, going on after what the folder already has."""
    total = None if folder is None else folder.load_calibration()
    empty = Calibration.empty(adapter.d_sae, engine.d_vocab, adapter.d_out)
    if total is None:
        total = empty
    elif folder is not None:
        total.check_resumable(empty, len(sequences), sequences.seq_len, str(folder.path))
    special = special_token_ids(engine.model)
    with _progress("calibration", sequences, total.n_sequences, config) as bar:
        for start in range(total.n_sequences, len(sequences), config.part_sequences):
            tokens = sequences.tokens[start : start + config.part_sequences]
            total = total + calibrate(engine, {_NAME: adapter}, tokens, config, special)[_NAME]
            if folder is not None:
                folder.save_calibration(total)
            bar.update(tokens.numel())
    total.pool(config.tau)  # an empty pool is an error now, not after the evaluation
    return total


def _evaluate(
    engine: ForwardEngine,
    adapter: SAEAdapter,
    manifest: Manifest,
    calibration: Calibration,
    draws: Draws,
    config: CertifyConfig,
    folder: RunFolder | None,
) -> Certificate:
    """Measure part by part, skipping the parts that the folder already has, until the run is decided."""
    subject = Subject(
        adapter=adapter,
        pool=calibration.pool(config.tau),
        variants=variants_of(adapter, config, calibration.counts),
        mean_activations=calibration.mean_activations(),
        unigram_bits=calibration.unigram_bits(config.alpha),
        counts=calibration.counts,
    )
    special = special_token_ids(engine.model)
    where = Path(EVIDENCE) if folder is None else folder.path / EVIDENCE
    tables: list[pa.Table] = []
    sequences, clusters = draws.sequences, draws.clusters
    parts = part_slices(config, clusters or [None] * len(sequences))
    looks = looked_at(parts)
    with _progress("evaluation", sequences, 0, config) as bar:
        for index, part in enumerate(parts):
            tokens, ids = sequences.tokens[part], sequences.hashes[part]
            table = None if folder is None else folder.read_part(index, ids)
            if table is None:
                columns = measure(engine, {_NAME: subject}, tokens, config, special)[_NAME]
                table = to_table(
                    ids,
                    sequences.document_ids[part],
                    columns,
                    None if clusters is None else clusters[part],
                    None if draws.sizes is None else draws.sizes[part],
                )
                if folder is not None:
                    folder.write_part(index, table)
            tables.append(table)
            bar.update(tokens.numel())
            if config.until is not None and looks[index]:
                so_far = Certificate(manifest, calibration, pa.concat_tables(tables))
                if so_far.stop is not None:
                    break
    return Certificate(manifest, calibration, join_parts(tables, where))


def _progress(what: str, sequences: Sequences, done: int, config: CertifyConfig) -> tqdm:
    return tqdm(
        total=sequences.tokens.numel(),
        initial=done * sequences.seq_len,
        desc=what,
        unit="tok",
        unit_scale=True,
        disable=not config.progress,
    )
