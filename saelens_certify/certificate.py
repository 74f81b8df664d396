"""The certificate: bounds and baselines computed from evidence, and nothing else."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saelens_certify.bounds import Bound, Measured, certificates, log_binom, loss_range, mean_up
from saelens_certify.bounds import uniform_baseline as log2_vocab
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import EvidenceError
from saelens_certify.evidence import (
    CALIBRATION,
    CERTIFICATE,
    EVIDENCE,
    MANIFEST,
    RunFolder,
    finished_run,
    load_calibration,
    read_json,
    read_table,
    reading,
)
from saelens_certify.manifest import Manifest, provenance
from saelens_certify.pool import Calibration, Pool
from saelens_certify.storage import dump_json, sha256_file, write_atomically

EVAL_TYPE = "faithfulness_certificate"

HEADLINE = "u_sae"
"""The bound behind the verdict: valid because the pool is fixed by disjoint calibration documents."""


@dataclass(frozen=True)
class Certificate:
    """Upper bounds on a frozen model's expected loss through an SAE, and what they rest on.

    A pure function of manifest, calibration and evidence: the same three give the same certificate.

    Attributes:
        manifest: Provenance.
        calibration: Feature counts and what else calibration left behind.
        evidence: One row a sequence, sorted by sequence id. Losses, ``kl`` and
            ``gold_logprob_gap`` in bits per token; ``mse`` and ``variance`` per token.
    """

    manifest: Manifest
    calibration: Calibration
    evidence: pa.Table

    @cached_property
    def config(self) -> CertifyConfig:
        """The settings."""
        return CertifyConfig.from_dict(self.manifest["config"])

    @cached_property
    def pool(self) -> Pool:
        """The concept pool G."""
        return self.calibration.pool(self.config.tau)

    @cached_property
    def measured(self) -> Measured:
        """The measured terms, each rounded up."""
        return Measured.from_sequences(
            loss_base=self.column("loss_base"),
            loss_sae=self.column("loss_sae"),
            loss_pool=self.column("loss_pool"),
            violation=self.column("violation"),
        )

    @cached_property
    def bounds(self) -> dict[str, Bound]:
        """Every bound by name: u_sae, u_sae_occam, direct_base, direct_pool, preprint."""
        return certificates(
            self.measured,
            vocab_size=self.vocab_size,
            dict_size=self.dict_size,
            pool_size=self.pool.size,
            alpha=self.config.alpha,
            delta=self.config.delta,
        )

    @property
    def vocab_size(self) -> int:
        """V, tokens."""
        return self.manifest["model"]["d_vocab"]

    @property
    def dict_size(self) -> int:
        """m, features."""
        return self.manifest["sae"]["d_sae"]

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Loss of a uniform guess (log2 V) and measured risk of the calibration unigram model, bits.

        A bound below the first is non-vacuous; one that is not below the second as well has shown
        little.
        """
        return {
            "uniform": float(log2_vocab(self.vocab_size)),
            "unigram": mean_up(self.column("loss_unigram")),
        }

    @property
    def nonvacuous(self) -> bool:
        """Whether the headline bound (`u_sae`) is below the loss of a uniform guess."""
        return self.bounds[HEADLINE].nonvacuous(self.baselines["uniform"])

    @cached_property
    def controls(self) -> dict[str, dict[str, float]]:
        """Measured controls by name: risk, gap to the model and KL of permuted or random decoders."""
        names = [
            name.removeprefix("loss_")
            for name in self.evidence.column_names
            if name.startswith(("loss_permuted_", "loss_random_decoder"))
        ]
        base = self.column("loss_base")
        return {
            name: {
                "risk": mean_up(self.column(f"loss_{name}")),
                "gap": mean_up(np.abs(base - self.column(f"loss_{name}"))),
                "kl": mean_up(self.column(f"kl_{name}")),
            }
            for name in names
        }

    def column(self, name: str) -> NDArray[Any]:
        """Return one column of the evidence as an array."""
        return self.evidence.column(name).to_numpy()

    def explained_variance(self, first: bool = True) -> float:
        """Share of the activation's variance that the SAE explains on evaluation tokens.

        1 - sum |x - x_hat|^2 / sum |x - mean|^2, the mean being that of calibration.

        Args:
            first: Whether position 0 counts (it is an outlier in many models).
        """
        suffix = "" if first else "_no_first"
        variance = math.fsum(self.column(f"variance{suffix}"))
        return 1 - math.fsum(self.column(f"mse{suffix}")) / max(variance, 1e-300)

    def verdict(self) -> str:
        """Return the result in one sentence."""
        bound, uniform = self.bounds[HEADLINE], self.baselines["uniform"]
        unigram = self.baselines["unigram"]
        said = (
            f"With {percent(bound.confidence)} confidence the model's expected smoothed loss "
            f"(alpha = {self.config.alpha:g}) is at most {bound.value:.2f} bits per token by way of "
            "this SAE"
        )
        if not self.nonvacuous:
            return (
                f"{said}: vacuous, a uniform guess over {self.vocab_size} tokens has {uniform:.2f}."
            )
        beyond = (
            f"and {unigram - bound.value:.2f} below the measured loss of a unigram model ({unigram:.2f})"
            if bound.nonvacuous(unigram)
            else f"but no better than the measured loss of a unigram model ({unigram:.2f})"
        )
        return (
            f"{said}: {uniform - bound.value:.2f} below a uniform guess ({uniform:.2f}) {beyond}."
        )

    def to_metrics(self) -> dict[str, dict[str, float]]:
        """Return flat numbers in the nesting of ``sae_lens.run_evals``.

        Returns:
            ``{"faithfulness_certificate": {name: number}}``, ready for ``all_metrics.update(...)``:
            every bound by name (bits per token) and what it was computed from.
        """
        measured, config = self.measured, self.config
        flat: dict[str, float] = {name: bound.value for name, bound in self.bounds.items()}
        flat |= {
            "risk_base": measured.risk_base,
            "risk_sae": measured.risk_sae,
            "risk_pool": measured.risk_pool,
            "gap": measured.gap,
            "eta": measured.eta,
            "n_sequences": measured.n_sequences,
            "vocab_size": self.vocab_size,
            "dict_size": self.dict_size,
            "pool_size": self.pool.size,
            "alpha": config.alpha,
            "delta": config.delta,
            "loss_range": float(loss_range(self.vocab_size, config.alpha)),
            "log_binom": float(log_binom(self.dict_size, self.pool.size)),
            "baseline_uniform": self.baselines["uniform"],
            "baseline_unigram": self.baselines["unigram"],
            "kl": mean_up(self.column("kl")),
            "top1_agreement": mean_up(self.column("top1_agreement")),
            "gold_logprob_gap": mean_up(self.column("gold_logprob_gap")),
            "l0": mean_up(self.column("l0")),
            "explained_variance": self.explained_variance(),
            "explained_variance_no_first": self.explained_variance(first=False),
        }
        for name, control in self.controls.items():
            flat |= {f"{key}_{name}": value for key, value in control.items()}
        return {EVAL_TYPE: flat}

    def to_json(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Return the certificate in SAEBench's envelope.

        Args:
            files: SHA-256 of every other file of the run, by name relative to its folder.

        Returns:
            Plain JSON values, a pure function of the run: nothing in it is free to change.
        """
        sae = self.manifest["sae"]
        origin = sae.get("origin", {})
        identity = json.dumps(self.manifest["identity"], sort_keys=True)
        return {
            "eval_type_id": EVAL_TYPE,
            "eval_config": self.manifest["config"],
            "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, identity)),
            "datetime_epoch_millis": self.manifest["created_epoch_millis"],
            "eval_result_metrics": self.to_metrics(),
            "eval_result_details": [],
            "sae_bench_commit_hash": "",
            "sae_lens_id": origin.get("sae_id") or sae["id"],
            "sae_lens_release_id": origin.get("release"),
            "sae_lens_version": self.manifest["versions"]["sae-lens"],
            "sae_cfg_dict": sae["config"],
            "eval_result_unstructured": {
                "verdict": self.verdict(),
                "bounds": {
                    name: {
                        "value": bound.value,
                        "confidence": bound.confidence,
                        "theorem": bound.theorem,
                        "assumptions": list(bound.assumptions),
                        "terms": dict(bound.terms),
                    }
                    for name, bound in self.bounds.items()
                },
                "provenance": provenance(self.manifest),
                "identity": self.manifest["identity"],
                "files": dict(sorted(files.items())),
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write the run's folder; files already there from the same run are kept as they are.

        Args:
            path: The folder.

        Returns:
            The path of ``certificate.json``.

        Raises:
            EvidenceError: If the folder holds another run.
        """
        folder, manifest = RunFolder.open(path, self.manifest)
        if manifest != self.manifest:
            raise EvidenceError(
                f"{str(path)!r} already holds a repetition of this run; choose another folder"
            )
        folder.save_calibration(self.calibration)
        size = self.config.part_sequences
        for index, start in enumerate(range(0, self.evidence.num_rows, size)):
            folder.write_part(index, self.evidence.slice(start, size).combine_chunks())
        return self.seal(folder)

    def seal(self, folder: RunFolder) -> Path:
        """Write ``certificate.json`` over the files of a finished run."""
        target = folder.path / CERTIFICATE
        write_atomically(target, dump_json(self.to_json(file_hashes(folder))))
        return target

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a run's folder and compute its certificate anew.

        This checks that the folder is complete, not that nobody edited it: see `verify`.

        Args:
            path: The folder, or the ``certificate.json`` in it.

        Raises:
            EvidenceError: If a file is missing or damaged, or sequences are missing or doubled.
            CertifyError: If there is no such folder.
        """
        folder = finished_run(path)
        read_json(folder.path / CERTIFICATE)
        manifest = folder.manifest()
        calibration = load_calibration(folder.path / CALIBRATION)
        tables = [read_table(file) for file in folder.parts()]
        certificate = cls(manifest, calibration, join_parts(tables, folder.path / EVIDENCE))
        with reading(folder.path):
            check_complete(certificate, folder.path)
            certificate.to_metrics()  # whatever cannot be computed is found now
        return certificate


def percent(confidence: float) -> str:
    """Write a confidence without rounding it up: 95%, 99.9%."""
    return f"{100 * confidence:.12g}%"


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
    if ids != sorted(ids):
        raise EvidenceError(f"the parts in {where} are not in the order of their sequences")
    return evidence


def check_complete(certificate: Certificate, where: Path) -> None:
    """Check that all sequences that the manifest announces were calibrated and measured.

    Raises:
        EvidenceError: If not.
    """
    data = certificate.manifest["data"]
    for name, found in (
        ("calibration", certificate.calibration.n_sequences),
        ("evaluation", certificate.evidence.num_rows),
    ):
        if found != data[name]["n_sequences"]:
            raise EvidenceError(
                f"{where} holds {found} {name} sequences, its manifest announces "
                f"{data[name]['n_sequences']}; run again with the same settings to finish it"
            )
