"""Certificates while SAEs train: real runs of SAELens, with and without W&B, and no trace left in them."""

from __future__ import annotations

import functools
import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.prefetch import PrefetchingIterator

from integrations import sae_lens_world as world
from integrations.test_sae_lens_inference import assert_same, snapshot, training_sae
from saelens_certify import CertifyConfig, CertifyError, certify, demo
from saelens_certify.integrations.sae_lens import (
    CertifyingEvaluator,
    History,
    inference_form,
)

CONFIG = CertifyConfig(seq_len=world.SEQ_LEN, progress=False)
PREFIX = "faithfulness_certificate"
HOOK = "blocks.1.hook_resid_post"


@functools.cache
def bundled() -> tuple[Any, list[str]]:
    """The bundled model and real passages."""
    return demo.load_model("HookedTransformer"), demo.load_texts("calibration")


@functools.cache
def bridge() -> tuple[Any, list[str]]:
    """The same as a TransformerBridge."""
    return demo.load_model("TransformerBridge"), demo.load_texts("calibration")


@functools.cache
def tiny() -> tuple[Any, list[str]]:
    """A random model and random words, where only equality counts."""
    return world.model(), world.texts(1200)


def runner(
    kind: str = "batchtopk",
    steps: int = 20,
    on: Callable[[], tuple[Any, list[str]]] = tiny,
    wandb: bool = False,
    **options: Any,
) -> LanguageModelSAETrainingRunner:
    """A run whose activations are scaled while training; the last 400 texts are kept out."""
    model, texts = on()
    config_class = {"batchtopk": BatchTopKTrainingSAEConfig, "topk": TopKTrainingSAEConfig}[kind]
    d_in = model.cfg.d_model
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LanguageModelSAERunnerConfig(
            sae=config_class(
                d_in=d_in, d_sae=2 * d_in, k=16, normalize_activations="expected_average_only_in"
            ),
            model_name=model.cfg.model_name,
            hook_name=HOOK,
            dataset_path="texts",
            context_size=16,
            train_batch_size_tokens=256,
            training_tokens=256 * steps,
            store_batch_size_prompts=32,
            n_batches_in_buffer=32,
            n_batches_for_norm_estimate=10,
            lr=3e-3,
            n_eval_batches=1,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=wandb, wandb_log_frequency=5, eval_every_n_wandb_logs=2),
            **options,
        )  # fmt: skip
        return LanguageModelSAETrainingRunner(
            config, override_model=model, override_dataset=Dataset.from_dict({"text": texts[:-400]})
        )


@functools.cache
def trained(**options: Any) -> dict[str, torch.Tensor]:
    """The weights that a run ends with by itself, and the random state it leaves."""
    state = {k: v.clone() for k, v in runner(**options).run().state_dict().items()}
    return {**state, "rng": torch.get_rng_state()}


def evaluator(
    on: Callable[[], tuple[Any, list[str]]] = tiny, n: int = 60, **options: Any
) -> CertifyingEvaluator:
    """An evaluator on texts kept out of training."""
    model, texts = on()
    documents = {"calibration": texts[-400 : -400 + n], "evaluation": texts[-200 : -200 + n]}
    return CertifyingEvaluator(**{"model": model, "config": CONFIG, **documents, **options})


def test_a_certificate_improves_while_an_sae_trains(tmp_path: Path) -> None:
    """A few hundred steps on real text: bound and gap go down, fast at first."""
    certifying = evaluator(bundled, n=150, log=tmp_path / "run.jsonl")
    run = runner(steps=240, on=bundled)
    with certifying.following(run, every=80) as history:
        sae = run.run()
    assert [record.step for record in history] == [0, 80, 160, 240]
    bounds, gaps = ([value for _, value in history.series(key)] for key in ("u_sae", "gap"))
    assert gaps[-1] < 0.25 * gaps[0]
    assert bounds[-1] < bounds[0] - 1
    assert gaps == sorted(gaps, reverse=True)
    # The last one is that of the SAE as it would be saved.
    saved = certify(
        run.model,
        inference_form(sae),
        calibration=certifying.calibration,
        evaluation=certifying.evaluation,
        config=CONFIG,
    ).to_metrics()[PREFIX]
    assert history[-1].metrics["u_sae"] == pytest.approx(saved["u_sae"], abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["metrics"]["gap"] for line in lines] == gaps
    assert [line["samples"] for line in lines] == [0, 20480, 40960, 61440]
    assert History.load(tmp_path / "run.jsonl").records == history.records
    figure = history.figure()
    bound = next(trace for trace in figure.data if trace.name == "U_SAE")
    assert list(bound.x) == [0, 80, 160, 240]
    assert list(bound.y) == bounds


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "batchtopk"},
        {"kind": "topk"},
        {"kind": "topk", "prefetch_llm_batches": 2},
        {"kind": "topk", "on": bridge},
    ],
    ids=["batchtopk", "topk", "prefetching", "bridge"],
)
def test_training_ends_with_the_same_weights_bit_by_bit(options: dict[str, Any]) -> None:
    certifying = evaluator(options.get("on", tiny))
    run = runner(**options)
    with certifying.following(run, every=7):
        state = dict(run.run().state_dict())
    assert [record.step for record in certifying.history] == [0, 7, 14, 20]
    wanted = dict(trained(**options))
    random = wanted.pop("rng")
    assert_same(state, wanted)
    if not options.get("prefetch_llm_batches"):  # there the producer may be a batch ahead
        assert torch.equal(torch.get_rng_state(), random)


