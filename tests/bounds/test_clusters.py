"""Means of clusters: exact, in an order that does not know their sizes, and whole in every prefix."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify import bounds
from saelens_certify.bounds.clusters import cluster_codes, cluster_means, cluster_order
from saelens_certify.errors import CertifyError

value = st.one_of(
    st.floats(0.0, 17.6), st.sampled_from([0.0, 0.1, 17.6, 1e-300, np.nextafter(1.0, 2.0)])
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@st.composite
def clustered(draw: st.DrawFn) -> tuple[list[float], list[str], list[str]]:
    """Values, clusters named by their smallest member, and hashes, in the order of `cluster_order`."""
    owner = draw(st.lists(st.integers(0, 6), min_size=1, max_size=25))
    hashes = [sha(f"{draw(st.integers(0, 9))}:{row}") for row in range(len(owner))]
    least: dict[int, str] = {}
    for who, name in zip(owner, hashes, strict=True):
        least[who] = min(name, least.get(who, name))
    clusters = [least[who] for who in owner]
    order = cluster_order(clusters, hashes)
    values = draw(st.lists(value, min_size=len(owner), max_size=len(owner)))
    return values, [clusters[i] for i in order], [hashes[i] for i in order]


def members(values: list[float], clusters: list[Any]) -> dict[Any, list[Fraction]]:
    found: dict[Any, list[Fraction]] = defaultdict(list)
    for number, name in zip(values, clusters, strict=True):
        found[name].append(Fraction(number))
    return found


@given(clustered())
def test_means_are_exact_means_rounded_up(case):
    values, clusters, _ = case
    exact = [sum(group) / len(group) for group in members(values, clusters).values()]
    found = cluster_means(values, clusters)
    assert found.shape == (len(exact),)
    for got, mean, group in zip(
        found.tolist(), exact, members(values, clusters).values(), strict=True
    ):
        assert mean <= Fraction(got) <= max(group)
        assert got - float(mean) <= 3 * np.spacing(float(mean))
    negated = cluster_means(-np.array(values), clusters)
    assert all(Fraction(-low) <= mean for low, mean in zip(negated.tolist(), exact, strict=True))


@given(clustered(), st.data())
def test_a_prefix_of_the_sequences_gives_a_prefix_of_whole_clusters(case, data):
    values, clusters, _ = case
    n = data.draw(st.integers(1, len(values)))
    whole = cluster_means(values, clusters)
    found = cluster_means(values, clusters, complete=n)
    assert found.tolist() == whole[: found.size].tolist()
    # Those, and only those, all of whose members are among the n.
    assert found.size == len(set(clusters) - set(clusters[n:]))
    # What has not been measured need not be there.
    assert cluster_means(values[:n], clusters, complete=n).tolist() == found.tolist()
    assert cluster_means(values, clusters, complete=len(values)).tolist() == whole.tolist()


@given(clustered(), st.randoms(use_true_random=False))
def test_the_order_is_one_and_neighbours_belong_together(case, random):
    _, clusters, hashes = case
    rows = list(range(len(hashes)))
    random.shuffle(rows)
    order = cluster_order([clusters[i] for i in rows], [hashes[i] for i in rows])
    assert [hashes[rows[i]] for i in order] == hashes
    assert (np.diff(cluster_codes(clusters)) >= 0).all()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True))
def test_without_clusters_nothing_changes(numbers):
    hashes = [sha(str(number)) for number in numbers]
    order = cluster_order(hashes, hashes)
    assert [hashes[i] for i in order] == sorted(hashes)
    values = np.array(numbers, dtype=float)
    assert cluster_means(values, hashes).tolist() == values.tolist()


def test_the_place_of_a_cluster_does_not_depend_on_its_size():
    """Half of 400 clusters have nine members: in the first quarter, half of the clusters are large.

    By the smallest hash nearly all of the first ones would be large, by the largest hash nearly none.
    """
    groups = [[sha(f"{k}:{j}") for j in range(9 if k % 2 else 1)] for k in range(400)]
    clusters = [min(group) for group in groups for _ in group]
    hashes = [name for group in groups for name in group]
    order = cluster_order(clusters, hashes)
    sizes = np.bincount(cluster_codes([clusters[i] for i in order]))
    assert sizes.size == 400
    assert 30 <= np.count_nonzero(sizes[:100] == 9) <= 70
    by_last = sorted(groups, key=max)
    assert sum(len(group) == 9 for group in by_last[:100]) < 5


@given(clustered())
def test_measured_terms_are_means_of_cluster_means(case):
    values, clusters, _ = case
    base = np.array(values)
    sae = np.minimum(base + 0.3, 17.6)
    violation = (base > 1.0).astype(float)
    pool = np.where(violation > 0, 0.5 * sae, sae)
    found = bounds.Measured.from_sequences(
        loss_base=base, loss_sae=sae, loss_pool=pool, violation=violation, clusters=clusters
    )
    gap = [abs(Fraction(a) - Fraction(b)) for a, b in zip(base.tolist(), sae.tolist(), strict=True)]
    expected = {
        "risk_base": base.tolist(),
        "risk_sae": sae.tolist(),
        "risk_pool": pool.tolist(),
        "gap": gap,
        "eta": violation.tolist(),
    }
    for name, numbers in expected.items():
        groups = members(numbers, clusters).values()
        exact = sum((sum(group) / len(group) for group in groups), Fraction(0)) / len(groups)
        got = getattr(found, name)
        assert exact <= Fraction(got), name
        assert got - float(exact) <= 4 * np.spacing(float(exact)), name
    assert found.n_sequences == len(set(clusters))
    assert 0.0 <= found.eta <= 1.0
    # The order of the sequences does not matter, nor what the clusters are called.
    back = slice(None, None, -1)
    again = bounds.Measured.from_sequences(
        loss_base=base[back],
        loss_sae=sae[back],
        loss_pool=pool[back],
        violation=violation[back],
        clusters=[f"c{name}" for name in clusters[back]],
    )
    assert again == found


def test_measured_alone_is_measured_without_clusters():
    rng = np.random.default_rng(0)
    base, sae = rng.uniform(2.0, 9.0, (2, 50))
    terms: dict[str, Any] = {
        "loss_base": base,
        "loss_sae": sae,
        "loss_pool": sae,
        "violation": np.arange(50) % 2,
    }
    plain = bounds.Measured.from_sequences(**terms)
    assert bounds.Measured.from_sequences(**terms, clusters=range(50)) == plain
    assert plain.n_sequences == 50
    halves = bounds.Measured.from_sequences(**terms, clusters=np.arange(50) // 2)
    assert (halves.n_sequences, halves.eta) == (25, 0.5)
    assert halves.risk_base == pytest.approx(plain.risk_base, rel=1e-14)


def test_certificates_of_clusters_are_wider():
    """Ten copies of each sequence say no more than one of each."""
    rng = np.random.default_rng(1)
    once = dict(zip(("loss_base", "loss_sae"), rng.uniform(3.0, 6.0, (2, 40)), strict=True))
    once |= {"loss_pool": once["loss_sae"], "violation": np.zeros(40)}
    copies = {name: np.repeat(values, 10) for name, values in once.items()}
    single = bounds.Measured.from_sequences(**once)
    clusters = np.repeat(np.arange(40), 10)
    clustered_terms = bounds.Measured.from_sequences(**copies, clusters=clusters)
    assert clustered_terms.n_sequences == single.n_sequences
    assert clustered_terms.risk_base == pytest.approx(single.risk_base, rel=1e-15)
    means = cluster_means(copies["loss_base"], clusters)
    assert bounds.betting_upper(means, 0, 17.6, 0.05) == pytest.approx(
        bounds.betting_upper(once["loss_base"], 0, 17.6, 0.05), rel=1e-12
    )
    assert bounds.betting_upper(copies["loss_base"], 0, 17.6, 0.05) < bounds.betting_upper(
        means, 0, 17.6, 0.05
    )


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([1.0, 2.0], ["a"], {}, "values has 2, clusters has 1"),
        ([], [], {}, "clusters is empty"),
        ([1.0, np.nan], ["a", "b"], {}, r"values\[1\]"),
        ([1.0, 2.0], "ab", {}, "is one value"),
        ([1.0, 2.0], 7, {}, "is one value"),
        ([1.0, 2.0], [["a"], ["b"]], {}, "cannot name a cluster"),
        ([1.0, 2.0], ["a", None], {}, r"clusters\[1\]=None names no cluster"),
        ([1.0, 2.0], ["a", float("nan")], {}, r"clusters\[1\]=nan names no cluster"),
        (
            [1.0, 2.0, 3.0],
            ["a", "b", "a"],
            {},
            "cluster of sequence 2 has another .* cluster_order",
        ),
        ([1.0, 2.0], ["a", "b"], {"complete": 0}, "complete=0"),
        ([1.0, 2.0], ["a", "b"], {"complete": 3}, "complete=3"),
        ([1.0], ["a", "b"], {"complete": 2}, "complete=2 .*1 values, 2 clusters"),
        ([1.0, 2.0], ["a", "b"], {"complete": 1.5}, "complete=1.5"),
        ([1.0, 2.0], ["a", "b"], {"complete": True}, "complete=True"),
    ],
)
def test_bad_input(values: Any, clusters: Any, options: Any, message: str):
    with pytest.raises(CertifyError, match=message):
        cluster_means(values, clusters, **options)


def test_bad_lengths_elsewhere():
    with pytest.raises(CertifyError, match="clusters has 2, sequences has 1"):
        cluster_order(["a", "b"], ["a"])
    terms: dict[str, Any] = dict.fromkeys(("loss_base", "loss_sae", "loss_pool"), [1.0, 2.0])
    with pytest.raises(CertifyError, match="clusters has 1, loss_base has 2"):
        bounds.Measured.from_sequences(**terms, violation=[0, 0], clusters=["a"])


def test_a_prefix_that_cuts_the_first_cluster_is_empty():
    assert cluster_means([1.0, 2.0], ["a", "a"], complete=1).size == 0
