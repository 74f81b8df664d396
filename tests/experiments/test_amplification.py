"""Error amplification: the arithmetic on the published table, the rows against forward passes written out."""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify import CertifyConfig, CertifyError
from saelens_certify.experiments.amplification import (
    KL_FLOOR,
    PUBLISHED_HORIZONS,
    Amplification,
    amplification,
    amplification_findings,
    amplification_rows,
    error_amplification,
)
from saelens_certify.experiments.result import Experiment

PUBLISHED = Path(__file__).parents[1] / "data" / "published" / "fig3_horizon_kl.csv"
CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)
# Blocks after the published hooks: 12, 18 and 32 layers; block 6's input, block 12's and block L's output.
AFTER = {"GPT-2 Small": lambda _: 6, "Gemma-2B": lambda _: 5, "Llama-3.1-8B": lambda n: 31 - n}


def published() -> dict[tuple[str, int], dict[Any, float]]:
    found: dict[tuple[str, int], dict[Any, float]] = {}
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            horizon = "full" if row["Horizon"] == "full" else int(row["Horizon"])
            place = found.setdefault((row["Model"], int(row["Patch Layer"])), {})
            place[horizon] = float(row["Mean KL (bits)"])
    return found


@functools.cache
def experiment() -> Experiment:
    saes = [make_sae(hook=f"blocks.{layer}.hook_resid_post") for layer in range(3)]
    return error_amplification(
        hooked_transformer(),
        [*saes, make_sae("transcoder", hook="blocks.1.ln2.hook_normalized")],
        calibration=make_tokens(20, seed=1),
        evaluation=make_tokens(24, seed=2),
        config=CONFIG,
    )


# The arithmetic.


def test_published_means_split_into_local_error_and_growth() -> None:
    """Figure 3's reading: in Llama, layers differ in what follows the hook, not in what is wrong at it."""
    found = {
        place: amplification(kl, AFTER[place[0]](place[1])) for place, kl in published().items()
    }
    assert len(found) == 10
    for place, kl in published().items():
        one = found[place]
        # An oracle by quotients, without logarithms of each horizon.
        assert 2**one.growth == pytest.approx(kl["full"] / kl[0], rel=1e-12)
        assert (one.local, one.full) == (kl[0], kl["full"])
        assert one.per_block == pytest.approx(one.growth / AFTER[place[0]](place[1]))
    llama = {layer: one for (model, layer), one in found.items() if model.startswith("Llama")}
    assert list(llama) == [4, 8, 12, 16, 20, 24, 28, 30]
    growths = [one.growth for one in llama.values()]
    assert growths == sorted(growths, reverse=True)
    assert growths[0] == pytest.approx(math.log2(12.016233156597803 / 1.2797502241437397))
    assert max(growths) - min(growths) > 3.5
    logs = [math.log2(one.local) for one in llama.values()]
    assert max(logs) - min(logs) < 0.7
    # Most of it happens in the first block after the hook; only layer 24's steepest step is later.
    assert [one.step for one in llama.values()] == [1, 1, 1, 1, 1, 4, 1, None]
    # One block is left after layer 30: horizon 1 is the whole model.
    assert published()["Llama-3.1-8B", 30][1] == published()["Llama-3.1-8B", 30]["full"]
    assert llama[30].growth < 0
    assert found["GPT-2 Small", 6].growth < 0
    assert found["Gemma-2B", 12].growth < 0
    assert found["Gemma-2B", 12].step == 1


