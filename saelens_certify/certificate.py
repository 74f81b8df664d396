"""The certificate: bounds and baselines computed from evidence, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from saelens_certify.baselines import kept, unigram_risk
from saelens_certify.bounds import (
    Bound,
    Losses,
    Measured,
    Plan,
    Stop,
    certificates,
    doubling_thresholds,
    first_stop,
    log_binom,
    mean_up,
    plan,
    sharp_certificates,
    sharp_sequence,
    with_assumptions,
)
from saelens_certify.bounds import uniform_baseline as log2_vocab
from saelens_certify.bounds.baselines import Risk
from saelens_certify.bounds.kept import Kept
from saelens_certify.bounds.shuffle import ShuffleTest
from saelens_certify.bounds.statements import check_family, shared_delta
from saelens_certify.bounds.times import looks
from saelens_certify.config import CertifyConfig
from saelens_certify.controls import measured_controls, shuffle_tests
from saelens_certify.envelope import EVAL_TYPE, envelope
from saelens_certify.errors import EvidenceError
from saelens_certify.evidence import (
    CALIBRATION,
    CERTIFICATE,
    CLUSTER,
    EVIDENCE,
    RunFolder,
    finished_run,
    load_calibration,
    read_json,
    read_table,
    reading,
)
from saelens_certify.manifest import Manifest
from saelens_certify.metrics import flat_metrics
from saelens_certify.pool import Calibration, Pool
from saelens_certify.schedule import part_clusters, part_slices
from saelens_certify.sealing import check_complete, file_hashes, join_parts
from saelens_certify.storage import dump_json, write_atomically
from saelens_certify.verdict import verdict


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return f"<Certificate: {self.verdict()}>"

    @cached_property
    def config(self) -> CertifyConfig:
        """The settings."""
        return CertifyConfig.from_dict(self.manifest["config"])

    @cached_property
    def pool(self) -> Pool:
        """The concept pool G."""
        return self.calibration.pool(self.config.tau)

    @cached_property
    def clusters(self) -> tuple[str, ...] | None:
        """The cluster of each sequence; None if all count as independent."""
        if CLUSTER not in self.evidence.column_names:
            return None
        names = self.evidence.column(CLUSTER).to_pylist()
        if not any(names):
            return None
        ids = self.evidence.column("sequence").to_pylist()
        return tuple(name or own for name, own in zip(names, ids, strict=True))

    @cached_property
    def losses(self) -> Losses:
        """The losses of all evaluation sequences, checked."""
        return Losses.check(
            loss_base=self.column("loss_base"),
            loss_sae=self.column("loss_sae"),
            loss_pool=self.column("loss_pool"),
            violation=self.column("violation"),
            vocab_size=self.vocab_size,
            alpha=self.config.alpha,
            clusters=self.clusters,
            loss_unigram=self.column("loss_unigram"),
        )

    @cached_property
    def measured(self) -> Measured:
        """The measured terms, each rounded up."""
        return self.losses.measured

    @cached_property
    def bounds(self) -> dict[str, Bound]:
        """Every bound by name.

        u_sae, u_sae_occam, direct_base, direct_pool, preprint (not if the run could stop early: their N must be
        fixed), and those of `saelens_certify.bounds.SHARP`.
        """
        return self.bounds_at(self.config.delta, self.config.simultaneous)

    def bounds_at(self, delta: float, simultaneous: int = 1) -> dict[str, Bound]:
        """Every bound at another confidence, from the same evidence.

        Args:
            delta: Failure probability, chosen without regard to the results.
            simultaneous: How many certificates are to hold at once with probability 1 - delta; each
                is computed at delta / simultaneous (Bonferroni).

        Returns:
            As `bounds`.

        Raises:
            CertifyError: For an impossible value.
        """
        check_family(delta, simultaneous)
        constants: dict[str, Any] = {
            "dict_size": self.dict_size,
            "pool_size": self.pool.size,
            "delta": delta / simultaneous,
        }
        found: dict[str, Bound] = {}
        if not self.time_uniform:
            found = certificates(
                self.measured,
                vocab_size=self.vocab_size,
                alpha=self.config.alpha,
                **constants,
            )
        found |= sharp_certificates(
            self.losses,
            rarest=self.column("rarest"),
            thresholds=doubling_thresholds(self.calibration.counts.numpy(), self.config.tau),
            time_uniform=self.time_uniform,
            **constants,
        )
        return with_assumptions(
            found,
            1 - delta,
            *self._dependence(),
            *shared_delta(simultaneous),
            clusters=self.clusters is not None,
        )

    @property
    def unit(self) -> str:
        """What counts as one draw."""
        return "sequences" if self.clusters is None else "clusters of sequences"

    @property
    def time_uniform(self) -> bool:
        """Whether the number of sequences was allowed to depend on their losses (``config.until``)."""
        return self.config.until is not None

    @cached_property
    def stop(self) -> Stop | None:
        """Why and after how many sequences a run with ``config.until`` was decided; None if it was not."""
        if self.config.until is None:
            return None
        config = self.config
        return first_stop(self.losses, self.config.until, config.share, name=config.until_bound)

    def sequence(
        self, name: str | None = None, times: ArrayLike | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return a sharp bound after every number of sequences: valid at all of them at once.

        Args:
            name: A key of `saelens_certify.bounds.SHARP`, of a two-sided one the upper end; None: that of the verdict.
            times: Numbers of sequences (or clusters, where sequences were clustered); by default each up to 64,
                then eight for every doubling.

        Returns:
            The numbers, and the bounds: bits per token, non-increasing.

        Raises:
            CertifyError: For an unknown name or impossible times.
        """
        when = looks(self.measured.n_sequences) if times is None else np.asarray(times)
        name = name or self.headline.name
        share, nats = self.config.share, self.complexity
        return when, sharp_sequence(name, self.losses, share, when, complexity=nats)

    def plan(
        self,
        bound: str | None = None,
        *,
        target: float | None = None,
        margin: float | None = None,
        seed: int = 0,
    ) -> Plan:
        """Plan another run with this one as the pilot: how many sequences a bound needs.

        Args:
            bound: Any bound of `bounds` but sharp_occam_tau; None: that of the verdict.
            target: Bits per token that it is to be at most; by default the run's own (``until``), or what makes
                the verdict (below log2 V).
            margin: In place of a target: how far above its measured mean it may be.
            seed: Seed of the resampling.

        Returns:
            Median and 10 % to 90 % interval of the number of sequences (clusters), see
            `saelens_certify.bounds.Plan`. A forecast: certify on other sequences.

        Raises:
            CertifyError: For an unknown bound, both goals, or a pilot of one sequence.
        """
        if target is None and margin is None and isinstance(self.config.until, float):
            target = self.config.until
        return plan(
            bound or self.headline.name,
            self.losses,
            vocab_size=self.vocab_size,
            target=target,
            margin=margin,
            dict_size=self.dict_size,
            pool_size=self.pool.size,
            alpha=self.config.alpha,
            delta=self.config.share,
            time_uniform=self.time_uniform,
            seed=seed,
        )

    def _dependence(self) -> tuple[str, ...]:
        """What was done about sequences that repeat each other."""
        said: list[str] = []
        n, units = self.evidence.num_rows, self.measured.n_sequences
        copies = self.manifest["data"]["evaluation"]["source"]["n_duplicates"]
        if copies:
            said.append(
                f"{copies} exact copies of evaluation documents were left out: the distribution is that of "
                "documents without their repetitions."
            )
        if self.config.dependence == "ignore":
            said.append(
                "Sequences of one document and near duplicates were not looked for and count as independent."
            )
            return tuple(said)
        if units < n:
            said.append(f"{n} sequences form {units} clusters.")
        repeated = self.manifest["dependence"]["of_calibration"]["n_repeated"]
        if repeated:
            said.append(
                f"{repeated} evaluation sequences are near duplicates of calibration sequences: the "
                "distribution repeats the documents that the pool was made from."
            )
        return tuple(said)

    @property
    def vocab_size(self) -> int:
        """V, tokens."""
        return self.manifest["model"]["d_vocab"]

    @cached_property
    def complexity(self) -> float:
        """Ln C(m, P), nats."""
        return float(log_binom(self.dict_size, self.pool.size))

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
            "unigram": self.mean("loss_unigram"),
        }

    @cached_property
    def unigram_risk(self) -> Risk:
        """Risk of the calibration unigram model, with two-sided confidence limits."""
        return unigram_risk(self)

    @cached_property
    def kept(self) -> dict[str, Kept]:
        """Share of the model's advantage over a baseline that a proxy keeps, with confidence limits.

        By proxy and baseline: sae_unigram, sae_uniform, pool_unigram, pool_uniform.
        """
        return kept(self)

    @property
    def headline(self) -> Bound:
        """The bound behind the verdict, whatever the data say: ``config.until_bound``.

        Valid because the pool is fixed by disjoint calibration documents, and the order of the sequences by
        their hashes.
        """
        return self.bounds[self.config.until_bound]

    @property
    def nonvacuous(self) -> bool:
        """Whether the headline bound is below the loss of a uniform guess."""
        return self.headline.nonvacuous(self.baselines["uniform"])

    @cached_property
    def controls(self) -> dict[str, dict[str, float]]:
        """Measured controls by name: risk, gap to the model and KL of permuted or random decoders."""
        return measured_controls(self)

    @cached_property
    def shuffle_tests(self) -> dict[str, ShuffleTest]:
        """The SAE against its controls, by kind: permuted, matched, random_decoder, random_unit_decoder."""
        return shuffle_tests(self)

    def mean(self, name: str) -> float:
        """Return the mean of a column over the independent draws (means of clusters), rounded up."""
        return mean_up(self.losses.units(self.column(name).astype(np.float64)))

    def column(self, name: str) -> NDArray[Any]:
        """Return one column of the evidence as an array."""
        return self.evidence.column(name).to_numpy()

    def explained_variance(self, first: bool = True) -> float:
        """Return 1 - sum |x - x_hat|^2 / sum |x - mean|^2 on evaluation tokens, mean of calibration.

        Args:
            first: Whether position 0 counts (it is an outlier in many models).
        """
        suffix = "" if first else "_no_first"
        variance = math.fsum(self.column(f"variance{suffix}"))
        return 1 - math.fsum(self.column(f"mse{suffix}")) / max(variance, 1e-300)

    def verdict(self) -> str:
        """Return the result in one sentence."""
        return verdict(self)

    def to_metrics(self) -> dict[str, dict[str, float]]:
        """Return flat numbers in the nesting of ``sae_lens.run_evals``.

        Returns:
            ``{"faithfulness_certificate": {name: number}}``, ready for ``all_metrics.update(...)``:
            every bound by name (bits per token) and what it was computed from.
        """
        return {EVAL_TYPE: flat_metrics(self)}

    def to_json(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Return the certificate in SAEBench's envelope.

        Args:
            files: SHA-256 of every other file of the run, by name relative to its folder.

        Returns:
            Plain JSON values, a pure function of the run: nothing in it is free to change.
        """
        return envelope(self, files)

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
        for index, part in enumerate(part_slices(self.config, part_clusters(self.evidence))):
            table = self.evidence.slice(part.start, part.stop - part.start)
            folder.write_part(index, table.combine_chunks())
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
