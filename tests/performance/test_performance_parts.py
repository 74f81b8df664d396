"""The pieces that numbers are made of: clocks, floors, memory, replay, baselines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.environment import commit
from benchmarks.faces import check
from benchmarks.inputs import Ring, SaeInputs
from benchmarks.memory import footprint
from benchmarks.replay import operator_calls
from benchmarks.results import line, write_json
from benchmarks.rooflines import Ceilings, Work, with_tf32
from benchmarks.rows_predictions import pair_chain, token_chain
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES
from benchmarks.table import DOCUMENT, ROOT, table, updated
from benchmarks.timing import Timing, interleaved
from saelens_certify import ops
from saelens_certify.ops._library import library


def test_contenders_take_turns_and_the_order_alternates() -> None:
    calls: list[str] = []

    def contender(name: str):
        def call(_: int) -> None:
            calls.append(name)
            time.sleep(3e-3)

        return call

    timings = interleaved(
        {"a": contender("a"), "b": contender("b")}, budget_s=0.0, min_rounds=3, warm_up=False
    )
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert all(len(t.samples) == 3 and t.median >= 3e-3 for t in timings.values())


def test_inputs_take_turns_and_short_calls_are_repeated() -> None:
    numbers: list[int] = []
    found = interleaved({"a": numbers.append}, budget_s=0.0, min_rounds=2)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 50
    assert 0 < found["a"].median < 1e-3
    seen = Ring(["x", "y"]).call(lambda part: part)
    assert [seen(number) for number in range(3)] == ["x", "y", "x"]


def test_rounds_stop_when_the_time_is_spent() -> None:
    slow = {"a": lambda _: time.sleep(0.01)}
    assert len(interleaved(slow, budget_s=0.0, min_rounds=3)["a"].samples) == 3
    assert len(interleaved(slow, budget_s=9.0, max_rounds=5)["a"].samples) == 5
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({})
    assert Timing((3.0, 1.0, 2.0)).median == 2.0
    assert Timing((3.0, 1.0, 2.0)).range == (1.0, 3.0)


def test_floor_adds_stages_and_takes_the_scarcer_resource_of_each() -> None:
    ceilings = Ceilings({"fp32": 100.0, "tf32": 100.0, "16bit": 400.0}, 10.0, None, True)
    assert ceilings.floor([Work(200.0, 10.0)]) == pytest.approx(2.0)
    assert ceilings.floor([Work(200.0, 10.0, "16bit")]) == pytest.approx(1.0)
    assert ceilings.floor([Work(200.0), Work(n_bytes=30.0)]) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("better", "ratio", "met"), [("lower", 1.0, True), ("lower", 1.1, False), ("higher", 1.0, True),
                                 ("higher", 0.9, False)],
)  # fmt: skip
def test_targets_have_a_direction(better, ratio: float, met: bool) -> None:
    row = Row("x", "a / b", lambda _: Measured(1.0), target=1.0, better=better)
    assert row.met(ratio) is met
    assert Row("x", "a / b", lambda _: Measured(1.0)).met(ratio) is None


def test_a_ratio_is_ours_over_the_baseline_or_the_reverse() -> None:
    session = Session("cpu")
    slow, quick = (lambda _: time.sleep(0.02)), (lambda _: time.sleep(0.01))
    options = {"budget_s": 0.0, "min_rounds": 2}
    lower = session.compare(quick, slow, **options)
    assert 0.3 < lower.ratio < 0.9
    higher = session.compare(quick, slow, better="higher", **options)
    assert 1.1 < higher.ratio < 3.0
    assert lower.floor_s is None
    assert lower.extra["rounds"] == 2


def test_memory_counts_what_is_alive_and_leaves_outputs_out() -> None:
    def call() -> Tensor:
        scratch = torch.ones(1 << 20)  # 4 MiB
        return scratch[: 1 << 18] + 1  # 1 MiB stays

    found = footprint(call, "cpu")
    assert found.outputs == 1 << 20
    assert found.extra == pytest.approx(4 << 20, abs=1024)  # and a few scalars
    assert found.against(4 << 20) == pytest.approx(1.0, rel=1e-3)


def test_memory_inside_operators_counts() -> None:
    W, x = torch.randn(4096, 32), torch.randn(256, 32)
    bias = torch.zeros(4096)
    found = footprint(lambda: ops.topk_encode(x, W, bias, k=4)[0], "cpu")
    # At least one tile of scores, and never all scores of a larger batch.
    assert found.extra > 64 << 10


def test_replay_repeats_only_the_compiled_operators() -> None:
    codes = SaeInputs(Session("cpu", quick=True), SHAPES[1]).codes[0]
    W = torch.randn(768, 64)
    replay = operator_calls(lambda: ops.decode(codes, W))
    assert (replay is None) == (library().path is None)
    if replay is not None:
        found = replay()
        assert isinstance(found, Tensor)
        assert found.equal(ops.decode(codes, W, impl="native")[0])
    assert operator_calls(lambda: ops.decode(codes, W, impl="torch")) is None


def test_synthetic_inputs_are_what_they_say() -> None:
    i = SaeInputs(Session("cpu", quick=True), SHAPES[1])
    assert i.weight.norm(dim=1).allclose(torch.ones(i.shape.m))
    codes = i.codes[0]
    for row in codes.indices.tolist():
        assert len(set(row)) == i.shape.k
        assert 0 <= min(row) <= max(row) < i.shape.m
    x = torch.randn(4000, i.shape.d)
    active = (x @ i.weight.T + i.bias > i.theta).double().sum(dim=1).mean()
    assert float(active) == pytest.approx(i.shape.k, rel=0.1)
    assert not i.x[0].equal(i.x[1])


def test_a_disagreement_with_the_baseline_is_an_error() -> None:
    a = torch.tensor([1.0, 2.0])
    check("sums", a, a + 1e-6, 1e-5)
    with pytest.raises(ValueError, match="disagree on sums"):
        check("sums", a, a + 1e-3, 1e-5)
    with pytest.raises(ValueError, match="disagree"):
        check("sums", a, torch.tensor([1.0, float("nan")]), 1.0)


def test_baseline_chains_compute_what_the_operators_do() -> None:
    torch.manual_seed(0)
    base, other = torch.randn(5, 40), torch.randn(5, 40)
    targets = torch.randint(40, (5,))
    stats = ops.token_stats(base.double().float(), targets, 0.5)
    for mine, theirs in zip(
        (stats.bits, stats.lse, stats.gold_logprob, stats.argmax),
        token_chain(base, targets, 0.5),
        strict=True,
    ):
        assert mine.double().allclose(theirs.double(), atol=1e-5)
    pair = ops.pair_stats(base, other, targets, 0.5)
    for mine, theirs in zip(
        (pair.bits_base, pair.bits, pair.kl, pair.agree, pair.gold_logprob_gap),
        pair_chain(base, other, targets, 0.5),
        strict=True,
    ):
        assert mine.double().allclose(theirs.double(), atol=1e-5)


def test_tf32_is_allowed_only_inside_the_call() -> None:
    before = torch.get_float32_matmul_precision()
    seen: list[str] = []
    with_tf32(lambda _: seen.append(torch.get_float32_matmul_precision()))(0)
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before

    def broken(_: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        with_tf32(broken)(0)
    assert torch.get_float32_matmul_precision() == before


def test_results_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_printed_lines_tell_ratio_target_and_verdict() -> None:
    entry = {"ratio": 0.25, "target": 0.5, "met": True, "better": "lower", "ours_s": 2e-3,
             "baseline_s": 8.0, "floor_s": None}  # fmt: skip
    assert "0.25" in (shown := line("K1.x", entry))
    assert "<= 0.5" in shown
    assert "met" in shown
    assert "2.00 ms" in shown
    assert "8.00 s" in shown
    assert "error: no" in line("x", entry | {"ratio": None, "error": "no"})


def test_only_one_scope_is_kept() -> None:
    session = Session("cpu")
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    session.keep("a", "x", lambda: make("ax"))
    assert session.keep("a", "x", lambda: make("again")) == "ax"
    session.keep("b", "x", lambda: make("bx"))
    session.keep("a", "x", lambda: make("ax"))
    assert made == ["ax", "bx", "ax"]


def test_the_document_shows_the_committed_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == updated(text, ROOT / "benchmarks"), "run python -m benchmarks.table"


def test_tables_show_failures_and_missed_targets() -> None:
    entry = {"target": 0.5, "better": "lower", "ours_s": 2e-3, "baseline_s": 1.0, "floor_s": None}
    records = {
        "K1.a": entry | {"ratio": 0.75, "met": False},
        "K1.b": entry | {"ratio": None, "met": False, "error": "no"},
        "K2.a": entry | {"ratio": 0.25, "met": True},
    }
    shown = table(records, "K1").splitlines()[2:]
    assert shown == [
        "| `K1.a` | 0.75 (missed) | ≤ 0.5 | 2 ms | 1 s |  |",
        "| `K1.b` | – | ≤ 0.5 | no | | |",
    ]


def test_a_copy_without_history_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.environment._ROOT", tmp_path)
    # The folders above may be under version control.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("SAELENS_CERTIFY_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("SAELENS_CERTIFY_COMMIT", "0123abc")
    assert commit() == "0123abc"
