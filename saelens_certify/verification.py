"""Checking a certificate: every number recomputed, every file compared with its hash."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelens_certify.certificate import Certificate
from saelens_certify.data import Sequences
from saelens_certify.data.hashing import set_digest
from saelens_certify.data.near_duplicates import find_clusters
from saelens_certify.data.stores import is_store
from saelens_certify.dependence import in_order
from saelens_certify.errors import CertifyError, EvidenceError
from saelens_certify.evidence import CERTIFICATE, CLUSTER, EVIDENCE, finished_run, read_json
from saelens_certify.forward import ForwardEngine, Strategy
from saelens_certify.manifest import parameters_sha256
from saelens_certify.measure import measure
from saelens_certify.positions import special_token_ids
from saelens_certify.preparation import sequences_for
from saelens_certify.saes import adapt
from saelens_certify.saes.loading import load_sae
from saelens_certify.sealing import compare_hashes
from saelens_certify.store_draws import certified_sequences
from saelens_certify.subject import Subject

REMEASURED_TOLERANCE = 1e-3
"""Bits by which a sequence's loss may differ when measured again on another machine."""

_FLIPPED = 0.02  # share of sequences whose codes may differ on another machine


@dataclass(frozen=True)
class Verification:
    """What `verify` checked.

    Attributes:
        certificate: The certificate, computed anew from its evidence.
        n_files: Files whose hashes were compared.
        n_sequences: Rows of evidence.
        n_remeasured: Sequences measured again with the model at hand.
        largest_difference: Largest difference of a loss among these, bits per token.
    """

    certificate: Certificate
    n_files: int
    n_sequences: int
    n_remeasured: int = 0
    largest_difference: float = 0.0


def verify(
    path: str | Path,
    *,
    model: Any = None,
    sae: Any = None,
    evaluation: Any = None,
    sample: int = 32,
    seed: int = 0,
) -> Verification:
    """Check that a run's folder is whole, unedited and says what its evidence says.

    Without a model: every file is compared with its hash, and every number of ``certificate.json`` is
    computed again from manifest, calibration and evidence. That shows that they belong together, not that they
    were measured. With model, SAE and evaluation
    sequences, a random sample of sequences is also measured again.

    Args:
        path: The run's folder, or the ``certificate.json`` in it.
        model: The model, to measure again.
        sae: The SAELens SAE, a folder or ``"release/sae_id"``, to measure again.
        evaluation: The evaluation documents, in any form that `certify` takes, to measure again.
        sample: How many sequences to measure again.
        seed: Seed of the sample.

    Returns:
        What was checked.

    Raises:
        EvidenceError: Naming the file, and the entry, that is missing, damaged or edited.
        CertifyError: If there is no such folder, or model, SAE or sequences are not the certified ones.
    """
    folder = finished_run(path)
    stored = read_json(folder.path / CERTIFICATE)
    hashes = compare_hashes(folder, stored)
    certificate = Certificate.load(folder.path)
    ids = certificate.evidence.column("sequence").to_pylist()
    stopped_early = len(ids) < certificate.manifest["data"]["evaluation"]["n_sequences"]
    announced = certificate.manifest["identity"]["evaluation_sha256"]
    if not stopped_early and set_digest(ids) != announced:
        raise EvidenceError(
            f"{folder.path / EVIDENCE} holds other sequences than the manifest names"
        )
    difference = _first_difference(certificate.to_json(hashes), stored, "")
    if difference is not None:
        raise EvidenceError(f"{folder.path / CERTIFICATE} was edited: {difference}")
    result = Verification(certificate, len(hashes), len(ids))
    if model is None and sae is None and evaluation is None:
        return result
    if model is None or sae is None or evaluation is None:
        raise CertifyError("to measure again, verify needs all of model, sae and evaluation")
    if sample < 1:
        raise CertifyError(f"sample must be at least 1, got {sample}")
    # The hash is that of the certified dtype, whatever the checkpoint's is.
    sae, _ = load_sae(sae, dtype=certificate.manifest["sae"]["dtype"])
    if is_store(evaluation):
        # Which of its documents were the evaluation side is in the evidence.
        source = certificate.manifest["data"]["evaluation"]["source"]
        evaluation = certified_sequences(
            evaluation, certificate.config, model=model, source=source, hashes=ids
        )
    else:
        evaluation = sequences_for(model, evaluation, certificate.config)
    largest, n = _measure_again(certificate, model, sae, evaluation, sample, seed)
    return Verification(certificate, len(hashes), len(ids), n, largest)


