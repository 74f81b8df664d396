"""Bounds as functions of N are the bounds of the first N sequences, and first crossings are what a loop finds."""

from __future__ import annotations

import csv
import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify import bounds
from saelens_certify.bounds import Growth, Losses
from saelens_certify.bounds.exact import RunningSum
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.sharp import SHARP
from saelens_certify.bounds.times import log_times, looks
from saelens_certify.errors import CertifyError

VOCAB, ALPHA, DELTA = 1000, 0.5, 0.05
CAP = float(bounds.loss_cap(VOCAB, ALPHA))
LOW = CAP - float(bounds.loss_range(VOCAB, ALPHA))
SAE = {"dict_size": 300, "pool_size": 280}
SETTINGS: dict[str, Any] = {"vocab_size": VOCAB, "alpha": ALPHA, "delta": DELTA, **SAE}
PUBLISHED = Path(__file__).parents[1] / "data" / "published"


@st.composite
def evidence(draw: st.DrawFn) -> dict[str, Any]:
    """Losses of a few sequences, in clusters of one to four neighbours or none."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    n = sum(sizes)
    loss = st.one_of(st.floats(LOW + 1e-9, CAP - 1e-9), st.sampled_from([4.1, 1.0 + 2.0**-40]))
    base, sae = (draw(st.lists(loss, min_size=n, max_size=n)) for _ in range(2))
    violation = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    names = tuple(f"c{unit}" for unit, size in enumerate(sizes) for _ in range(size))
    return {
        "loss_base": base,
        "loss_sae": sae,
        "loss_pool": [draw(loss) if v else s for v, s in zip(violation, sae, strict=True)],
        "violation": [float(v) for v in violation],
        "clusters": names if draw(st.booleans()) else None,
    }


def check(columns: dict[str, Any], rows: slice = slice(None)) -> Losses:
    here: dict[str, Any] = {k: None if v is None else v[rows] for k, v in columns.items()}
    return Losses.check(**here, vocab_size=VOCAB, alpha=ALPHA)


def prefixes(columns: dict[str, Any]) -> list[Losses]:
    """The losses of the first 1, 2, ... units, cut from the columns by hand."""
    names = columns["clusters"]
    n = len(columns["loss_base"])
    ends = [i for i in range(1, n + 1) if names is None or i == n or names[i] != names[i - 1]]
    return [check(columns, slice(end)) for end in ends]


def drawn(n: int, seed: int = 0, eta: float = 0.05, risk: float = 3.0) -> Losses:
    rng = np.random.default_rng(seed)
    base = rng.uniform(risk - 1.0, risk + 1.0, n)
    sae = np.minimum(base + rng.uniform(-0.1, 0.3, n), CAP)
    violation = (rng.random(n) < eta).astype(float)
    pool = np.where(violation > 0, np.minimum(sae + rng.uniform(0.0, 0.5, n), CAP), sae)
    return Losses.check(
        loss_base=base, loss_sae=sae, loss_pool=pool, violation=violation,
        vocab_size=VOCAB, alpha=ALPHA, loss_unigram=rng.uniform(5.0, 9.0, n),
    )  # fmt: skip


@given(evidence())
def test_published_bounds_are_those_of_the_prefix_to_the_last_bit(columns: dict[str, Any]) -> None:
    firsts = prefixes(columns)
    steps = np.arange(1, len(firsts) + 1)
    growth = Growth.of(check(columns), steps)
    found = growth.bounds(**SETTINGS)
    assert set(found) == set(PROFILES)
    for index, first in enumerate(firsts):
        measured = first.measured
        assert growth.n[index] == measured.n_sequences == index + 1
        for term in ("risk_base", "risk_sae", "risk_pool", "gap", "eta"):
            assert getattr(growth, term)[index] == getattr(measured, term), term
        for name, bound in bounds.certificates(measured, **SETTINGS).items():
            assert found[name][index] == bound.value, name


@given(evidence())
def test_measured_terms_are_plain_means_of_the_prefix(columns: dict[str, Any]) -> None:
    """Written with fractions, not with the code of `Measured`."""
    growth = Growth.of(check(columns), np.arange(1, len(prefixes(columns)) + 1))
    names = columns["clusters"] or tuple(map(str, range(len(columns["loss_base"]))))
    order = list(dict.fromkeys(names))
    gap = [
        abs(Fraction(a) - Fraction(b))
        for a, b in zip(columns["loss_base"], columns["loss_sae"], strict=True)
    ]
    values = {"risk_base": columns["loss_base"], "gap": gap, "eta": columns["violation"]}
    for term, column in values.items():
        units = [
            [Fraction(x) for x, name in zip(column, names, strict=True) if name == unit]
            for unit in order
        ]
        means = [sum(unit, Fraction(0)) / len(unit) for unit in units]
        for n, value in enumerate(getattr(growth, term).tolist(), 1):
            exact = sum(means[:n], Fraction(0)) / n
            assert exact <= Fraction(value) <= exact + Fraction(1, 10**14)


@given(evidence())
def test_sharp_bounds_are_those_of_the_prefix(columns: dict[str, Any]) -> None:
    firsts = prefixes(columns)
    steps = np.arange(1, len(firsts) + 1)
    for name in SHARP:
        if name == "sharp_unigram":
            continue
        found = bounds.sharp_growth(name, check(columns), DELTA, steps, complexity=3.0)
        each = [bounds.sharp_value(name, x, DELTA, complexity=3.0).value for x in firsts]
        np.testing.assert_array_equal(found, each)


@given(evidence(), st.randoms(use_true_random=False))
def test_neither_the_grid_nor_the_order_within_a_prefix_matters(columns, random) -> None:
    losses = check(columns)
    n = len(prefixes(columns))
    whole = Growth.of(losses, np.arange(1, n + 1))
    some = np.array(sorted(random.sample(range(1, n + 1), k=max(1, n // 2))))
    coarse = Growth.of(losses, some)
    for field in dataclasses.fields(Growth):
        np.testing.assert_array_equal(
            getattr(coarse, field.name), getattr(whole, field.name)[some - 1]
        )
    if columns["clusters"] is None:
        shuffled = list(range(n))
        random.shuffle(shuffled)
        mixed = {k: v and [v[i] for i in shuffled] for k, v in columns.items()}
        assert Growth.of(check(mixed), [n]).gap == whole.gap[-1]
        alone = check({**columns, "clusters": tuple(map(str, range(n)))})
        np.testing.assert_array_equal(
            Growth.of(alone, whole.n).risk_pool, whole.risk_pool
        )  # clusters of one are sequences


@given(
    st.lists(
        st.one_of(
            st.floats(-20.0, 20.0),
            st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 0.1, -0.1, 2.0**80, -(2.0**80)]),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_running_sums_are_exact(values: list[float]) -> None:
    sums = RunningSum.of(np.array(values))
    pairs = RunningSum.of(np.array(values), -0.1 * np.array(values))
    for n in range(len(values) + 1):
        exact = sum(map(Fraction, values[:n]), Fraction(0))
        up = sums.up(n)
        assert exact <= Fraction(up)
        assert Fraction(math.nextafter(up, -math.inf)) < exact
        both = exact + sum((Fraction(-0.1 * x) for x in values[:n]), Fraction(0))
        up = pairs.up(n)
        assert Fraction(math.nextafter(up, -math.inf)) < both <= Fraction(up)


@given(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=20), st.floats(0.0, 9.0))
def test_the_first_entry_below(values: list[float], limit: float) -> None:
    times = np.arange(1, len(values) + 1) * 3
    found = bounds.first_below(times, values, limit, valid=True)
    expected = None
    for n, value in zip(times.tolist(), values, strict=True):
        if expected is None and value < limit:
            expected = bounds.Crossing(n, value, True)
    assert found == expected


@pytest.mark.parametrize("name", ["sharp_betting", "sharp_measured", "sharp_occam"])
def test_crossings_of_both_kinds_and_what_they_claim(name: str) -> None:
    losses = drawn(400)
    grid = [5, 10, 20, 40, 60, 80, 160, 320, 400]
    fixed = bounds.first_fixed(name, losses, DELTA, grid, complexity=5.0)
    values = bounds.sharp_growth(name, losses, DELTA, grid, complexity=5.0)
    assert fixed == bounds.first_below(grid, values, losses.baseline)
    assert fixed is not None
    assert not fixed.valid
    any_time = bounds.first_any_time(name, losses, DELTA, complexity=5.0)
    when = looks(400)
    sequence = bounds.sharp_sequence(name, losses, DELTA, when, complexity=5.0)
    assert any_time is not None
    assert any_time.valid
    assert any_time.n == when[np.argmax(sequence < losses.baseline)]
    # A run that stops as soon as it may is decided at the same place.
    if name != "sharp_occam":
        stop = bounds.first_stop(losses, "nonvacuous", DELTA, name=name)
        assert stop is not None
        assert (stop.n, stop.value) == (any_time.n, any_time.value)


def test_no_crossing_and_another_limit() -> None:
    losses = drawn(60, risk=9.6, eta=0.5)
    assert bounds.first_fixed("sharp_betting", losses, DELTA) is None
    assert bounds.first_any_time("sharp_betting", losses, DELTA) is None
    found = bounds.first_fixed("sharp_betting", losses, DELTA, limit=CAP)
    assert found is not None
    assert found.value < CAP


def test_two_sided_bounds_spend_half_of_delta_on_each_side() -> None:
    losses = drawn(50)
    found = bounds.sharp_growth("excess_sae_two_sided", losses, DELTA, [50])
    assert found == bounds.sharp_growth("excess_sae", losses, DELTA / 2, [50])
    assert found == bounds.sharp_value("excess_sae_two_sided", losses, DELTA).value


@given(evidence())
def test_floors_are_means_and_no_bound_is_below_them(columns: dict[str, Any]) -> None:
    losses = check(columns)
    n = len(prefixes(columns))
    for name, x in (
        ("sharp_betting", losses.joint("charged")),
        ("sharp_measured", losses.joint("measured")),
    ):
        floor = bounds.sharp_floor(name, losses)
        z = x.samples
        assert abs(floor - math.fsum(z) / n) < 1e-12
        assert bounds.sharp_growth(name, losses, DELTA, [n])[0] >= floor - 1e-12
    assert bounds.sharp_floor("sharp_occam", losses) == bounds.sharp_floor("sharp_betting", losses)
    growth = Growth.of(losses, [n])
    floor = bounds.asymptotic_floor(
        bound="u_sae", vocab_size=VOCAB, risk_pool=growth.risk_pool[0], gap=growth.gap[0],
        eta=growth.eta[0], alpha=ALPHA, delta=DELTA,
    )  # fmt: skip
    assert growth.bounds(["u_sae"], **SETTINGS)["u_sae"][0] >= floor


def test_default_times() -> None:
    losses = drawn(100)
    np.testing.assert_array_equal(Growth.of(losses).n, log_times(100))
    assert len(bounds.sharp_growth("sharp_betting", losses, DELTA)) == len(log_times(100))


def read(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(newline="") as file:
        return list(csv.DictReader(file))


TABLES = {
    "GPT-2 Small": ("fig1_topk64_gpt2_small.csv", 50_257),
    "Gemma-2B": ("fig1_topk64_gemma_2b.csv", 256_000),
    "Llama-3": ("fig1_topk64_llama_3_8b.csv", 128_256),
}


def of_row(row: dict[str, str], vocab_size: int) -> dict[str, Any]:
    return {
        "risk_base": float(row["R_hat_M"]), "risk_pool": float(row["R_hat_hG"]),
        "gap": float(row["eps_loss_hat"]), "eta": float(row["eta_hat"]),
        "n": float(row["N"]), "vocab_size": vocab_size,
        "dict_size": float(row["m"]), "pool_size": float(row["P"]), "delta": float(row["delta"]),
    }  # fmt: skip


@pytest.mark.parametrize("model", TABLES)
def test_published_first_crossings(model: str) -> None:
    """Figure 1: the first checkpoint at which U_SAE+Occam is below log2 V."""
    file, vocab_size = TABLES[model]
    rows = read(file)
    values = [float(bounds.published(**of_row(row, vocab_size))["u_sae_occam"]) for row in rows]
    times = [float(row["N"]) for row in rows]
    published = {
        float(row["Crossing N"])
        for row in read("fig1_topk64_totals.csv")
        if row["Model"].startswith(model)
    }
    found = bounds.first_below(times, values, float(bounds.uniform_baseline(vocab_size)))
    assert found is not None
    assert published == {found.n}
    assert not found.valid


def test_published_layers_of_llama() -> None:
    """Figure 2: which layers are ever certified, and from which checkpoint on."""
    baseline = float(bounds.uniform_baseline(128_256))
    first, floors = {}, {}
    for layer in (4, 12, 20, 28, 30):
        rows = read(f"fig2_llama_layer_{layer}.csv")
        terms = [of_row(row, 128_256) for row in rows]
        values = [float(bounds.published(**each)["u_sae_occam"]) for each in terms]
        found = bounds.first_below([each["n"] for each in terms], values, baseline)
        first[layer] = None if found is None else found.n
        last = {key: terms[-1][key] for key in ("risk_pool", "gap", "eta", "vocab_size")}
        floors[layer] = float(bounds.asymptotic_floor(bound="u_sae", **last))
    assert first == {4: None, 12: None, 20: None, 28: None, 30: 10_000}
    assert [layer for layer, floor in floors.items() if floor >= baseline] == [4, 12]


def test_impossible_input_is_refused() -> None:
    losses = drawn(6)
    apart = dataclasses.replace(losses, clusters=("a", "b", "a", "c", "d", "e"), unigram=None)
    with pytest.raises(CertifyError, match="cluster of sequence 2"):
        Growth.of(apart)
    with pytest.raises(CertifyError, match="times"):
        Growth.of(losses, [1, 7])
    with pytest.raises(CertifyError, match="times"):
        Growth.of(losses, [3, 2])
    with pytest.raises(CertifyError, match="sharp_best"):
        bounds.sharp_growth("sharp_best", losses, DELTA)
    with pytest.raises(CertifyError, match="sharp_best"):
        bounds.sharp_floor("sharp_best", losses)
    with pytest.raises(CertifyError, match="u_best"):
        Growth.of(losses).bounds(["u_best"], **SETTINGS)
    with pytest.raises(CertifyError, match="delta"):
        Growth.of(losses).bounds(**{**SETTINGS, "delta": 0.0})
    with pytest.raises(CertifyError, match="shape"):
        bounds.first_below([1, 2], [3.0], 4.0)
