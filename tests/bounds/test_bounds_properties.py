"""Monotone in every argument, the same for numbers and arrays, ordered among themselves."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC, certificate_inputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import saelens_certify.bounds
from saelens_certify import bounds

BOUNDS = ("u_sae", "u_sae_occam", "direct_base", "direct_pool", "preprint")


def evaluate(**kw: Any) -> dict[str, Any]:
    rest = {k: v for k, v in kw.items() if k != "risk_base"}
    return {**bounds.published(**kw), "preprint": bounds.preprint(**rest)}


@settings(DETERMINISTIC, max_examples=100)
@given(low=certificate_inputs(), other=certificate_inputs())
@pytest.mark.parametrize(
    ("argument", "direction"),
    [("n", -1), ("delta", -1), ("eta", 1), ("gap", 1), ("risk_base", 1), ("risk_pool", 1)],
)
def test_monotone(argument: str, direction: int, low: dict[str, Any], other: dict[str, Any]):
    # Ranges of risks and gap depend on V and alpha, so share them before swapping one argument.
    other = {**other, "vocab_size": low["vocab_size"], "alpha": low["alpha"]}
    width = float(bounds.loss_range(low["vocab_size"], low["alpha"]))
    cap = float(bounds.loss_cap(low["vocab_size"], low["alpha"]))
    assume(other["gap"] <= width)
    assume(all(cap - width <= other[r] <= cap for r in ("risk_base", "risk_pool")))
    small, large = sorted([low[argument], other[argument]])
    first = evaluate(**{**low, argument: small})
    second = evaluate(**{**low, argument: large})
    for name in BOUNDS:
        assert (second[name] - first[name]) * direction >= 0.0, name


@settings(DETERMINISTIC, max_examples=100)
@given(n=st.integers(1, 10**9), step=st.integers(1, 3))
def test_monotone_between_neighbouring_n(n: int, step: int):
    kw = dict(risk_base=7.2, risk_pool=7.4, gap=0.2, eta=0.01, vocab_size=50_257)
    kw |= dict(dict_size=24_576, pool_size=24_510)
    first, second = evaluate(n=n, **kw), evaluate(n=n + step, **kw)
    assert all(second[name] <= first[name] for name in BOUNDS)


@settings(DETERMINISTIC, max_examples=100)
@given(kw=certificate_inputs())
def test_order_of_the_bounds(kw: dict[str, Any]):
    result = evaluate(**kw)
    assert result["u_sae_occam"] >= result["u_sae"] >= kw["risk_pool"] + kw["gap"]
    if kw["pool_size"] in (0, kw["dict_size"]):
        assert result["u_sae_occam"] == result["u_sae"]
    assert result["loss_cap"] * (1 + 1e-15) >= result["loss_range"] > 0.0


@settings(DETERMINISTIC, max_examples=50)
@given(rows=st.lists(certificate_inputs(), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_arrays_equal_scalars_element_by_element(rows: list[dict[str, Any]], seed: int):
    scalars = [evaluate(**row) for row in rows]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    arrays = evaluate(**columns)
    order = np.random.default_rng(seed).permutation(len(rows))
    permuted = evaluate(**{name: column[order] for name, column in columns.items()})
    for name, array in arrays.items():
        assert array.dtype == np.float64
        assert array.shape == (len(rows),)
        assert array.tolist() == [row[name] for row in scalars]
        assert permuted[name].tolist() == array[order].tolist()


def test_scalars_give_floats_and_arrays_broadcast():
    kw = dict(risk_base=7.2, risk_pool=7.4, gap=0.2, vocab_size=50_257, dict_size=24_576)
    scalar = bounds.published(eta=0.01, n=1000, pool_size=24_510, **kw)
    assert all(type(value) is float for value in scalar.values())
    zero_d = bounds.published(eta=np.array(0.01), n=np.int64(1000), pool_size=24_510, **kw)
    assert zero_d == scalar

    n = np.array([[100], [1000], [10_000]])
    eta = np.array([0.01, 0.5], dtype=np.float32)
    grid = bounds.published(eta=eta, n=n, pool_size=24_510, **kw)
    terms = bounds.published_terms(eta=eta, n=n, pool_size=24_510, **kw)
    for name, array in {**grid, **terms}.items():
        assert isinstance(array, np.ndarray), name
        assert array.shape == (3, 2), name
        assert array.flags.writeable
    assert (
        float(np.asarray(grid["u_sae"])[1, 1])
        == bounds.published(eta=float(eta[1]), n=1000, pool_size=24_510, **kw)["u_sae"]
    )
    assert np.asarray(bounds.published(eta=np.empty(0), n=1, pool_size=1, **kw)["u_sae"]).shape == (
        0,
    )


@settings(DETERMINISTIC, max_examples=100)
@given(kw=certificate_inputs())
def test_bounds_are_the_sums_of_their_terms(kw: dict[str, Any]):
    t = {name: float(value) for name, value in bounds.published_terms(**kw).items()}
    result = {name: float(value) for name, value in bounds.published(**kw).items()}
    parts = {
        "u_sae": ("risk_pool", "gap", "mismatch", "t_eta", "t_proxy", "t_eps"),
        "u_sae_occam": ("risk_pool", "gap", "mismatch", "t_eta", "t_occ", "t_eps"),
        "direct_base": ("risk_base", "hoeffding_margin"),
        "direct_pool": ("risk_pool", "hoeffding_margin"),
    }
    for name, terms in parts.items():
        total = sum(t[term] for term in terms)
        assert result[name] == pytest.approx(total, rel=4e-15)
    assert t["t_proxy"] == t["t_eta"]
    assert all(
        result[name] == t[name] for name in ("loss_range", "loss_cap", "baseline", "log_binom")
    )


def test_preprint_complexity_exceeds_the_number_of_pools():
    from saelens_certify.bounds.complexity import log_binom_up, sauer_up

    m = np.full(400, 400.0)
    p = np.arange(1.0, 401.0)
    assert np.all(sauer_up(m, p) >= log_binom_up(m, p))
    assert sauer_up(np.array(400.0), np.array(0.0)) == 0.0
    assert np.all(np.diff(sauer_up(m, p)) > 0.0)
    assert sauer_up(np.array(400.0), np.array(400.0)) == pytest.approx(400.0, rel=1e-14)


def test_bounds_know_neither_torch_nor_models():
    allowed = {"numpy", "saelens_certify", *sys.stdlib_module_names}
    inside = ("saelens_certify.bounds", "saelens_certify.errors", "saelens_certify._native")
    for path in Path(saelens_certify.bounds.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert name.split(".")[0] in allowed, (path.name, name)
                assert not name.startswith("saelens_certify") or name.startswith(inside), name