def _measure_again(
    certificate: Certificate,
    model: Any,
    sae: Any,
    evaluation: Sequences,
    sample: int,
    seed: int,
) -> tuple[float, int]:
    identity, config = certificate.manifest["identity"], certificate.config
    for name, module, key in (
        ("model", getattr(model, "original_model", model), "model_sha256"),
        ("SAE", sae, "sae_sha256"),
    ):
        found = parameters_sha256(module.named_parameters())
        if found != identity[key]:
            raise CertifyError(
                f"this is not the certified {name}: its parameters hash to {found[:12]}…, the "
                f"certificate has {identity[key][:12]}…"
            )
    if evaluation.digest != identity["evaluation_sha256"]:
        raise CertifyError(
            f"these are not the certified evaluation sequences (digest {evaluation.digest[:12]}…, "
            f"the certificate has {identity['evaluation_sha256'][:12]}…)"
        )
    recorded = certificate.manifest["model"]
    strategy = Strategy(
        recorded["suffix_reuse"], recorded["chunked_head"], recorded.get("fused_head", False)
    )
    engine = ForwardEngine(model, strategy)
    adapter = adapt(sae)
    evaluation, clusters = evaluation.canonical, None
    if config.dependence != "ignore":
        evaluation, clusters = in_order(evaluation, find_clusters(evaluation))
    n_measured = certificate.evidence.num_rows
    table = certificate.evidence
    for name, expected in (("sequence", evaluation.hashes), (CLUSTER, clusters)):
        if expected is not None and table.column(name).to_pylist() != list(expected[:n_measured]):
            raise EvidenceError(
                f"column {name!r} of the evidence is not that of the certified documents in their order"
            )
    evaluation = evaluation.take(n_measured)
    generator = np.random.default_rng(seed)
    n = min(sample, len(evaluation))
    rows = np.sort(generator.choice(len(evaluation), size=n, replace=False))
    subject = Subject.of(adapter, certificate.calibration, config)
    tokens = evaluation.tokens[torch.from_numpy(rows)]
    columns = measure(engine, {"sae": subject}, tokens, config, special_token_ids(model))["sae"]
    largest = 0.0
    for name in ("violation", "rarest"):
        differ = np.flatnonzero(columns[name] != certificate.column(name)[rows])
        # Another machine may break a tie of activations the other way, which is rare.
        if len(differ) > n * _FLIPPED:
            raise EvidenceError(
                f"{name} of sequence {evaluation.hashes[int(rows[differ[0]])][:12]}… and {len(differ) - 1} others of "
                f"{n} measured again differs from the evidence"
            )
    for name in (name for name in columns if name.startswith("loss_")):
        difference = np.abs(columns[name] - certificate.column(name)[rows])
        largest = max(largest, float(difference.max()))
        if largest > REMEASURED_TOLERANCE:
            worst = int(rows[int(difference.argmax())])
            raise EvidenceError(
                f"{name} of sequence {evaluation.hashes[worst][:12]}… was measured again and differs "
                f"by {largest:.2e} bits from the evidence"
            )
    return largest, n


def _first_difference(computed: Any, stored: Any, where: str) -> str | None:
    """Describe the first entry in which two JSON values differ."""
    if isinstance(computed, dict) and isinstance(stored, dict):
        for key in sorted(computed.keys() | stored.keys()):
            path = f"{where}.{key}" if where else key
            if key not in stored:
                return f"{path} is missing"
            if key not in computed:
                return f"{path} was added"
            found = _first_difference(computed[key], stored[key], path)
            if found is not None:
                return found
        return None
    if isinstance(computed, list) and isinstance(stored, list) and len(computed) == len(stored):
        for index, (a, b) in enumerate(zip(computed, stored, strict=True)):
            found = _first_difference(a, b, f"{where}[{index}]")
            if found is not None:
                return found
        return None
    if isinstance(computed, float) and isinstance(stored, float):
        # Mathematical functions differ by an ulp between systems.
        same = math.isclose(computed, stored, rel_tol=1e-12, abs_tol=1e-15)
    else:
        same = type(computed) is type(stored) and computed == stored
    if not same:
        return f"{where} is {stored!r}, the evidence gives {computed!r}"
    return None
