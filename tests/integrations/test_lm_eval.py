"""M, S∘M and h_G as models of the lm-evaluation-harness: its own Hugging Face model is the yardstick."""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from experiments.task_world import (
    CONFIG,
    N_QUESTIONS,
    calibration,
    model,
    questions,
    sae,
    write_endings,
    write_task,
)
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from saelens_certify import CertifyError, certify, demo
from saelens_certify.demo.loader import load_hf_model
from saelens_certify.experiments.tasks import PAPER_TASKS, _chance, _interval, downstream_tasks
from saelens_certify.integrations.lm_eval import ProxyLM, load_tasks, proxy_models
from saelens_certify.integrations.proxy_scores import proxy_scores
from saelens_certify.integrations.scored_requests import (
    PROXIES,
    ScoredTokens,
    ScoreStore,
)

CLOSE = 1e-3
"""Nats between two float32 passes over texts of up to 128 tokens."""

PAIRS = (
    ("The man went", " home"),
    ("The man went ", "home again"),
    ("The man went  ", " home"),
    ("", "Sir John called on them"),
    ("", "A"),
    ("It was", "n't so"),
    ("question:\n", "answer"),
    ("<|bos|>The man", " went"),
    ("Sir John", " called on them as soon as the next interval of fair weather"),
)


@pytest.fixture(scope="module")
def store() -> ScoreStore:
    return proxy_scores(model(), sae(), calibration=calibration(), config=CONFIG)


@pytest.fixture(scope="module")
def base(store) -> ProxyLM:
    return proxy_models(model(), store)["base"]


@pytest.fixture(scope="module")
def harness() -> HFLM:
    """The harness's model of the same weights; it feeds one token less than fits the context."""
    of_hf: Any = HFLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of_hf(
            pretrained=load_hf_model(), tokenizer=demo.load_tokenizer(), batch_size=3,
            max_length=model().cfg.n_ctx - 1,
        )  # fmt: skip


def instances(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def long_text(n: int) -> str:
    return " ".join(demo.load_texts("evaluation", 60)[:40])[:n]


def test_likelihoods_are_the_harness_own(base, harness) -> None:
    asked = instances("loglikelihood", *PAIRS)
    ours, theirs = base.loglikelihood(asked), harness.loglikelihood(asked, disable_tqdm=True)
    for (logprob, greedy), (expected, also) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=CLOSE)
        assert greedy == also
    assert base.cut == 0


def test_long_texts_are_cut_as_in_the_harness(store, harness) -> None:
    base = ProxyLM(model(), store, "base")
    asked = instances("loglikelihood", (long_text(2000), " and so on"), ("The end", " of it"))
    with pytest.warns(
        UserWarning, match="1 of 2 requests are longer than the model's context of 128"
    ):
        ours = base.loglikelihood(asked)
    theirs = harness.loglikelihood(asked, disable_tqdm=True)
    assert ours[0][0] == pytest.approx(theirs[0][0], abs=CLOSE)
    assert base.cut == 1
    request = base.asked[long_text(2000), " and so on"]
    assert len(request.tokens) == model().cfg.n_ctx
    assert request.n_cut == len(base.tok_encode(long_text(2000) + " and so on")) - 128


def test_rolling_likelihoods_are_the_harness_own(base, harness) -> None:
    texts = [(long_text(n),) for n in (3000, 900, 60, 1)] + [("",)]
    asked = instances("loglikelihood_rolling", *texts)
    ours, theirs = base.loglikelihood_rolling(asked), harness.loglikelihood_rolling(asked)
    assert ours == pytest.approx(theirs, abs=10 * CLOSE)
    assert ours[0] < ours[1] < ours[2] < 0


def test_three_models_share_what_was_scored(store) -> None:
    models = proxy_models(model(), store)
    asked = instances("loglikelihood", ("Quite another", " text"), ("Quite another", " text"))
    answers = {proxy: each.loglikelihood(asked) for proxy, each in models.items()}
    score = store[models["base"].asked["Quite another", " text"]]
    for proxy in PROXIES:
        assert answers[proxy] == [(score.logprob[proxy], score.greedy[proxy])] * 2
    assert len({score.logprob[proxy] for proxy in ("base", "sae")}) == 2


