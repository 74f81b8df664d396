"""Downstream tasks: how many questions do M, S∘M and h_G answer right (arXiv:2606.18383, zero-shot accuracy).

The questions, their prompts and what counts as right are those of EleutherAI's lm-evaluation-harness. All three answer
the same questions, so that differences are taken question by question.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saelens_certify.bounds import betting_upper
from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.evidence import dump_table
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import saved
from saelens_certify.integrations.scored_requests import PROXIES
from saelens_certify.report.experiments.tasks import tasks_figure
from saelens_certify.rounding import percent, rounded_down, rounded_up
from saelens_certify.storage import write_atomically

if TYPE_CHECKING:
    from saelens_certify.integrations.lm_eval import ProxyLM

KIND = "downstream_tasks"

PAPER_TASKS = ("winogrande", "piqa", "hellaswag")
"""The published tasks."""
PAPER_LIMIT = 1000
"""The published number of questions of each; the published coding rule is ``"topk:64"``."""

SAMPLES = "samples.parquet"
SCORING = "scoring"

_NAMES = {"base": "M", "sae": "S∘M", "pool": "h_G"}


def downstream_tasks(
    model: Any,
    sae: Any,
    *,
    calibration: Any = None,
    pool: Certificate | None = None,
    tasks: Sequence[str | Path | Mapping[str, Any]] = PAPER_TASKS,
    metric: str = "acc",
    config: CertifyConfig | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Compare the accuracy of a model and of both proxies of an SAE on multiple-choice tasks.

    Needs the extra ``lm-eval``. Each text is scored once, under all three. A text longer than the model's context
    loses its first tokens. Texts may be longer than the L tokens of the calibration sequences: then the pool is
    also asked about positions at which it was not made.

    Args:
        model: As for `certify`, with a tokenizer.
        sae: As for `certify`.
        calibration: Calibration documents, as for `certify`: their active features are the pool of h_G.
        pool: In place of them: a certificate of this model and SAE, whose pool is used.
        tasks: Tasks of the harness (see `load_tasks`); the published ones by default.
        metric: A metric of these tasks that lies between 0 and 1 on each question: ``"acc"`` (by log-probability),
            ``"acc_norm"`` (log-probability per character).
        config: Settings; published: ``CertifyConfig(coding="topk:64")``. Each interval spends delta /
            simultaneous. None: those of the certificate, or the default ones.
        limit: Only the first so many questions of each task (published: `PAPER_LIMIT`); None: all.
        num_fewshot: Solved examples in each prompt; None: as the task says, else none (published).
        include_path: A folder of further task files.
        output: Folder of the results: table, figure, ``samples.parquet`` (every question and choice), and under
            ``scoring`` what was scored: a run that was killed goes on where it stopped, and one with other
            tasks or more questions uses what it finds.

    Returns:
        Rows: see `task_rows`. No certificates: an accuracy is not a bounded loss of the model's text.

    Raises:
        CertifyError: Before any long work, if the harness is not installed, a task is unknown or wants
            generated text, or model, SAE and calibration do not fit together.
        EvidenceError: If ``output`` holds scores of another model, SAE, pool or setting.
    """
    from saelens_certify.integrations.lm_eval import answer, load_tasks, proxy_models
    from saelens_certify.integrations.proxy_scores import proxy_scores

    config = CertifyConfig.check(pool.config if config is None and pool is not None else config)
    limit = _whole("limit", limit, minimum=1)
    num_fewshot = _whole("num_fewshot", num_fewshot, minimum=0)
    folder = None if output is None else Path(output)
    found = load_tasks(tasks, metric, num_fewshot=num_fewshot, include_path=include_path)
    store = proxy_scores(
        model,
        sae,
        calibration=calibration,
        pool=pool,
        config=config,
        output=None if folder is None else folder / SCORING,
    )
    models = proxy_models(model, store)
    answers = {proxy: answer(each, found, limit) for proxy, each in models.items()}
    samples = samples_table(answers, models["base"], metric)
    if folder is not None:
        write_atomically(folder / SAMPLES, dump_table(samples))
    rows = task_rows(samples, metric, config.delta, config.share)
    experiment = Experiment(
        kind=KIND,
        title="Accuracy on downstream tasks",
        certificates={},
        rows=rows,
        findings=task_findings(rows),
        figure=tasks_figure(rows),
    )
    return saved(experiment, output)


