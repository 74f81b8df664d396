"""The benchmark runs, and the default sample costs a small share of a forward already at a small scale."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from benchmarks.monitor_cost import main, measure_cost, random_certificate
from benchmarks.random_models import GPT2


def test_the_default_share_is_cheap() -> None:
    # Wide enough that products dominate Python; generous bounds, for busy machines.
    sizes = {"n_layers": 6, "d_model": 256, "d_head": 64, "n_heads": 4, "d_mlp": 1024}
    shape = replace(GPT2, settings=GPT2.settings | sizes | {"d_vocab": 8192}, d_sae=4096)
    certificate, model, sae = random_certificate(shape, 16, "blocks.3.hook_resid_post")
    default, whole = measure_cost(
        certificate, model, sae, shape, budget_s=4.0, min_rounds=6, max_rounds=12
    )
    assert 0 < default.share < 0.5
    assert whole.share == whole.measured == 1
    assert default.in_hooks < 0.2
    assert default.in_hooks < whole.in_hooks


def test_the_benchmark_prints_and_writes(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--toy", "--rounds", "3", "--json", str(tmp_path / "cost.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["default", "share 1"]
    assert "| default |" in capsys.readouterr().out
