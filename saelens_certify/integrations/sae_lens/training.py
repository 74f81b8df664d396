"""Certificates while an SAE trains, with W&B or without."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch

from saelens_certify.certificate import Certificate
from saelens_certify.certification import certify
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, check_disjoint
from saelens_certify.errors import CertifyError
from saelens_certify.forward.seams import seams_of
from saelens_certify.integrations.sae_lens.activations_store import is_store
from saelens_certify.integrations.sae_lens.evals import GROUP, OnRefusal
from saelens_certify.integrations.sae_lens.history import History, Record
from saelens_certify.integrations.sae_lens.inference import inference_form
from saelens_certify.integrations.sae_lens.state import preserved_rng, replaced
from saelens_certify.preparation import sequences_for

# Runners hand their trainer to one of these before it fits.
_RUNNER_SEAMS = ("run_trainer_with_interruption_handling", "_run_with_interruption_handling")


class CertifyingEvaluator:
    """Certifies an SAE as it is at some step of its training.

    It has the signature of SAELens's evaluators: ``runner.evaluator = CertifyingEvaluator(inner=
    runner.evaluator, ...)`` for a ``LanguageModelSAETrainingRunner``, and ``evaluator=`` of a
    ``MultiSAETrainingRunnerConfig``. SAELens calls evaluators only when it logs to W&B; without W&B (or
    at steps of your own), `following` does it.

    What is certified is the form that would be saved now, made on a copy. Training goes on as if nothing
    had happened: SAE, gradients, optimizer, store and random generators are left alone, a prefetching
    thread waits, and the weights at the end are the same bit for bit.

    Args:
        model: The model; that of ``inner`` by default.
        calibration: Calibration documents, as for `certify`.
        evaluation: Held-out documents: the SAE must not have been trained on them, so a store is refused.
        inner: An evaluator to run first, whose metrics are kept.
        config: Settings of the certificates; the default shows no progress bars.
        prefix: Metrics are returned as ``{prefix}/{name}``.
        log: File to append one line of JSON a certificate to; each says by ``run`` which evaluator it
            is from.
        on_refusal: What to do where no certificate can be issued: ``"record"`` the reason with a warning
            and train on, or ``"raise"``. The same goes for a log that cannot be written (a full disk).

    Attributes:
        history: Every certificate so far, as numbers.
        certificate: The newest one.

    Raises:
        CertifyError: If the documents do not fit, before training begins.
    """

    def __init__(
        self,
        *,
        calibration: Any,
        evaluation: Any,
        model: Any = None,
        inner: Callable[..., dict[str, Any]] | None = None,
        config: CertifyConfig | None = None,
        prefix: str = GROUP,
        log: str | Path | None = None,
        on_refusal: OnRefusal = "record",
    ) -> None:
        if on_refusal not in get_args(OnRefusal):
            raise CertifyError(
                f"on_refusal must be one of {get_args(OnRefusal)}, got {on_refusal!r}"
            )
        model = getattr(inner, "model", None) if model is None else model
        if model is None:
            raise CertifyError("give model=, or inner= with a model (runner.evaluator has one)")
        seams_of(model)  # refuses what is no model
        for name, data in (("calibration", calibration), ("evaluation", evaluation)):
            if is_store(data):
                raise CertifyError(
                    f"{name}= is an ActivationsStore, and a training run's store holds what the SAE is "
                    "trained on; give documents kept out of training (for another store, "
                    "sequences_of_store(store, ...))"
                )
        self.model, self.inner = model, inner
        self.config = (
            CertifyConfig(progress=False) if config is None else CertifyConfig.check(config)
        )
        self.prefix, self.on_refusal = prefix, on_refusal
        # Chosen once: every step is judged on the same documents.
        self.calibration: Sequences = sequences_for(model, calibration, self.config)
        self.evaluation: Sequences = sequences_for(model, evaluation, self.config)
        check_disjoint(self.calibration, self.evaluation)
        self.history = History(log)
        self.certificate: Certificate | None = None
        self._followed: list[Any] = []

    def __call__(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        """Evaluate as SAELens does: the inner evaluator first, then the certificate.

        Args:
            sae: The SAE in training.
            data_provider: Where its activations come from; paused if it prefetches.
            activation_scaler: What it still lacks to take raw activations.

        Returns:
            Flat metrics.
        """
        metrics = (
            {} if self.inner is None else dict(self.inner(sae, data_provider, activation_scaler))
        )
        record = self.certify(sae, activation_scaler, data_provider)
        return metrics | {f"{self.prefix}/{key}": value for key, value in record.metrics.items()}

    def certify(
        self,
        sae: Any,
        activation_scaler: Any = None,
        data_provider: Any = None,
        *,
        step: int | None = None,
        samples: int | None = None,
        name: str | None = None,
    ) -> Record:
        """Certify the SAE as it is now and keep the record.

        Args:
            sae: The SAE, in training or not.
            activation_scaler: See `inference_form`.
            data_provider: See `__call__`.
            step: For the record.
            samples: For the record.
            name: For the record.

        Returns:
            The record.

        Raises:
            CertifyError: If there is no certificate and ``on_refusal="raise"``.
            OSError: If the log cannot be written and ``on_refusal="raise"``.
        """
        started = time.perf_counter()
        name = name or str(sae.cfg.metadata.hook_name)
        metrics: dict[str, float] = {}
        refused = None
        try:
            # The producer runs the same model, whose hooks are ours for a while; so it waits, and only
            # then are random states noted, which it moves too.
            with _paused(data_provider), preserved_rng(), torch.no_grad():
                self.certificate = certify(
                    self.model,
                    inference_form(sae, activation_scaler),
                    calibration=self.calibration,
                    evaluation=self.evaluation,
                    config=self.config,
                    sae_id=name,
                )
                metrics = self.certificate.to_metrics()[GROUP]
        except CertifyError as error:
            if self.on_refusal == "raise":
                raise
            refused = str(error)
            warnings.warn(f"no certificate at step {step}: {error}", stacklevel=2)
        seconds = time.perf_counter() - started
        record = Record(step, samples, name, metrics, refused, seconds, self.history.run)
        try:
            self.history.add(record)
        except OSError as error:
            if self.on_refusal == "raise":
                raise
            warnings.warn(
                f"the record of step {step} is kept, but not written to {str(self.history.path)!r}: {error}",
                stacklevel=2,
            )
        return record

    @contextmanager
    def following(self, target: Any, every: int = 1000) -> Iterator[History]:
        """Certify at steps 0, every, 2·every, … and at the end of a run inside the with-block.

        This needs no W&B: the public ``step`` of the trainer is watched, on that one object and only
        inside the block. The trainer's own evaluator is not called.

        Args:
            target: A ``LanguageModelSAETrainingRunner``, ``MultiSAETrainingRunner``, ``SAETrainer`` or
                ``MultiSAETrainer`` that will run inside the block.
            every: Steps between certificates.

        Yields:
            The history, which grows while the run goes on.

        Raises:
            CertifyError: If ``every`` is not a positive number, target is none of the four, or is being
                followed already.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise CertifyError(f"every must be an integer of at least 1, got {every!r}")
        seam = next((name for name in _RUNNER_SEAMS if callable(getattr(target, name, None))), None)
        if seam is None:
            with self._following_trainer(target, every):
                yield self.history
            return
        run = getattr(target, seam)

        def run_followed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            with self._following_trainer(trainer, every):
                return run(trainer, *args, **kwargs)

        with self._once(target), replaced(target, seam, run_followed):
            yield self.history

    @contextmanager
    def _once(self, target: Any) -> Iterator[None]:
        """Note what is being followed: one history must not have a step twice."""
        if any(item is target for item in self._followed):
            raise CertifyError(
                f"this CertifyingEvaluator follows that {type(target).__name__} already, and would put "
                "its steps into one history twice; leave out one of the two with-blocks, or use another "
                "CertifyingEvaluator for it"
            )
        self._followed.append(target)
        try:
            yield
        finally:
            self._followed = [item for item in self._followed if item is not target]

    @contextmanager
    def _following_trainer(self, target: Any, every: int) -> Iterator[None]:
        several = getattr(target, "trainers", None)
        trainers = dict(several) if several is not None else {None: target}
        for trainer in trainers.values():
            _check_trainer(trainer)
        with ExitStack() as stack:
            for name, trainer in trainers.items():
                stack.enter_context(self._watching(trainer, target, name, every))
            yield

    @contextmanager
    def _watching(self, trainer: Any, outer: Any, name: str | None, every: int) -> Iterator[None]:
        """Certify one trainer's SAE after some of its steps; ``outer`` has the data provider."""
        step = trainer.step
        certified = -1

        def now(done: int) -> None:
            nonlocal certified
            if done == certified:
                return
            certified = done
            self.certify(
                trainer.sae,
                trainer.activation_scaler,
                outer.data_provider,
                step=done,
                samples=trainer.n_training_samples,
                name=name,
            )

        def watched(batch: Any) -> Any:
            if trainer.n_training_steps == 0:
                now(0)
            output = step(batch)
            done = trainer.n_training_steps + 1
            if done % every == 0:
                now(done)
            return output

        with self._once(trainer), replaced(trainer, "step", watched):
            yield
        # By now the trainer has folded its scaler, which changes the SAE by rounding at most.
        if trainer.n_training_steps:
            now(trainer.n_training_steps)


def _paused(data_provider: Any) -> AbstractContextManager[Any]:
    """Pause whatever prefetches, also behind the single-hook view of a run of several SAEs."""
    for provider in (data_provider, getattr(data_provider, "_source", None)):
        pause = getattr(provider, "paused", None)
        if callable(pause):
            context = pause()
            if isinstance(context, contextlib.AbstractContextManager):
                return context
    return nullcontext()


def _check_trainer(trainer: Any) -> None:
    needed = ("step", "sae", "activation_scaler", "n_training_steps", "n_training_samples")
    missing = [name for name in needed if not hasattr(trainer, name)]
    if missing:
        import sae_lens

        raise CertifyError(
            f"a {type(trainer).__name__} cannot be followed: it has no {missing[0]!r} (SAELens "
            f"{sae_lens.__version__}); give a SAELens runner or trainer"
        )
