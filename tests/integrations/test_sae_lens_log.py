"""What an evaluator writes down: its records, its log, why there is none, and what it does not take."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from integrations import sae_lens_world as world
from integrations.test_sae_lens_inference import training_sae
from integrations.test_sae_lens_training import batches, evaluator, trainer_for
from saelens_certify import CertifyError
from saelens_certify.integrations.sae_lens import History, Record


def test_a_step_that_cannot_be_certified_is_recorded_and_training_goes_on(tmp_path: Path) -> None:
    sae = training_sae("topk")
    sae.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
    trainer = trainer_for(sae, batches())
    certifying = evaluator(log=tmp_path / "log" / "run.jsonl")
    with (
        pytest.warns(UserWarning, match="no certificate at step"),
        certifying.following(trainer, every=3),
    ):
        trainer.fit()
    assert trainer.n_training_steps == 6
    assert all(record.refused and not record.metrics for record in certifying.history)
    assert certifying(sae, iter(()), None) == {}
    assert len((tmp_path / "log" / "run.jsonl").read_text().splitlines()) == 4
    with pytest.raises(CertifyError, match="blocks.9"):
        evaluator(on_refusal="raise").certify(sae)


def test_wrong_input_is_found_before_training() -> None:
    texts = world.texts(80)
    with pytest.raises(CertifyError, match="share [0-9]+ sequences"):
        evaluator(calibration=texts, evaluation=texts)
    with pytest.raises(CertifyError, match="evaluation= is an ActivationsStore"):
        evaluator(evaluation=world.store())
    with pytest.raises(CertifyError, match="give model="):
        evaluator(model=None)
    with pytest.raises(CertifyError, match="int has no .*; pass a HookedTransformer"):
        evaluator(model=3)
    for config in ({"alpha": 0.4}, {}):
        with pytest.raises(CertifyError, match="config must be a CertifyConfig, got dict"):
            evaluator(config=config)
    with pytest.raises(CertifyError, match="on_refusal"):
        evaluator(on_refusal="warn")
    with pytest.raises(CertifyError, match="is a folder"):
        evaluator(log=".")
    with (
        pytest.raises(CertifyError, match="every must be"),
        evaluator().following(object(), every=0),
    ):
        pass
    with pytest.raises(CertifyError, match="it has no 'step'"), evaluator().following(object()):
        pass


def test_runs_in_one_log_are_told_apart(tmp_path: Path) -> None:
    path, sae = tmp_path / "run.jsonl", training_sae("topk")
    for name in ("first", "second"):
        evaluator(log=path).certify(sae, step=5, name=name)
        evaluator(log=path).certify(sae, step=7, name=name)
    history = History.load(path)
    runs = [record.run for record in history]
    assert len(set(runs)) == 4
    assert runs[0] is not None
    assert [step for step, _ in history.series("u_sae", run=runs[0])] == [5]
    assert [step for step, _ in history.series("u_sae", "second")] == [5, 7]
    assert list(history.figure().data[0].x) == [7]
    assert history.figure().layout.title.text.endswith("second")
    assert list(history.figure(run=runs[0]).data[0].x) == [5]
    assert history.figure(run=runs[0]).layout.title.text.endswith("first")


def test_logs_without_the_name_of_a_run_are_read(tmp_path: Path) -> None:
    line = '{"step": %d, "samples": 2, "name": "a", "metrics": {"sharp_betting": 3.0}}\n'
    (tmp_path / "run.jsonl").write_text(line % 1 + line % 2)
    history = History.load(tmp_path / "run.jsonl")
    assert list(history.figure().data[0].x) == [1, 2]


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"step": 1, "samples": 2, "name": "a"}\n{"step": 2}\n')
    with pytest.raises(CertifyError, match="line 2 is no record"):
        History.load(tmp_path / "run.jsonl")


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path: Path) -> None:
    history = History(tmp_path / "run.jsonl")
    metrics = {"u_sae": math.inf, "gap": math.nan, "eta": 0.25, "n_sequences": 3}
    history.add(Record(1, 2, "sae", metrics))
    line = json.loads((tmp_path / "run.jsonl").read_text())
    assert line["metrics"] == {"u_sae": None, "gap": None, "eta": 0.25, "n_sequences": 3}
    assert history[0].metrics == metrics
    (found,) = History.load(tmp_path / "run.jsonl")
    assert math.isnan(found.metrics["u_sae"])
    assert found.metrics["eta"] == 0.25


def test_a_full_disk_does_not_end_a_training_run(tmp_path: Path, monkeypatch: Any) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.jsonl"
    trainer = trainer_for(training_sae("topk"), batches())
    certifying = evaluator(log=path)
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.warns(UserWarning, match=r"record of step 0 is kept, but not written to .*No space"),
        certifying.following(trainer, every=4) as history,
    ):
        trainer.fit()
    assert [record.step for record in history] == [0, 4, 6]
    assert all(record.metrics for record in history)
    with pytest.raises(OSError, match="No space left"):
        evaluator(log=path, on_refusal="raise").certify(training_sae("topk"))
