"""The benchmark runs; what a sample costs, by counts of products and by the clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.monitor_cost import main, measure_cost, random_certificate
from benchmarks.random_models import GPT2
from saelens_certify.monitor.sampling import default_share


def test_a_share_costs_less_than_everything() -> None:
    # Wide enough that products dominate Python: measuring everything takes several times as long.
    sizes = {"n_layers": 4, "d_model": 192, "d_head": 48, "n_heads": 4, "d_mlp": 768}
    shape = replace(GPT2, settings=GPT2.settings | sizes | {"d_vocab": 4096}, d_sae=4096)
    certificate, model, sae = random_certificate(shape, 16, "blocks.3.hook_resid_post")
    default, whole = measure_cost(
        certificate, model, sae, shape, budget_s=1.0, min_rounds=4, max_rounds=6
    )
    assert 0 < default.share < 0.1
    assert whole.share == whole.measured == 1
    assert default.in_hooks < whole.in_hooks


def test_the_default_share_is_half_of_five_percent_of_the_products() -> None:
    """Of GPT-2's size, counted in products with a matrix, as the documentation says."""
    width, mlp, vocabulary, features = 768, 3072, 50257, 24576
    blocks = 12 * (4 * width * width + 2 * width * mlp)
    forward = blocks + width * vocabulary  # the embedding is looked up, the unembedding multiplies
    manifest = {
        "model": {
            "d_model": width, "d_vocab": vocabulary, "n_parameters": forward + width * vocabulary,
        },
        "sae": {"d_in": width, "d_sae": features},
    }  # fmt: skip
    share = default_share(manifest)
    assert share * width * features / forward == pytest.approx(0.025)
    assert round(share, 3) == 0.164
    assert default_share(manifest, 2) == share / 2


def test_the_benchmark_prints_and_writes(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--toy", "--rounds", "3", "--json", str(tmp_path / "cost.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["default", "share 1"]
    assert "| default |" in capsys.readouterr().out