def samples_table(
    answers: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], model: ProxyLM, metric: str
) -> pa.Table:
    """Put every scored choice of every question into a table.

    Args:
        answers: By proxy and task: what the harness logs of each question.
        model: One of the proxies' models; it knows what was asked and the scores of all of them.
        metric: The metric.

    Returns:
        One row per text that was scored: ``task``, ``question`` (number in the task), ``question_sha256``,
        ``choice`` (number in the question), ``request`` (hash of its tokens), ``n_tokens``, ``n_scored``,
        ``n_cut`` (tokens cut off on the left), ``violation``, and for each proxy ``logprob_``
        (nats), ``greedy_`` and ``value_`` (the metric of the whole question). ``chance``: the expected
        metric of a guess, null where it is not known.

    Raises:
        CertifyError: If the metric is not a number between 0 and 1 on each question.
    """
    rows: list[dict[str, Any]] = []
    for task, questions in answers["base"].items():
        for index, question in enumerate(questions):
            own = {proxy: answers[proxy][task][index] for proxy in PROXIES}
            values = {
                f"value_{name}": _value(task, metric, each[metric]) for name, each in own.items()
            }
            for choice, texts in enumerate(question["arguments"]):
                request = model.asked[texts[0], texts[1]]
                score = model.store[request]
                rows.append(
                    {
                        "task": task,
                        "question": int(question["doc_id"]),
                        "question_sha256": question["doc_hash"],
                        "choice": choice,
                        "request": request.key,
                        "n_tokens": len(request.tokens),
                        "n_scored": request.n_scored,
                        "n_cut": request.n_cut,
                        "violation": score.violation,
                        **{f"logprob_{name}": score.logprob[name] for name in PROXIES},
                        **{f"greedy_{name}": score.greedy[name] for name in PROXIES},
                        **values,
                        "chance": _chance(question),
                    }
                )
    return pa.Table.from_pylist(rows)


def task_rows(samples: pa.Table, metric: str, delta: float, share: float) -> tuple[Row, ...]:
    """Return one row per task.

    Questions count as independent draws of one distribution of questions. A drop is the mean over questions of
    the metric under M less that under the proxy; its interval is two-sided, from the differences of the
    questions in [-1, 1], by betting (Waudby-Smith & Ramdas 2024), in the order of the questions' hashes.

    Args:
        samples: What `samples_table` returned.
        metric: The metric.
        delta: Failure probability, as stated.
        share: Failure probability of each interval: delta, or less if several are to hold at once.

    Returns:
        ``task``; ``metric``; ``n``: questions; ``acc_base``, ``acc_sae``, ``acc_pool``: means of the metric under M,
        S∘M and h_G; ``chance``: that of guessing; ``drop_sae``, ``drop_pool`` with ``_lower`` and
        ``_upper``: intervals; ``confidence``: 1 - delta; ``above_chance``: whether M is above chance with
        that confidence; ``violations``: share of questions with a text on which h_G differs from S∘M,
        because a feature outside the pool is active; ``cut``: texts that lost tokens on the left.
    """
    names = samples.column("task").to_pylist()
    return tuple(
        _row(
            task,
            samples.take([row for row, name in enumerate(names) if name == task]),
            metric,
            delta,
            share,
        )
        for task in dict.fromkeys(names)
    )


