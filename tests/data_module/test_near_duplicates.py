"""Sequences that repeat each other are found, and only these, whatever the order."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import demo
from saelens_certify.data import Sequences, near_duplicates
from saelens_certify.data.minhash import NgramSets, band_keys, buckets
from saelens_certify.data.near_duplicates import Clusters, find_clusters
from saelens_certify.data.repeats import near_duplicates_across
from saelens_certify.errors import CertifyError

LENGTH = 32


def sequences_of(rows: Any, ids: list[str] | None = None, bos: bool = False) -> Sequences:
    found = Sequences.from_tokens(torch.as_tensor(np.asarray(rows, dtype=np.int64)), ids)
    return dataclasses.replace(found, source=dataclasses.replace(found.source, prepends_bos=bos))


def grams(row: list[int], n: int = 3) -> set[tuple[int, ...]]:
    n = min(n, len(row))
    return {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}


def jaccard(a: list[int], b: list[int], n: int = 3) -> Fraction:
    x, y = grams(a, n), grams(b, n)
    return Fraction(len(x & y), len(x | y))


def brute_force(data: Sequences, threshold: float = 0.5, ngram: int = 3) -> list[str]:
    """Names of clusters by comparing every pair with Python's sets, and merging until nothing changes."""
    rows = data.tokens[:, int(data.source.prepends_bos) :].tolist()
    names = list(data.hashes)
    pairs = [
        (i, j)
        for i in range(len(rows))
        for j in range(i)
        if data.document_ids[i] == data.document_ids[j]
        or float(jaccard(rows[i], rows[j], ngram)) >= threshold
    ]
    changed = True
    while changed:
        changed = False
        for i, j in pairs:
            if names[i] != names[j]:
                names[i] = names[j] = min(names[i], names[j])
                changed = True
    return names


@st.composite
def texts(draw: st.DrawFn, length: int = LENGTH, most: int = 14) -> list[list[int]]:
    """Texts of a few words, many of them made from earlier ones by small changes."""
    words = st.integers(0, draw(st.sampled_from([3, 30, 5000])))
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, most))):
        row = draw(st.lists(words, min_size=length, max_size=length))
        if rows and draw(st.booleans()):
            row = list(draw(st.sampled_from(rows)))
            for place in draw(st.lists(st.integers(0, length - 1), max_size=6)):
                row[place] = draw(words)
            shift = draw(st.integers(0, 5))
            row = draw(st.lists(words, min_size=shift, max_size=shift)) + row[: length - shift]
        rows.append(row)
    return rows


@settings(max_examples=60)
@given(texts(), st.booleans(), st.sampled_from([0.5, 0.7, 0.9]), st.integers(1, 5))
def test_the_same_clusters_as_by_comparing_every_pair(rows, bos, threshold, ngram):
    data = sequences_of(rows, bos=bos)
    found = find_clusters(data, threshold=threshold, ngram=ngram)
    assert list(found.names) == brute_force(data, threshold, ngram)
    check_links(data, found, threshold, ngram)


@settings(max_examples=60)
@given(texts(), st.integers(1, 60), st.sampled_from([0.5, 0.8]))
def test_the_same_clusters_where_many_sequences_look_alike(rows, block, threshold):
    """As if every bucket were a large one, a few rows of which are compared at a time."""
    data = sequences_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_SMALL", 1)
        patch.setattr(near_duplicates, "_BLOCK", block)
        patch.setattr(near_duplicates, "_DENSE", 1000 * (block % 2))
        found = find_clusters(data, threshold=threshold)
    assert list(found.names) == brute_force(data, threshold)
    check_links(data, found, threshold, 3)


@settings(max_examples=60)
@given(texts(length=8), st.booleans())
def test_the_same_clusters_for_short_sequences(rows, bos):
    data = sequences_of(rows, bos=bos)
    assert list(find_clusters(data).names) == brute_force(data)


def check_links(data: Sequences, found: Clusters, threshold: float, ngram: int) -> None:
    """Every link is a pair as described, and the links alone make the clusters."""
    row_of = dict(zip(data.hashes, data.tokens.tolist(), strict=True))
    begin = int(data.source.prepends_bos)
    name = {item: item for item in data.hashes}
    for link in found.links:
        a, b = link.sequences
        similarity = float(jaccard(row_of[a][begin:], row_of[b][begin:], ngram))
        assert link.similarity == similarity
        assert a <= b
        if link.reason == "near duplicate":
            assert similarity >= threshold
        old = {name[a], name[b]}
        name = {item: min(old) if label in old else label for item, label in name.items()}
    assert [name[item] for item in data.hashes] == list(found.names)
    assert found.n_clusters == len(set(found.names))
    if len(set(data.hashes)) == len(data):
        assert found.n_clusters == len(data) - len(found.links)


