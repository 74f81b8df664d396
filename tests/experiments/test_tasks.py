"""Downstream tasks through the lm-evaluation-harness, offline, against whole forwards."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.tasks import TaskManager

from experiments.task_world import (
    CONFIG,
    N_QUESTIONS,
    Oracle,
    calibration,
    model,
    questions,
    sae,
    tokens_of,
    write_endings,
)
from saelens_certify import CertifyConfig, CertifyError, EvidenceError, certification, certify, demo
from saelens_certify.experiments.result import Experiment
from saelens_certify.experiments.tasks import (
    _value,
    downstream_tasks,
    task_findings,
    task_rows,
)
from saelens_certify.integrations import proxy_scores as scoring
from saelens_certify.integrations.lm_eval import proxy_models
from saelens_certify.integrations.proxy_scores import proxy_scores
from saelens_certify.integrations.scored_requests import PROXIES

LOG = 2e-4
"""Nats between the engine's float32 and the oracle's float64, on texts of at most 20 tokens."""


def run(folder: Path, config: CertifyConfig | None = CONFIG, **arguments: Any) -> Experiment:
    given = {"calibration": calibration()} if "pool" not in arguments else {}
    settings: dict[str, Any] = {
        "tasks": ["endings"], "include_path": folder, "config": config, **given, **arguments,
    }  # fmt: skip
    which = settings.pop("model", None) or model()
    return downstream_tasks(which, settings.pop("sae", sae()), **settings)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_endings(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tasks) -> tuple[Experiment, Path]:
    output = tmp_path_factory.mktemp("finished") / "run"
    return run(tasks, output=output), output


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(calibration())


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """They take seconds; the run of `finished`, which begins before, has one."""
    monkeypatch.setattr("saelens_certify.experiments.result.write_picture", lambda *_: None)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Numbers of sequences that the engine was given, call by call."""
    calls: list[int] = []
    real = scoring.token_outputs

    def counting(engine, subjects, tokens, *rest):
        calls.append(len(tokens))
        return real(engine, subjects, tokens, *rest)

    monkeypatch.setattr(scoring, "token_outputs", counting)
    return calls


def samples(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "samples.parquet").to_pylist()


def test_scores_are_those_of_whole_forwards(finished, oracle) -> None:
    rows = samples(finished[1])
    assert len(rows) == 3 * N_QUESTIONS
    differ = 0
    for row in rows:
        question = questions()[row["question"]]
        tokens, n_scored = tokens_of(question["context"], " " + question["endings"][row["choice"]])
        assert (row["n_tokens"], row["n_scored"], row["n_cut"]) == (len(tokens), n_scored, 0)
        for proxy in PROXIES:
            logprob, greedy = oracle.score(tokens, n_scored, proxy)
            assert row[f"logprob_{proxy}"] == pytest.approx(logprob, abs=LOG)
            assert row[f"greedy_{proxy}"] == greedy
        outside = oracle.outside(tokens)
        assert any(outside[:-1]) <= row["violation"] <= any(outside)
        differ += row["logprob_sae"] != row["logprob_pool"]
    assert 0 < differ < len(rows)
    assert len({row["logprob_base"] - row["logprob_sae"] for row in rows}) > 2 * N_QUESTIONS


def test_rows_are_what_the_scores_say(finished) -> None:
    rows, (row,) = samples(finished[1]), finished[0].rows
    right = {}
    for proxy in PROXIES:
        scores = np.array([each[f"logprob_{proxy}"] for each in rows]).reshape(N_QUESTIONS, 3)
        labels = np.array([question["label"] for question in questions()])
        right[proxy] = (scores.argmax(axis=1) == labels).astype(float)
        assert row[f"acc_{proxy}"] == right[proxy].mean()
        assert [each[f"value_{proxy}"] for each in rows[::3]] == right[proxy].tolist()
    for proxy in ("sae", "pool"):
        drop = (right["base"] - right[proxy]).mean()
        assert row[f"drop_{proxy}"] == pytest.approx(drop)
        assert -1 <= row[f"drop_{proxy}_lower"] <= drop <= row[f"drop_{proxy}_upper"] <= 1
    violated = {each["question"] for each in rows if each["violation"]}
    assert row["violations"] == len(violated) / N_QUESTIONS
    assert (row["n"], row["chance"], row["confidence"], row["cut"]) == (N_QUESTIONS, 1 / 3, 0.95, 0)
    assert right["base"].mean() > 0.5, "the demo knows how its passages go on: the task is no noise"