def test_findings_on_the_published_table() -> None:
    rows: list[Any] = []
    for (model, layer), kl in published().items():
        if not model.startswith("Llama"):
            continue
        one = amplification(kl, 31 - layer)
        rows.append(
            {
                "name": f"layer {layer}", "layer": layer, "blocks_after": 31 - layer, "horizon": "full",
                "kl": kl["full"], "local": one.local, "growth": one.growth, "growth_per_block": one.per_block,
                "steepest_step_to": one.step, "steepest_step_growth": one.step_growth,
            }
        )  # fmt: skip
    said = amplification_findings(rows)
    assert len(said) == 10
    assert "1.2798 bits per token at the hook, 12.0162 after the 27 blocks that follow" in said[0]
    assert "a factor of 9.39 (+3.23 doublings, +0.12 a block)" in said[0]
    assert "steepest up to horizon 1 (+1.96 a block)" in said[0]
    assert said[-1].startswith("Earlier layers are amplified more, without exception, as the paper")
    assert "more in growth (3.95 doublings" in said[-1]
    # The other way round: growth rises with depth.
    turned = [row | {"layer": -row["layer"]} for row in rows]
    assert "amplified more in 0 of 28 pairs of layers, which is not what" in amplification_findings(
        turned
    )[-1]  # fmt: skip
    one_layer = amplification_findings(rows[:1])
    assert len(one_layer) == 2


bits = st.floats(0.0, 20.0)


@given(bits, st.lists(bits, max_size=3), bits, st.integers(4, 30), st.floats(0.5, 4.0))
def test_growth_is_a_factor_whatever_lies_between(local, between, full, after, scale) -> None:
    kl: dict[Any, float] = {0: local, **{1 + h: x for h, x in enumerate(between)}, "full": full}
    found = amplification(kl, after)
    top, bottom = max(full, KL_FLOOR), max(local, KL_FLOOR)
    assert bottom * 2**found.growth == pytest.approx(top, rel=1e-9)
    assert found.per_block * after == pytest.approx(found.growth, abs=1e-12)
    # All divergences times a factor: the same growth, unless the floor hides them.
    if min(kl.values()) > 10 * KL_FLOOR:
        scaled = amplification({h: scale * x for h, x in kl.items()}, after)
        assert scaled.growth == pytest.approx(found.growth, abs=1e-9)
        assert scaled.local == pytest.approx(scale * local)
    at = {h: after if h == "full" else h for h in kl}
    steps = [
        (math.log2(max(kl[b], KL_FLOOR)) - math.log2(max(kl[a], KL_FLOOR))) / (at[b] - at[a])
        for a, b in zip(list(kl), list(kl)[1:], strict=False)
    ]
    if max(steps) > 0:
        assert found.step_growth == pytest.approx(max(steps))
        assert found.step is not None
        assert steps[list(kl).index(found.step) - 1] == max(steps)
    else:
        assert found.step is found.step_growth is None


def test_rounding_does_not_pass_for_growth() -> None:
    exact = amplification({0: 0.0, "full": 0.0}, 3)
    assert exact == Amplification(0.0, 0.0, 0.0, 0.0, None, None)
    noise = amplification({0: 1e-12, 1: 1e-9, "full": 5e-8}, 3)
    assert (noise.growth, noise.step) == (0.0, None)
    real = amplification({0: 0.0, "full": 1.0}, 4)
    assert real.growth == pytest.approx(math.log2(1e6))
    at_the_end = amplification({0: 0.5, "full": 0.5}, 0)
    assert (at_the_end.growth, at_the_end.per_block, at_the_end.step) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("kl", "after", "message"),
    [
        ({0: 1.0, 1: 1.0}, 4, "lack 0 or 'full'"),
        ({1: 1.0, "full": 1.0}, 4, "lack 0 or 'full'"),
    ],
)
def test_impossible_horizons(kl, after, message) -> None:
    with pytest.raises(CertifyError, match=message):
        amplification(kl, after)


# What is measured.


@torch.no_grad()
def divergence(sae: Any, tokens: torch.Tensor, layer: int) -> np.ndarray:
    """KL(M || S∘M) at the output of a block, by whole forward passes and full softmaxes in float64."""
    model = hooked_transformer()
    hook_in, hook_out = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out
    hook_out = hook_out or hook_in
    target = f"blocks.{layer}.hook_resid_post"
    _, cache = model.run_with_cache(tokens)
    put = sae(cache[hook_in])
    caught = {}
    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (hook_out, lambda _activation, hook: put),  # noqa: ARG005 - TransformerLens's signature
            (target, lambda activation, hook: caught.update({hook.name: activation})),
        ],
    )
    p, q = (
        model.unembed(model.ln_final(residual))[:, :-1].double().log_softmax(dim=-1)
        for residual in (cache[target], caught[target])
    )
    return ((p.exp() * (p - q)).sum(dim=-1) / math.log(2)).mean(dim=1).numpy()