def test_bos_is_the_model_s_convention() -> None:
    tokenizer, seen = demo.load_tokenizer(), []

    def measure(tokens: torch.Tensor) -> ScoredTokens:
        seen.extend(tokens.tolist())
        shape = len(tokens), tokens.shape[1] - 1
        values = {proxy: torch.zeros(shape, dtype=torch.float64) for proxy in PROXIES}
        flags = {proxy: torch.zeros(shape).bool() for proxy in PROXIES}
        return ScoredTokens(values, flags, torch.zeros(len(tokens)).bool())

    for convention, first in ((True, [0]), (False, [])):
        cfg = SimpleNamespace(n_ctx=128, default_prepend_bos=convention)
        store = ScoreStore(measure, progress=False)
        lm = ProxyLM(SimpleNamespace(tokenizer=tokenizer, cfg=cfg), store, "base")
        lm.loglikelihood(instances("loglikelihood", ("The man", " went")))
        plain = tokenizer.encode("The man went", add_special_tokens=False)
        assert seen.pop() == first + plain
        lm.loglikelihood(instances("loglikelihood", ("", "The man")))
        assert seen.pop() == [0, *tokenizer.encode("The man", add_special_tokens=False)]
        assert not seen


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=60))
def test_intervals_contain_the_mean_and_mirror(drops) -> None:
    values = np.array(drops)
    low, high = _interval(values, 0.05)
    assert -1 <= low <= values.mean() <= high <= 1
    assert _interval(-values, 0.05) == (-high, -low)
    wider = _interval(values, 0.01)
    assert wider[0] <= low
    assert high <= wider[1]


# ------------------------------------------------------------------------------------ the preset