@pytest.mark.parametrize("settings", [{"num_fewshot": None}, {"num_fewshot": 2}])
def test_accuracies_are_those_of_the_harness_itself(tasks, settings) -> None:
    """Its own entry point, on one of the three models."""
    experiment = run(tasks, metric="acc_norm", limit=15, **settings)
    store = proxy_scores(model(), sae(), calibration=calibration(), config=CONFIG)
    own: Any = lm_eval.simple_evaluate
    results = own(
        model=proxy_models(model(), store)["pool"],
        tasks=["endings"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=15,
        bootstrap_iters=0,
        **settings,
    )
    assert experiment.rows[0]["acc_pool"] == results["results"]["endings"]["acc_norm,none"]
    assert experiment.rows[0]["n"] == 15


def test_batches_do_not_change_the_scores(tasks, finished, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, batch_tokens=40, part_sequences=7)
    again = run(tasks, config, output=tmp_path / "run")
    assert again.rows == finished[0].rows
    for ours, theirs in zip(samples(tmp_path / "run"), samples(finished[1]), strict=True):
        for key, value in theirs.items():
            is_number = isinstance(value, float)
            assert ours[key] == (pytest.approx(value, abs=1e-5) if is_number else value)


def test_every_text_is_measured_once(tasks, counted) -> None:
    texts = {
        tuple(tokens_of(question["context"], " " + ending)[0])
        for question in questions()
        for ending in question["endings"]
    }
    run(tasks)
    assert sum(counted) == len(texts)


def test_killed_run_goes_on_where_it_stopped(
    tasks, finished, tmp_path, monkeypatch, counted
) -> None:
    output = tmp_path / "run"
    small = dataclasses.replace(CONFIG, part_sequences=5)
    whole = tmp_path / "whole"
    run(tasks, small, output=whole)
    total = sum(counted)
    counted.clear()
    counting = scoring.token_outputs

    def dies(*arguments):
        if sum(counted) > total // 2:
            raise KeyboardInterrupt
        return counting(*arguments)

    with monkeypatch.context() as context:
        context.setattr(scoring, "token_outputs", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tasks, small, output=output)
    kept = sum(len(pq.read_table(part)) for part in (output / "scoring").rglob("part-*.parquet"))
    assert 0 < kept < total
    counted.clear()
    with monkeypatch.context() as context:
        real = certification.calibration_pass
        context.setattr(certification, "calibration_pass", _never_with_work(real))
        again = run(tasks, small, output=output)
    assert sum(counted) == total - kept
    assert again.rows == finished[0].rows
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.parquet")}
        for folder in (output, whole)
    ]
    assert files[0] == files[1]


def _never_with_work(real: Any) -> Any:
    def checked(engine, readers, sequences, config, *, so_far, keep):
        assert [done for done, _ in so_far.values()] == [len(sequences)], "calibrated anew"
        return real(engine, readers, sequences, config, so_far=so_far, keep=keep)

    return checked


def test_more_questions_use_what_was_scored(tasks, tmp_path, counted) -> None:
    few = run(tasks, output=tmp_path / "run", limit=10)
    first = sum(counted)
    more = run(tasks, output=tmp_path / "run")
    assert (few.rows[0]["n"], more.rows[0]["n"]) == (10, N_QUESTIONS)
    counted_alone = sum(counted)
    run(tasks, output=tmp_path / "run")
    assert 0 < first < sum(counted) == counted_alone


def test_an_identical_proxy_loses_nothing(tasks, tmp_path) -> None:
    """ReLU(x) - ReLU(-x) = x: an SAE that keeps everything."""
    found = run(tasks, sae=_identity_sae(), output=tmp_path / "run")
    (row,) = found.rows
    assert row["acc_sae"] == row["acc_base"]
    assert row["drop_sae"] == 0.0
    for each in samples(tmp_path / "run"):
        assert each["logprob_sae"] == pytest.approx(each["logprob_base"], abs=1e-4)
        assert each["greedy_sae"] == each["greedy_base"]


def _identity_sae() -> Any:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    d = int(model().cfg.d_model)
    made = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(
            d_in=d, d_sae=2 * d, device="cpu", dtype="float32", apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name=None),
        )
    )  # fmt: skip
    eye = torch.eye(d)
    made.W_enc.data, made.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye])
    made.b_enc.data.zero_()
    made.b_dec.data.zero_()
    return made


def test_pool_of_a_certificate(tasks, finished, tmp_path) -> None:
    evaluation = demo.load_tokens("evaluation")[0][:40]
    certificate = certify(
        model(), sae(), calibration=calibration(), evaluation=evaluation, config=CONFIG
    )
    found = run(tasks, pool=certificate, config=None, output=tmp_path / "run")
    assert found.rows == finished[0].rows
    for ours, theirs in zip(samples(tmp_path / "run"), samples(finished[1]), strict=True):
        assert ours["logprob_pool"] == pytest.approx(theirs["logprob_pool"], abs=1e-5)


def test_bridge_gives_the_same(tasks, finished) -> None:
    bridge = demo.load_model("TransformerBridge")
    assert run(tasks, model=bridge).rows == finished[0].rows


