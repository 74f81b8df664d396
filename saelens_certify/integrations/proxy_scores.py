"""From a model, an SAE and calibration documents to scores of any text under M, S∘M and h_G."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_certify.certificate import Certificate
from saelens_certify.certification import calibrate_folder
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.errors import CertifyError
from saelens_certify.evidence import RunFolder
from saelens_certify.forward import ForwardEngine
from saelens_certify.identity import check_sae
from saelens_certify.integrations.scored_requests import PROXIES, ScoredTokens, ScoreStore
from saelens_certify.manifest import (
    FORMAT_VERSION,
    Manifest,
    model_hash,
    parameters_sha256,
    settings_sha256,
)
from saelens_certify.pool import Calibration
from saelens_certify.positions import special_token_ids
from saelens_certify.predictions import token_outputs
from saelens_certify.preflight import warn_about_bos
from saelens_certify.preparation import (
    PROBE_SEQUENCES,
    Prepared,
    prepare,
    sequences_for,
    try_out,
)
from saelens_certify.subject import Subject
from saelens_certify.version import __version__
from saelens_certify.workers import workers_for

_NAME = "sae"
_SCORES = "scores"
_COMPARED = ("coding", "positions", "tau")


def proxy_scores(
    model: Any,
    sae: Any,
    *,
    calibration: Any = None,
    pool: Certificate | None = None,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> ScoreStore:
    """Prepare to score texts under the model and both proxies of an SAE.

    The pool G holds the features that calibration documents activate, or is that of a certificate. It was
    seen on the first L tokens of documents; texts that are scored may be longer.

    Args:
        model: As for `certify`.
        sae: As for `certify`.
        calibration: Calibration documents, as for `certify`.
        pool: In place of calibration documents: a certificate of this model and this SAE.
        config: Settings: coding rule, coded positions, tau, tokens per calibration sequence; None: those of
            the certificate, or the default ones.
        output: Folder for the calibration and the scores; a run that was killed goes on where it stopped. None
            keeps everything in memory.

    Returns:
        Scores of requests, measured when they are asked for.

    Raises:
        CertifyError: Before any long work, if the pieces do not fit together.
        EvidenceError: If ``output`` holds scores of something else, or damaged files.
    """
    config = _settings(calibration, pool, config)
    prepared = prepare(model, sae, [config])
    engine = ForwardEngine(model)
    manifest = _manifest(engine, prepared, config)
    identity = manifest["identity"]
    source: Sequences | Calibration
    if pool is None:
        source = sequences_for(model, calibration, config).canonical
        warn_about_bos(model, source, "calibration")
        identity["calibration_sha256"] = source.digest
        probe = source.tokens[:PROBE_SEQUENCES]
    else:
        check_sae(pool, prepared.loaded.sae, prepared.adapter)
        check_model(pool, identity["model_sha256"])
        source = pool.calibration
        identity["calibration_sha256"] = pool.manifest["identity"]["calibration_sha256"]
        probe = _typical_tokens(source, config.seq_len, model)
    engine, _ = try_out(engine, {_NAME: prepared}, probe, [config])
    folder = None if output is None else RunFolder.open(output, manifest)[0]
    if isinstance(source, Sequences):
        with workers_for(engine, config) as workers:
            source = calibrate_folder(workers, prepared.adapter, source, config, folder)
    return _store(engine, Subject.of(prepared.adapter, source, config), config, folder)


def check_model(certificate: Certificate, model_sha256: str) -> None:
    """Check that a model is the one that a certificate is about.

    Raises:
        CertifyError: If its weights are others.
    """
    expected = certificate.manifest["identity"]["model_sha256"]
    if model_sha256 != expected:
        raise CertifyError(
            f"this is not the certified model: its parameters hash to {model_sha256[:12]}…, the certificate has "
            f"{expected[:12]}… (a cast to another dtype also changes them); load the model as it was "
            "certified, or give calibration documents in place of pool="
        )


def _settings(
    calibration: Any, pool: Certificate | None, config: CertifyConfig | None
) -> CertifyConfig:
    """The settings that count, without controls: nothing else is measured of a text."""
    if (calibration is None) == (pool is None):
        raise CertifyError(
            "give either calibration= (documents whose active features make the pool) or pool= (a certificate, "
            f"whose pool is used); got {'neither' if pool is None else 'both'}"
        )
    if pool is not None and not isinstance(pool, Certificate):
        raise CertifyError(
            f"pool must be a Certificate, got {type(pool).__name__}; Certificate.load(folder) reads one"
        )
    if pool is not None and config is None:
        config = pool.config
    config = CertifyConfig.check(config)
    made_with = config if pool is None else pool.config
    for name in _COMPARED:
        ours, theirs = getattr(config, name), getattr(made_with, name)
        if ours != theirs:
            raise CertifyError(
                f"{name} is {ours!r} in config and {theirs!r} in the certificate whose pool is used; leave "
                "config out, or give calibration documents in place of pool="
            )
    return dataclasses.replace(
        config,
        until=None,
        permutations=0,
        matched_permutations=0,
        error_permutations=0,
        random_decoders=0,
        random_unit_decoders=0,
        horizons=(),
    )


def _manifest(engine: ForwardEngine, prepared: Prepared, config: CertifyConfig) -> Manifest:
    """What must agree for scores to be used again: all that they depend on."""
    hf_model = getattr(engine.model, "original_model", engine.model)
    settings = getattr(hf_model, "config", None)
    sae, adapter = prepared.loaded.sae, prepared.adapter
    return {
        "identity": {
            "format": FORMAT_VERSION,
            "saelens_certify": __version__,
            "kind": "proxy_scores",
            "config": {name: getattr(config, name) for name in _COMPARED},
            "model_sha256": model_hash(engine.model),
            "model_config_sha256": settings_sha256(settings.to_dict() if settings else {}),
            "special_ids": list(special_token_ids(engine.model)),
            "sae_sha256": parameters_sha256(sae.named_parameters()),
            "sae_config_sha256": settings_sha256(adapter.config),
            "hook_in": adapter.input_hook,
            "hook_out": adapter.output_hook,
        },
        "created_epoch_millis": int(time.time() * 1000),
    }


def _typical_tokens(
    calibration: Calibration, length: int, model: Any
) -> Int[Tensor, "n_sequences pos"]:
    """Tokens as frequent as in calibration, to try the model and the SAE on; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(
        calibration.target_counts.double(),
        PROBE_SEQUENCES * length,
        replacement=True,
        generator=generator,
    )
    tokens = drawn.reshape(PROBE_SEQUENCES, length)
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if bos is not None and getattr(model.cfg, "default_prepend_bos", False):
        tokens[:, 0] = bos
    return tokens


def _store(
    engine: ForwardEngine, subject: Subject, config: CertifyConfig, folder: RunFolder | None
) -> ScoreStore:
    special = special_token_ids(engine.model)

    def measure(tokens: Int[Tensor, "n_sequences pos"]) -> ScoredTokens:
        outputs = token_outputs(engine, {_NAME: subject}, tokens, config, special)[_NAME]
        return ScoredTokens(
            logprob={name: outputs[name].logprob for name in PROXIES},
            greedy={name: outputs[name].greedy for name in PROXIES},
            violation=outputs["pool"].run,
        )

    where = None if folder is None else folder.path / _SCORES
    return ScoreStore(measure, where, config.part_sequences, config.progress)