def test_rows_are_what_whole_forward_passes_give() -> None:
    found = experiment()
    tokens = make_tokens(24, seed=2)
    saes = [make_sae(hook=f"blocks.{layer}.hook_resid_post") for layer in range(3)]
    names = list(found.certificates)
    assert names == [*(f"blocks.{layer}.hook_resid_post" for layer in range(3)), "blocks.1.hook_mlp_out"]  # fmt: skip
    layers = dict(zip(names, (0, 1, 2, 1), strict=True))
    for name, sae in zip(
        names, [*saes, make_sae("transcoder", hook="blocks.1.ln2.hook_normalized")], strict=True
    ):
        rows: list[Any] = [row for row in found.rows if row["name"] == name]
        assert {row["layer"] for row in rows} == {layers[name]}
        after = 2 - layers[name]
        assert {row["blocks_after"] for row in rows} == {after}
        # With two blocks left, horizon 2 is the whole model and horizon 4 does not exist.
        assert [row["horizon"] for row in rows] == [0, *(h for h in (1, 2) if h < after), "full"]
        for row in rows:
            blocks = after if row["horizon"] == "full" else int(str(row["horizon"]))
            values = divergence(sae, tokens, layers[name] + blocks)
            assert row["kl"] == pytest.approx(values.mean(), abs=2e-5)
            assert row["sd"] == pytest.approx(values.std(), abs=2e-5)
            assert row["kl_p50"] == pytest.approx(np.median(values), abs=2e-5)
            assert row["kl_p10"] < row["kl_p50"] < row["kl_p90"]
        last = rows[-1]
        assert last["growth"] == pytest.approx(math.log2(last["kl"] / rows[0]["kl"]))
        assert last["local"] == rows[0]["kl"]
        assert all(row["growth"] is None for row in rows[:-1])


def test_the_result_is_whole() -> None:
    found = experiment()
    assert found.kind == "error_amplification"
    assert len({tuple(row) for row in found.rows}) == 1
    assert len(found.findings) == 6
    assert "no block after it" in found.findings[2]
    assert "Layers differ more in" in found.findings[5]
    drawn: Any = found.figure
    lines = [trace for trace in drawn.data if trace.type == "scatter"]
    assert [trace.name for trace in lines] == list(found.certificates)
    assert list(lines[0].x) == [0, 1, 2]
    assert list(lines[0].y) == [row["kl"] for row in found.rows[:3]]
    local, growth = [trace for trace in drawn.data if trace.type == "bar"]
    ends = [row for row in found.rows if row["horizon"] == "full"]
    assert list(local.x) == [row["local"] for row in ends]
    assert list(growth.x) == [row["growth"] for row in ends]


def test_horizons_and_names_are_the_callers(tmp_path: Path) -> None:
    found = error_amplification(
        hooked_transformer(),
        {"early": make_sae(hook="blocks.0.hook_resid_pre")},
        calibration=make_tokens(6, seed=1),
        evaluation=make_tokens(6, seed=2),
        horizons=(1, 7),
        config=CONFIG,
        output=tmp_path / "study",
    )
    assert [row["horizon"] for row in found.rows] == [0, 1, "full"]
    assert found.certificates["early"].config.horizons == (0, 1, 7)
    assert found.rows[0]["blocks_after"] == 3
    assert (tmp_path / "study" / "error_amplification.csv").read_text().count("\n") == 4
    assert (tmp_path / "study" / "early" / "certificate.json").exists()
    assert amplification_rows(found.certificates) == found.rows
    assert PUBLISHED_HORIZONS == (0, 1, 2, 4, 8)
    with pytest.raises(CertifyError, match="horizons must be"):
        error_amplification(
            hooked_transformer(), [make_sae()], calibration=make_tokens(4, seed=1),
            evaluation=make_tokens(4, seed=2), horizons=(-1,), config=CONFIG,
        )  # fmt: skip