def test_task_without_choices_has_no_chance(tmp_path, oracle) -> None:
    """Is the next word the most likely one? (The harness's type 'loglikelihood'.)"""
    write_endings(
        tmp_path, "words", output_type="loglikelihood", doc_to_choice=None,
        doc_to_target=" {{endings[label].split(' ')[0]}}", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    (row,) = run(tmp_path, tasks=["words"]).rows
    assert row["chance"] is None
    assert row["above_chance"] is None
    for proxy in PROXIES:
        right = [
            oracle.score(
                *tokens_of(each["context"], " " + each["endings"][each["label"]].split(" ")[0]),
                proxy,
            )[1]
            for each in questions()
        ]
        assert row[f"acc_{proxy}"] == np.mean(right)
    assert 0 < float(row["acc_base"] or 0) < 1


def test_files_and_findings(finished) -> None:
    experiment, output = finished
    names = {path.name for path in output.iterdir()}
    assert {"downstream_tasks.csv", "downstream_tasks.json", "downstream_tasks.html"} <= names
    written = json.loads((output / "downstream_tasks.json").read_text())
    assert written["rows"] == [dict(row) for row in experiment.rows]
    (finding,) = experiment.findings
    row = experiment.rows[0]
    for proxy in PROXIES:
        assert f"{100 * float(row[f'acc_{proxy}'] or 0):.1f}%" in finding
    assert f"{N_QUESTIONS} questions" in finding


def test_figure_shows_the_rows(finished) -> None:
    (row,) = finished[0].rows
    traces: list[Any] = list(finished[0].figure.data)
    bars = {trace.name: trace.y[0] for trace in traces if trace.type == "bar"}
    points = {trace.name: trace for trace in traces if "mode" in trace and trace.mode == "markers"}
    for proxy, name in (("base", "M"), ("sae", "S∘M"), ("pool", "h_G")):
        assert bars[name] == 100 * row[f"acc_{proxy}"]
        if proxy != "base":
            (drop,), ends = points[name].y, points[name].error_y
            assert drop == 100 * row[f"drop_{proxy}"]
            assert drop + ends.array[0] == pytest.approx(100 * row[f"drop_{proxy}_upper"])
            assert drop - ends.arrayminus[0] == pytest.approx(100 * row[f"drop_{proxy}_lower"])
    guessing = next(trace for trace in traces if trace.name == "guessing")
    assert guessing.y[0] == pytest.approx(100 / 3)
    picture = finished[1] / "downstream_tasks.png"
    assert not picture.exists() or picture.stat().st_size > 10_000


def _samples(right: dict[str, list[int]], chance: float) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "task": "some", "question": number, "question_sha256": f"{number:03}", "choice": choice,
                "n_cut": 0, "violation": choice == 0 and number % 4 == 0, "chance": chance,
                **{f"value_{proxy}": float(right[proxy][number]) for proxy in PROXIES},
            }
            for number in range(len(right["base"]))
            for choice in range(2)
        ]
    )  # fmt: skip


def test_findings_say_what_is_shown() -> None:
    n = 200
    good, poor = [1] * n, [1, 0] * (n // 2)
    for sae_right, base_right, says in (
        (poor, good, "S∘M drops by 50.0 points"), (good, poor, "accuracy is gained"),
        (good, good, "no change is shown"),
    ):  # fmt: skip
        table = _samples({"base": base_right, "sae": sae_right, "pool": good}, 0.5)
        rows = task_rows(table, "acc", 0.05, 0.05)
        (finding,) = task_findings(rows)
        assert says in finding
        assert ("accuracy is lost" in finding) == (sae_right is poor)
        assert ("not shown to be above chance (50.0%)" in finding) == (base_right is poor)
        assert rows[0]["above_chance"] == (base_right is good)
        assert rows[0]["violations"] == 0.25
        tighter = task_rows(table, "acc", 0.05, 0.005)[0]
        assert float(tighter["drop_sae_lower"] or 0) <= float(rows[0]["drop_sae_lower"] or 0)
        assert tighter["confidence"] == 0.95


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "yes", (0, 1), None])
def test_metric_that_is_no_share_is_refused(value) -> None:
    with pytest.raises(CertifyError, match="not a number between 0 and 1"):
        _value("some", "odd", value)


def test_random_state_is_left_alone(tasks) -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    run(tasks, limit=2, num_fewshot=1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_scores_of_another_setting_are_not_mixed(tasks, finished) -> None:
    other = dataclasses.replace(CONFIG, tau=2)
    with pytest.raises(EvidenceError, match="tau"):
        run(tasks, other, output=finished[1])


def test_damaged_part_is_named(tasks, finished, tmp_path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    part = sorted((folder / "scoring").rglob("part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(EvidenceError, match=part.name):
        run(tasks, output=folder)