class _Logged:
    """Stands for W&B: keeps what SAELens logs."""

    def __init__(self, monkeypatch: Any) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        monkeypatch.setattr(wandb, "init", lambda **_: None)
        monkeypatch.setattr(wandb, "finish", lambda: None)
        monkeypatch.setattr(wandb, "log", lambda row, step: self.rows.append((step, dict(row))))


def test_as_the_evaluator_of_a_run_that_logs_to_wandb(monkeypatch: Any) -> None:
    plain = runner(wandb=True)
    logged = _Logged(monkeypatch)
    wanted = dict(plain.run().state_dict())
    theirs = [(step, row) for step, row in logged.rows if "model_performance_preservation" in row]
    logged.rows.clear()

    run = runner(wandb=True)
    run.evaluator = evaluator(inner=run.evaluator, model=None)  # type: ignore[assignment]
    assert_same(dict(run.run().state_dict()), wanted)
    rows = [(step, row) for step, row in logged.rows if f"{PREFIX}/u_sae" in row]
    assert [step for step, _ in rows] == [9, 19]
    for (step, row), (their_step, their_row) in zip(rows, theirs, strict=True):
        assert step == their_step
        group = "model_performance_preservation"
        assert row[group] == their_row[group]
        assert row[f"{PREFIX}/n_sequences"] > 20
        assert "weights/W_dec_norms" in row


def several(**options: Any) -> MultiSAETrainingRunner:
    """Two SAEs at two hooks, one of them with scaled activations."""
    model, texts = tiny()
    torch.manual_seed(0)
    shared: dict[str, Any] = {"d_in": 32, "d_sae": 64, "k": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MultiSAETrainingRunnerConfig(
            saes={
                "early": TopKTrainingSAEConfig(**shared),
                "late": BatchTopKTrainingSAEConfig(
                    **shared, normalize_activations="expected_average_only_in"
                ),
            },
            hook_names={"early": "blocks.0.hook_resid_post", "late": HOOK},
            model_name=model.cfg.model_name,
            dataset_path="texts",
            context_size=16,
            train_batch_size_tokens=256,
            training_tokens=256 * 20,
            store_batch_size_prompts=32,
            n_batches_in_buffer=32,
            n_batches_for_norm_estimate=10,
            lr=3e-3,
            n_eval_batches=1,
            checkpoint_path=None,
            output_path=None,
            **options,
        )
        return MultiSAETrainingRunner(
            config, override_model=model, override_dataset=Dataset.from_dict({"text": texts[:-400]})
        )


@pytest.mark.parametrize("prefetch", [False, 2])
def test_several_saes_at_once(prefetch: Any, monkeypatch: Any) -> None:
    options = {"prefetch_llm_batches": prefetch}
    no_wandb = LoggingConfig(log_to_wandb=False)
    wanted = {
        name: {k: v.clone() for k, v in sae.state_dict().items()}
        for name, sae in several(logger=no_wandb, **options).run().items()
    }
    followed, run = evaluator(), several(logger=no_wandb, **options)
    with followed.following(run, every=10) as history:
        found = run.run()
    assert_same({name: dict(sae.state_dict()) for name, sae in found.items()}, wanted)
    assert [(r.name, r.step) for r in history] == [
        ("early", 0), ("late", 0), ("early", 10), ("late", 10), ("early", 20), ("late", 20),
    ]  # fmt: skip
    assert history.series("gap", "late") != history.series("gap", "early")

    logged = _Logged(monkeypatch)
    certifying = evaluator()
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=2)
    several(logger=logger, evaluator=certifying, **options).run()
    rows = [row for _, row in logged.rows if f"late/{PREFIX}/u_sae" in row]
    assert len(rows) == 2
    assert rows[1][f"early/{PREFIX}/gap"] < rows[0][f"early/{PREFIX}/gap"]
    assert len(certifying.history) == 4


