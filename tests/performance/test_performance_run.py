"""`python -m benchmarks` at toy size: every row, the files it writes, and what failures do."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main, run
from benchmarks.results import environment_path
from benchmarks.rooflines import Ceilings
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES
from benchmarks.suites import UnknownRowError, chosen, rows_of
from saelens_certify.ops._library import Library

KEYS = {"ratio", "target", "met", "ours_s", "baseline_s", "floor_s"}
ROOT = Path(__file__).resolve().parents[2]


def check_record(name: str, record: dict[str, Any]) -> None:
    assert record.keys() >= KEYS, name
    assert record["better"] in ("lower", "higher")
    if "unavailable" in record:
        assert record["ratio"] is None
        assert record["met"] is None
        return
    assert "error" not in record, (name, record)
    assert math.isfinite(record["ratio"]), name
    assert record["ratio"] > 0, name
    if record["ours_s"] is not None:
        assert record["ours_s"] > 0
        assert record["baseline_s"] > 0


def test_every_cpu_row_at_toy_size(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.json"
    assert main(["cpu", "--quick", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    for name, record in records.items():
        check_record(name, record)
        # At toy size a ratio says nothing about the target.
        assert record["met"] is None
        if name.startswith("e2e") and record["ours_s"] is not None:
            assert min(record[key] for key in ("floor_s", "flops", "bytes")) > 0, name
    groups = {name.partition(".")[0] for name in records}
    assert groups == {"K1", "K2", "K3", "K4", "K5", "K6", "K7", "e2e"}
    targets = {name: record["target"] for name, record in records.items()}
    assert targets["e2e.protocol.GPT2"] == 2.7
    assert targets["e2e.six_layers.GPT2"] == 6
    assert targets["e2e.permutations.GPT2"] == 3
    assert targets["e2e.error_permutations.GPT2"] == 15
    assert all(targets[f"K4.dense.{shape}"] == 0.05 for shape in ("SmolLM2", "G2", "GE", "LL"))
    assert targets["K6.pair.GE"] == 0.5
    environment = json.loads(environment_path(path).read_text())
    assert environment["quick"] is True
    assert environment["ceilings"]["gemm"]["fp32"] > 0
    assert {"processor", "cores", "torch_threads", "load_average", "load_average_end", "commit",
            "instruction_sets", "build", "versions", "date"} <= environment.keys()  # fmt: skip
    assert sorted(p.name for p in path.parent.iterdir()) == ["cpu.environment.json", "cpu.json"]


def test_rows_of_the_gpu_suite_run_on_any_device(tmp_path: Path) -> None:
    """The same definitions with small tensors here: what differs on a GPU is the clock."""
    session = Session("cpu", quick=True)
    rows = rows_of("cuda", session)
    path = tmp_path / "cuda.json"
    records = run(rows, session, path, progress=False)
    for name, record in records.items():
        check_record(name, record)
    assert {"device.l2_read", "device.tiles.G2", "device.topk.LL"} <= records.keys()
    assert records["K1.exact.G2"]["target"] == 0.2
    assert records["K1.exact_tf32.LL"]["target"] == 0.45
    assert records["K5.memory.LL"]["target"] == 1.0
    assert json.loads(path.read_text()) == records


def test_gpu_suite_needs_no_sae_lens() -> None:
    script = (
        "import sys\n"
        "for name in ('sae_lens', 'transformer_lens', 'datasets', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.__main__ import run\n"
        "from benchmarks.session import Session\n"
        "from benchmarks.suites import chosen, rows_of\n"
        "session = Session('cpu', quick=True)\n"
        "rows = chosen(rows_of('cuda', session), ['K1.exact.G2', 'K7.head.G2'])\n"
        "records = run(rows, session, progress=False)\n"
        "assert all(record['ratio'] for record in records.values()), records\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def _row(name: str, ratio: float, **options: Any) -> Row:
    return Row(name, "a / b", lambda _: Measured(ratio), **options)


def test_a_row_that_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    def broken(_: Session) -> Measured:
        raise RuntimeError("out of memory")

    rows = [
        _row("a", 0.5, target=1.0),
        Row("b", "a / b", broken, target=1.0),
        _row("c", float("nan")),
        _row("d", 2.0, target=1.0),
        _row("e", 2.0, target=3.0, unavailable="belongs to another version"),
    ]
    path = tmp_path / "r.json"
    session = Session("cpu")
    session.ceilings = Ceilings({"fp32": 1.0}, 1.0, None, False)
    records = run(rows, session, path, progress=False)
    assert list(records) == ["a", "b", "c", "d", "e"]
    assert records["a"]["met"] is True
    assert records["b"]["error"] == "RuntimeError: out of memory"
    assert records["b"]["met"] is False
    assert "finite" in records["c"]["error"]
    assert records["d"]["met"] is False
    assert records["e"]["unavailable"] == "belongs to another version"
    assert all(record.keys() >= KEYS for record in records.values())
    assert json.loads(path.read_text()) == records


def test_exit_status_tells_of_failed_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Session) -> Measured:
        raise RuntimeError("no")

    monkeypatch.setattr(
        "benchmarks.__main__.rows_of", lambda *_: [Row("x", "a / b", broken), _row("y", 1.0)]
    )
    assert main(["cpu", "--quick"]) == 1
    assert "failed: x: RuntimeError: no" in capsys.readouterr().err
    assert main(["cpu", "--quick", "--only", "y"]) == 0


def test_unknown_names_are_refused_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--only", "K9"]) == 2
    message = capsys.readouterr().err
    assert "K9" in message
    assert "K7" in message
    assert "--list" in message


def test_names_choose_by_their_beginning_and_requested_rows_only_so() -> None:
    rows = [_row("K1.a", 1), _row("K1.b", 1), _row("K2.a", 1), _row("e.slow", 1, on_request=True)]
    assert [row.name for row in chosen(rows, [])] == ["K1.a", "K1.b", "K2.a"]
    assert [row.name for row in chosen(rows, ["K1"])] == ["K1.a", "K1.b"]
    assert [row.name for row in chosen(rows, ["e", "K1.b"])] == ["K1.b", "e.slow"]
    with pytest.raises(UnknownRowError, match="K3"):
        chosen(rows, ["K1", "K3"])


def test_list_shows_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(rows_of("cpu", Session("cpu")))
    assert any("only when named" in line for line in shown)
    assert any(line.startswith("e2e.sharp_sequences") for line in shown)


@pytest.mark.parametrize("suite", ["cpu", "cuda"])
def test_rows_have_distinct_names_and_say_what_they_divide(suite: str) -> None:
    rows = rows_of(suite, Session("cpu"))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.unavailable or row.what.count("/") >= 1, row.name


def test_a_gpu_is_asked_for_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["cuda", "--only", "K1"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_without_cuda_operators_torch_is_not_measured_against_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(
        "benchmarks.__main__.run", lambda *_: pytest.fail("rows were measured all the same")
    )
    monkeypatch.setattr("benchmarks.__main__.cuda_library", lambda: Library(None, "no such file"))
    assert main(["cuda", "--only", "K1"]) == 2
    assert "no CUDA operators to measure: no such file" in capsys.readouterr().err
    loaded = Library(Path("_cuda.abi3.so"), "")
    monkeypatch.setattr("benchmarks.__main__.cuda_library", lambda: loaded)
    monkeypatch.setattr("benchmarks.__main__.architecture_problem", lambda _: "compiled for sm_80")
    assert main(["cuda", "--only", "K1"]) == 2
    assert "no CUDA operators to measure: compiled for sm_80" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["cpu", "cuda"])
def test_every_operator_of_a_shape_comes_before_the_next_shape(suite: str) -> None:
    names = [row.name for row in rows_of(suite, Session("cpu"))]
    names = [name for name in names if not name.startswith("e2e.")]
    shapes = [name.rpartition(".")[2] for name in names if name.startswith(("K", "device.t"))]
    assert [key for key, _ in itertools.groupby(shapes)] == [shape.name for shape in SHAPES]
    if suite == "cuda":
        assert names[0] == "device.l2_read"