@settings(max_examples=40)
@given(texts(), st.randoms(use_true_random=False), st.integers(1, 6))
def test_the_order_does_not_matter(rows, random, n_documents):
    ids = [f"doc{i % n_documents if i % 2 else -i}" for i in range(len(rows))]
    data = sequences_of(rows, ids)
    order = list(range(len(rows)))
    random.shuffle(order)
    found, again = find_clusters(data), find_clusters(data.select(order))
    assert [found.names[i] for i in order] == list(again.names)
    assert (found.links, found.n_clusters) == (again.links, again.n_clusters)
    assert list(found.names) == brute_force(data)


def many_texts(n: int, seed: int = 0, vocabulary: int = 5000) -> np.ndarray:
    """Unrelated texts whose words are as unequally frequent as those of a language."""
    chances = 1.0 / np.arange(1, vocabulary + 1)
    rng = np.random.default_rng(seed)
    return rng.choice(vocabulary, (n, LENGTH), p=chances / chances.sum())


def test_unrelated_texts_stay_apart():
    found = find_clusters(sequences_of(many_texts(3000), bos=True))
    assert found.n_clusters == 3000
    assert found.links == ()
    assert str(found) == "No two of 3000 sequences are of one document or near duplicates."
    found.refuse()


def test_planted_near_duplicates_are_found_among_many():
    rng = np.random.default_rng(1)
    rows = many_texts(2000)
    copies = rows[:200].copy()
    copies[np.arange(200), rng.integers(1, LENGTH, 200)] += 5000  # one other word
    copies[100:, 5] += 7000  # and a second one
    data = sequences_of(np.concatenate([rows, copies]), bos=True)
    found = find_clusters(data)
    assert found.n_clusters == 2000
    assert found.names[:200] == found.names[2000:]
    assert {link.reason for link in found.links} == {"near duplicate"}
    assert found.n_repeated == 400
    text = str(found)
    assert text.startswith("400 of 2200 sequences repeat each other and count as 200")
    assert "200 near duplicates (>= 0.5 of 3-grams shared), e.g. tokens:" in text


def test_large_families_are_one_cluster_each():
    """Families of more than a bucket's few: a chain through their members is enough."""
    rng = np.random.default_rng(2)
    base = many_texts(3, seed=3)
    family = np.arange(300) % 3
    rows = base[family]
    rows[np.arange(300), rng.integers(0, LENGTH, 300)] = rng.integers(10**6, 2 * 10**6, 300)
    data = sequences_of(np.concatenate([rows, many_texts(100, seed=4)]))
    found = find_clusters(data)
    assert found.n_clusters == 103
    assert all(len({found.names[i] for i in np.flatnonzero(family == k)}) == 1 for k in range(3))
    check_links(data, found, 0.5, 3)


def test_texts_with_a_common_beginning_stay_apart():
    """Ten of 31 words in common are a form, not a copy."""
    rows = many_texts(2000, seed=5, vocabulary=50_000)
    rows[:, 1:11] = np.arange(60_000, 60_010)
    assert find_clusters(sequences_of(rows, bos=True)).n_clusters == 2000


def test_sequences_of_one_document():
    rows = many_texts(5)
    data = sequences_of(rows, ["a", "b", "a", "c", "a"])
    found = find_clusters(data)
    assert found.n_clusters == 3
    assert found.names[0] == found.names[2] == found.names[4]
    assert found.names[0] == min(data.hashes[0], data.hashes[2], data.hashes[4])
    assert [link.reason for link in found.links] == ["document"] * 2
    assert all(link.documents == ("a", "a") for link in found.links)
    with pytest.raises(CertifyError) as error:
        found.refuse()
    message = str(error.value)
    assert message.startswith("evaluation: 3 of 5 sequences are not independent draws: 2 further")
    assert "e.g. two of a, two of a" in message
    assert 'dependence="cluster"' in message
    assert "(3 in all)" in message
    values = found.to_dict()
    assert (values["n_clusters"], values["n_document_links"]) == (3, 2)
    assert values["links"][0]["reason"] == "document"


def test_bos_is_left_out():
    """Six words and BOS: with BOS, five of eight 3-grams would be shared instead of four of eight."""
    a, b = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 8, 9]
    assert (jaccard(a, b), jaccard(a[1:], b[1:])) == (Fraction(1, 2), Fraction(3, 7))
    assert find_clusters(sequences_of([a, b])).n_clusters == 1
    assert find_clusters(sequences_of([a, b], bos=True)).n_clusters == 2