def trainer_for(sae: Any, batches: Any, steps: int = 6) -> SAETrainer[Any, Any]:
    return SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * 64,
            train_batch_size_samples=64,
            lr_end=1e-4,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches,
    )


def batches(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(64, 32, generator=generator)


def test_a_trainer_without_a_runner_is_followed_and_given_back() -> None:
    trainer = trainer_for(training_sae("topk"), batches())
    certifying = evaluator()
    with certifying.following(trainer, every=4) as history:
        trainer.fit()
    assert [record.step for record in history] == [0, 4, 6]
    assert "step" not in vars(trainer)
    assert certifying.certificate is not None
    assert certifying.certificate.manifest["sae"]["id"] == "blocks.1.hook_resid_post"


def test_a_trainer_is_given_back_when_its_run_fails() -> None:
    def breaks() -> Any:
        yield from (batch for batch, _ in zip(batches(), range(3), strict=False))
        raise RuntimeError("no more data")

    trainer = trainer_for(training_sae("topk"), breaks())
    with (
        pytest.raises(RuntimeError, match="no more data"),
        evaluator().following(trainer, every=100),
    ):
        trainer.fit()
    assert "step" not in vars(trainer)
    run = runner()
    with pytest.raises(KeyError), evaluator().following(run):
        raise KeyError
    assert "run_trainer_with_interruption_handling" not in vars(run)


def test_a_run_is_followed_once_at_a_time() -> None:
    certifying, another = evaluator(), evaluator()
    trainer = trainer_for(training_sae("topk"), batches())
    for target, name in ((runner(), "LanguageModelSAETrainingRunner"), (trainer, "SAETrainer")):
        for _ in range(2):  # one after the other is no fault
            with (
                certifying.following(target, every=4),
                pytest.raises(CertifyError, match=f"follows that {name} already"),
                certifying.following(target, every=2),
            ):
                pass
    with certifying.following(trainer, every=4), another.following(trainer, every=2):
        trainer.fit()
    assert [record.step for record in certifying.history] == [0, 4, 6]
    assert [record.step for record in another.history] == [0, 2, 4, 6]


def test_the_sae_in_training_is_left_alone() -> None:
    sae = training_sae("batchtopk", normalize_activations="expected_average_only_in")
    trainer = trainer_for(sae, batches())
    trainer.activation_scaler.scaling_factor = 0.7
    sae.W_enc.grad = torch.ones_like(sae.W_enc)
    sae.train()
    before = snapshot(sae)
    evaluator().certify(sae, trainer.activation_scaler, trainer.data_provider)
    assert_same(snapshot(sae), before)
    assert trainer.activation_scaler.scaling_factor == 0.7


def test_the_prefetching_thread_waits() -> None:
    """While the model runs with our hooks, the producer must not run it too."""
    certifying = threading.Event()
    drawn: list[bool] = []

    def source() -> Any:
        while True:
            drawn.append(certifying.is_set())
            yield torch.zeros(1)

    provider = PrefetchingIterator(source(), prefetch=1)
    small = evaluator()
    forward = small.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        certifying.set()
        if provider._queue.qsize():
            provider._queue.get()  # makes room, which a running producer would fill at once
        time.sleep(0.05)
        certifying.clear()
        return forward(*args, **kwargs)

    small.model.forward = slow
    try:
        small.certify(training_sae("topk"), None, provider)
    finally:
        del small.model.forward
        provider.close()
    assert len(drawn) >= 2
    assert not any(drawn)


def test_metadata_of_the_run_reaches_the_certificate() -> None:
    sae = training_sae("topk")
    sae.cfg.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", dataset_path="words")
    certifying = evaluator()
    certifying.certify(sae, name="mine")
    assert certifying.certificate is not None
    recorded = certifying.certificate.manifest["sae"]
    assert recorded["id"] == "mine"
    assert recorded["config"]["metadata"]["dataset_path"] == "words"