PAPER_DATA = {
    "winogrande": [
        {"sentence": f"The {a} did not fit into the box because the _ was too big.",
         "option1": a, "option2": "box", "answer": "1"}
        for a in ("chair", "table", "horse")
    ],
    "piqa": [
        {"goal": f"How to open a {a}?", "sol1": "with a key", "sol2": "with a cloud", "label": 0}
        for a in ("door", "box", "house")
    ],
    "hellaswag": [
        {"ctx_a": f"The {a} went home.", "ctx_b": "he", "activity_label": "Walking",
         "endings": ["sat down.", "flew to the sun.", "[title] was green.", "ate the door."],
         "label": "0"}
        for a in ("man", "boy")
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def every_task() -> TaskManager:
    return TaskManager()


def test_published_tasks_are_those_of_the_harness(every_task, tmp_path) -> None:
    """Its own definitions, by name, with local data in place of the hub's."""
    assert set(PAPER_TASKS) <= set(every_task.all_subtasks)
    for name in PAPER_TASKS:
        definition = every_task.task_index[name].yaml_path
        write_task(
            tmp_path, f"{name}_local", PAPER_DATA[name],
            include=str(definition), dataset_name=None, training_split=None,
        )  # fmt: skip
    experiment = downstream_tasks(
        model(),
        sae(),
        calibration=calibration(),
        tasks=[f"{name}_local" for name in PAPER_TASKS],
        include_path=tmp_path,
        config=CONFIG,
    )
    found = {row["task"]: (row["n"], row["chance"]) for row in experiment.rows}
    assert found == {
        "winogrande_local": (3, 0.5), "piqa_local": (3, 0.5), "hellaswag_local": (2, 0.25),
    }  # fmt: skip
    assert len(experiment.findings) == 3


def test_chance_counts_right_answers_and_choices() -> None:
    def question(n: int, target: Any, *metrics: str) -> dict[str, Any]:
        return {"arguments": [("", "")] * n, "target": target, "metrics": ["acc", *metrics]}

    assert _chance(question(4, 2)) == 0.25
    assert _chance(question(4, [0, 3])) == 0.5
    assert _chance(question(2, "the context is chosen, not the ending")) == 0.5
    assert _chance(question(8, 2, "acc_mutual_info")) == 0.25
    assert _chance(question(1, "word")) is None


# ----------------------------------------------------------------------------------------- errors


def refused(match: str, **arguments: Any) -> None:
    settings: dict[str, Any] = {"calibration": calibration(), "config": CONFIG, **arguments}
    with pytest.raises(CertifyError, match=match):
        downstream_tasks(settings.pop("model", model()), settings.pop("sae", sae()), **settings)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_endings(tmp_path)
    return tmp_path


def test_impossible_requests(folder) -> None:
    write_endings(folder, "writing", output_type="generate_until", metric_list=None)
    write_endings(folder, "reading", output_type="loglikelihood_rolling", metric_list=None)
    own: dict[str, Any] = {"include_path": folder}
    refused(
        "'writing' is of type 'generate_until': it wants generated text.*multiple_choice",
        tasks=["writing"],
        **own,
    )
    refused("'reading' is of type 'loglikelihood_rolling'", tasks=["reading"], **own)
    refused("no metric 'f2'; it has .*'acc'", tasks=["endings"], metric="f2", **own)
    refused("at least one task, got 'endings'", tasks="endings", **own)
    refused("at least one task", tasks=[], **own)
    refused("is no folder", tasks=["endings"], include_path=folder / "nowhere")
    for limit in (0, -1, 2.5, True, "all"):
        refused("limit must be", tasks=["endings"], limit=limit, **own)
    refused("num_fewshot must be", tasks=["endings"], num_fewshot=-1, **own)
    refused("either calibration=.*neither", tasks=["endings"], calibration=None, **own)
    refused("pool must be a Certificate", tasks=["endings"], calibration=None, pool=3, **own)


def test_unknown_task_is_named_with_what_is_like_it() -> None:
    refused("no task 'winogrnde'.*'winogrande'", tasks=["winogrnde"])


def test_unreadable_data_are_named(folder) -> None:
    (folder / "endings.jsonl").unlink()
    refused("endings.*cannot be loaded.*dataset_path: json", tasks=["endings"], include_path=folder)


def test_pool_of_something_else_is_refused(folder) -> None:
    certificate = certify(
        model(), sae(), calibration=calibration(),
        evaluation=demo.load_tokens("evaluation")[0][:20], config=CONFIG,
    )  # fmt: skip
    own: dict[str, Any] = {"tasks": ["endings"], "include_path": folder, "config": None}
    refused("either calibration=.*both", pool=certificate, **own)
    own["calibration"] = None
    other = demo.load_sae("layer4-standard")
    refused("not the certified SAE", sae=other, pool=certificate, **own)
    changed = copy.deepcopy(model())
    with torch.no_grad():
        next(changed.parameters()).mul_(1.001)
    refused("not the certified model", model=changed, pool=certificate, **own)
    own["config"] = CONFIG.from_dict({**CONFIG.to_dict(), "coding": "topk:5"})
    refused("coding is 'topk:5' in config and 'native'", pool=certificate, **own)


def test_texts_without_anything_to_score(base) -> None:
    for context in ("The man", ""):
        with pytest.raises(CertifyError, match="nothing can be scored of the continuation ''"):
            base.loglikelihood(instances("loglikelihood", (context, "")))
    with pytest.raises(CertifyError, match=r"continuation of \d+ tokens .* does not fit"):
        base.loglikelihood(instances("loglikelihood", ("So", " " + long_text(1500))))
    with pytest.raises(CertifyError, match="generate_until"):
        base.generate_until(instances("generate_until", ("So", {})))


def test_model_needs_a_tokenizer_and_a_first_token(store) -> None:
    cfg = SimpleNamespace(n_ctx=128, default_prepend_bos=False)
    with pytest.raises(CertifyError, match="no tokenizer"):
        ProxyLM(SimpleNamespace(tokenizer=None, cfg=cfg), store, "base")
    tokenizer = demo.load_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CertifyError, match="neither BOS nor EOS"):
        ProxyLM(SimpleNamespace(tokenizer=tokenizer, cfg=cfg), store, "base")
    with pytest.raises(CertifyError, match="proxy 'h_G' is unknown"):
        ProxyLM(model(), store, "h_G")


def test_missing_harness_says_what_to_install(monkeypatch) -> None:
    name = "saelens_certify.integrations.lm_eval"
    monkeypatch.delitem(sys.modules, name)
    for module in [m for m in sys.modules if re.fullmatch(r"lm_eval(\..*)?", m)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CertifyError, match=r"pip install 'saelens_certify\[lm-eval\]'"):
        importlib.import_module(name)
    refused("pip install", tasks=["endings"])


def test_tasks_given_as_files_and_configurations(folder) -> None:
    file = folder / "endings.yaml"
    assert list(load_tasks([file], "acc")) == ["endings"]
    whole = {
        "task": "inline", "dataset_path": "json", "validation_split": "validation",
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "endings.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "label",
        "doc_to_choice": "endings", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (task,) = load_tasks([whole], "acc").values()
    assert len(list(task.eval_docs)) == N_QUESTIONS == len(questions())