def test_kept_copies_and_tiny_inputs():
    copies = sequences_of([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    found = find_clusters(copies)
    assert (found.n_clusters, found.links[0].similarity) == (2, 1.0)
    assert find_clusters(copies.take(0)).names == ()
    assert find_clusters(copies.take(1)).names == (copies.hashes[0],)
    pair = sequences_of([[0, 1], [0, 2]], bos=True)
    assert find_clusters(pair).n_clusters == 2
    with pytest.raises(CertifyError, match="0 tokens besides BOS"):
        find_clusters(sequences_of([[0], [0]], bos=True))


def test_the_bundled_documents():
    """Parallel verses of one book, and nothing else."""
    data = demo.load_sequences("evaluation")
    found = find_clusters(data)
    assert (found.n_clusters, found.n_repeated) == (len(data) - 7, 12)
    across = near_duplicates_across(demo.load_sequences("calibration"), data)
    assert (len(across.links), across.n_evaluation) == (9, len(data))


@settings(max_examples=60)
@given(texts(), texts(), st.booleans(), st.randoms(use_true_random=False))
def test_across_is_what_comparing_every_pair_finds(ours, theirs, bos, random):
    theirs = theirs + [random.choice(ours)]
    theirs[-1] = theirs[-1][:-1] + [9999]
    calibration, evaluation = sequences_of(ours, bos=bos), sequences_of(theirs, bos=bos)
    found = near_duplicates_across(calibration, evaluation)
    begin = int(bos)
    best = {
        digest: max(jaccard(row[begin:], other[begin:]) for other in ours)
        for digest, row in zip(evaluation.hashes, theirs, strict=True)
    }
    expected = {digest for digest, value in best.items() if float(value) >= 0.5}
    assert {link.sequences[1] for link in found.links} == expected
    for link in found.links:
        assert link.similarity == float(best[link.sequences[1]])
        assert link.sequences[0] in calibration.hashes
    order = list(range(len(theirs)))
    random.shuffle(order)
    assert near_duplicates_across(calibration, evaluation.select(order)).links == found.links


def test_across_many_and_unequal_lengths():
    rows = many_texts(300)
    family = np.repeat(many_texts(1, seed=9), 60, axis=0)
    family[np.arange(60), np.arange(60) % LENGTH] = np.arange(10**6, 10**6 + 60)
    calibration = sequences_of(np.concatenate([rows[:150], family[:30]]))
    evaluation = sequences_of(np.concatenate([rows[150:], family[30:]])[:, :24])
    found = near_duplicates_across(calibration, evaluation)
    assert len(found.links) == 30
    assert str(found).startswith("30 of 180 evaluation sequences are near duplicates of calib")
    assert found.to_dict()["n_repeated"] == 30
    nothing = near_duplicates_across(calibration.take(0), evaluation)
    assert str(nothing) == (
        "0 of 180 evaluation sequences are near duplicates of calibration sequences."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"ngram": 0}, "ngram=0"),
        ({"ngram": True}, "ngram=True"),
        ({"ngram": 2.0}, "ngram=2.0"),
    ],
)
def test_bad_settings(options: Any, message: str):
    data = sequences_of(many_texts(3))
    with pytest.raises(CertifyError, match=message):
        find_clusters(data, **options)
    with pytest.raises(CertifyError, match=message):
        near_duplicates_across(data, data, **options)


def test_minima_agree_as_often_as_the_sets_are_similar():
    """Bands of four minima agree with probability similarity^4."""
    tokens = np.stack([np.arange(29), np.arange(29)])
    tokens[1, 20:] += 1000  # 20 of 38
    agreed = np.mean(
        [
            np.mean(keys[0] == keys[1])
            for seed in range(40)
            for keys in [band_keys(tokens, 1, seed).T]  # [n_sequences, bands]
        ]
    )
    assert abs(agreed - (20 / 38) ** 4) < 0.02
    assert band_keys(tokens, 1, 3).tolist() == band_keys(tokens, 1, 3).tolist()
    assert band_keys(tokens, 1, 3).tolist() != band_keys(tokens, 1, 4).tolist()


@settings(max_examples=30)
@given(texts(), st.integers(1, 4))
def test_exact_similarities(rows, ngram):
    sets = NgramSets(np.array(rows), ngram, 0.5)
    everyone = np.arange(len(rows))
    table = sets.similarity(everyone, everyone)
    part = sets.within(everyone)
    candidates = set(zip(*[x.tolist() for x in sets.candidates(everyone, everyone)], strict=True))
    for i in everyone:
        for j in everyone:
            exact = float(jaccard(rows[i], rows[j], ngram))
            assert table[i, j] == exact
            if exact >= 0.5:
                assert (i, j) in candidates
    if len(rows) > 1:
        assert (part.similarity(everyone, everyone)[0, 1:] == table[0, 1:]).all()
        assert (part.pair_similarity(everyone[:-1], everyone[1:]) == np.diag(table, 1)).all()


def test_buckets():
    keys = np.array([[5, 1, 5, 2, 1, 5], [1, 2, 3, 4, 5, 6]], dtype=np.uint64)
    assert [rows.tolist() for rows in buckets(keys)] == [[1, 4], [0, 2, 5]]