def task_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say what the rows show, in sentences made from their numbers."""
    return tuple(_sentence(row) for row in rows)


def _row(task: str, samples: pa.Table, metric: str, delta: float, share: float) -> Row:
    questions = samples.column("question").to_numpy()
    hashes = samples.column("question_sha256").to_pylist()
    first = {int(number): row for row, number in reversed(list(enumerate(questions)))}
    # The bound depends on the order: hashes say nothing about who is right.
    places = sorted(first.values(), key=lambda row: (hashes[row], questions[row]))
    values = {name: samples.column(f"value_{name}").to_numpy()[places] for name in PROXIES}
    violation = samples.column("violation").to_numpy(zero_copy_only=False)
    chances = [samples.column("chance").to_pylist()[place] for place in places]
    chance = None if None in chances else float(np.mean(chances))
    row: Row = {"task": task, "metric": metric, "n": len(places)}
    row |= {f"acc_{name}": float(values[name].mean()) for name in PROXIES}
    row["chance"] = chance
    for name in ("sae", "pool"):
        drops = values["base"] - values[name]
        low, high = _interval(drops, share)
        row |= {
            f"drop_{name}": float(drops.mean()),
            f"drop_{name}_lower": low,
            f"drop_{name}_upper": high,
        }
    row["confidence"] = 1 - delta
    least = -betting_upper(-values["base"], -1.0, 0.0, share)
    row["above_chance"] = None if chance is None else bool(least > chance)
    row["violations"] = len(np.unique(questions[violation])) / len(places)
    row["cut"] = int((samples.column("n_cut").to_numpy() > 0).sum())
    return row


def _interval(values: NDArray[np.float64], share: float) -> tuple[float, float]:
    """Two-sided interval of the mean of values in [-1, 1]."""
    upper = betting_upper(values, -1.0, 1.0, share / 2)
    return -betting_upper(-values, -1.0, 1.0, share / 2), upper


def _sentence(row: Row) -> str:
    def points(name: str) -> str:
        drop, low, high = (
            100 * float(row[f"drop_{name}{end}"] or 0.0) for end in ("", "_lower", "_upper")
        )
        if low > 0:
            says = "accuracy is lost"
        elif high < 0:
            says = "accuracy is gained"
        else:
            says = "no change is shown"
        limits = f"[{rounded_down(low, 1)}, {rounded_up(high, 1)}]"
        return f"{_NAMES[name]} drops by {drop:.1f} points {limits}: {says}"

    accuracies = ", ".join(
        f"{name} {100 * float(row[f'acc_{proxy}'] or 0.0):.1f}%" for proxy, name in _NAMES.items()
    )
    text = (
        f"{row['task']} ({row['n']:,} questions, {row['metric']}): {accuracies}; {points('sae')}; {points('pool')} "
        f"(each interval at {percent(float(row['confidence'] or 0.0))} confidence); a feature outside the pool is active on "
        f"{100 * float(row['violations'] or 0.0):.1f}% of the questions"
    )
    if row["above_chance"] is False:
        text += (
            f"; M itself is not shown to be above chance ({100 * float(row['chance'] or 0.0):.1f}%), so a small "
            "drop says little"
        )
    return text


def _value(task: str, metric: str, value: Any) -> float:
    number = float(value) if isinstance(value, (bool, int, float, np.number)) else float("nan")
    if not 0.0 <= number <= 1.0:
        raise CertifyError(
            f"metric {metric!r} of task {task!r} is {value!r} on a question, not a number between 0 and 1; choose "
            "another metric, such as 'acc'"
        )
    return number


def _chance(question: Mapping[str, Any]) -> float | None:
    """Expected accuracy of a guess; None where the answer is no choice."""
    choices = len(question["arguments"])
    if "acc_mutual_info" in question["metrics"]:
        choices //= 2  # the harness asks for every choice once more, without the question
    if choices < 2:
        return None
    target = question["target"]
    return (len(set(target)) if isinstance(target, list) else 1) / choices


def _whole(name: str, value: Any, minimum: int) -> int | None:
    if value is None:
        return None
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise CertifyError(f"{name} must be None or a whole number from {minimum}, got {value!r}")
    return number
