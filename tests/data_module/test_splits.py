from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify.data import Sequences, as_sequences, check_disjoint, check_size, split
from saelens_certify.data.splits import _intervals
from saelens_certify.errors import CertifyError


def some(n: int, seed: int = 0, length: int = 4) -> Sequences:
    tokens = np.random.default_rng(seed).choice(10**6, size=n * length, replace=False)
    return Sequences.from_tokens(torch.from_numpy(tokens.reshape(n, length)))


fraction_sets = st.sampled_from(
    [
        (0.2, 0.8),
        (0.5, 0.5),
        (0.1, 0.3),
        (0.3, 0.7),
        (0.9, 0.1),
        (0.1, 0.2, 0.7),
        (0.25, 0.25, 0.25),
    ]
)


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(0, 5), fraction_sets, st.integers(0, 2**40))
def test_fraction_split_is_disjoint_ordered_and_order_free(n, data_seed, fractions, seed):
    sequences = some(n, data_seed)
    names = ("calibration", "evaluation", "test")[: len(fractions)]
    parts = split(sequences, fractions, seed=seed, names=names)
    assert tuple(parts) == names
    taken = [h for part in parts.values() for h in part.hashes]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(sequences.hashes)
    if abs(sum(fractions) - 1) < 1e-12:
        assert len(taken) == n
    for part in parts.values():
        assert [h for h in sequences.hashes if h in set(part.hashes)] == list(part.hashes)
    again = split(sequences.select(range(n)[::-1]), fractions, seed=seed, names=names)
    for name in names:
        assert again[name].digest == parts[name].digest


@settings(max_examples=30)
@given(st.integers(2, 60), st.integers(0, 2**40), fraction_sets, st.integers(1, 59))
def test_a_document_lands_on_the_same_side_in_every_shard(n, seed, fractions, cut):
    sequences = some(n)
    names = ("calibration", "evaluation", "test")[: len(fractions)]
    whole = split(sequences, fractions, seed=seed, names=names)
    cut = min(cut, n - 1)
    shards = [sequences.select(range(cut)), sequences.select(range(cut, n))]
    pieces = [split(shard, fractions, seed=seed, names=names) for shard in shards]
    for name in names:
        assert pieces[0][name].hashes + pieces[1][name].hashes == whole[name].hashes


def test_fractions_are_approximately_met_and_seeds_differ():
    n = 20_000
    sequences = some(n, length=2)
    for seed in range(3):
        parts = split(sequences, (0.2, 0.8), seed=seed)
        # Four standard deviations of a binomial count.
        assert abs(len(parts["calibration"]) - 0.2 * n) < 4 * (n * 0.2 * 0.8) ** 0.5
    a = set(split(sequences, (0.2, 0.8), seed=0)["calibration"].hashes)
    b = set(split(sequences, (0.2, 0.8), seed=1)["calibration"].hashes)
    assert abs(len(a & b) - 0.04 * n) < 4 * (n * 0.04) ** 0.5


def test_golden_split():
    # Written down once: the same documents must fall on the same sides for ever.
    texts = [f"document {i}" for i in range(12)]
    parts = split(texts, (0.5, 0.5), seed=7)
    assert [int(t.split()[1]) for t in parts["calibration"]] == [0, 7, 8, 10]


@settings(max_examples=40)
@given(st.integers(1, 60), st.data(), st.integers(0, 2**40))
def test_counts_are_exact_disjoint_and_order_free(n, data, seed):
    first = data.draw(st.integers(0, n))
    second = data.draw(st.integers(0, n - first))
    sequences = some(n)
    parts = split(sequences, counts=(first, second), seed=seed)
    a, b = parts["calibration"], parts["evaluation"]
    assert (len(a), len(b)) == (first, second)
    assert not set(a.hashes) & set(b.hashes)
    again = split(sequences.canonical, counts=(first, second), seed=seed)
    assert (again["calibration"].digest, again["evaluation"].digest) == (a.digest, b.digest)


def test_growing_calibration_leaves_evaluation_alone():
    sequences = some(50)
    small = split(sequences, counts=(5, 20), seed=1)
    large = split(sequences, counts=(30, 20), seed=1)
    assert small["evaluation"].hashes == large["evaluation"].hashes
    assert set(small["calibration"].hashes) < set(large["calibration"].hashes)
    assert large["calibration"].source.selection == ("split calibration counts=(30, 20) seed=1",)


def test_copies_stay_together_by_fractions_and_are_refused_by_counts():
    sequences = as_sequences(
        torch.tensor([[1, 2], [3, 4]] * 10), seq_len=2, d_vocab=9, on_duplicate="keep"
    )
    for seed in range(20):
        parts = split(sequences, (0.5, 0.5), seed=seed)
        assert not set(parts["calibration"].hashes) & set(parts["evaluation"].hashes)
    with pytest.raises(CertifyError, match="18 repeated documents"):
        split(sequences, counts=(5, 5), seed=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "either fractions or counts"),
        ({"fractions": (0.5, 0.5), "counts": (1, 1)}, "either fractions or counts"),
        ({"fractions": (0.5,)}, r"fractions=(0.5,) for names=('calibration', 'evaluation')"),
        ({"fractions": (0.5, 0.6)}, "are (0.5, 0.6) (sum 1.1)"),
        ({"fractions": (0.0, 0.6)}, "must lie in (0, 1]"),
        ({"fractions": (0.5, 0.5), "names": ("a", "a")}, "different names"),
        ({"counts": (3, 3)}, "asks for 3 + 3 = 6 documents, there are 5"),
        ({"counts": (-1, 3)}, "whole numbers >= 0, are (-1, 3)"),
        ({"counts": (0.5, 3)}, "whole numbers >= 0, are (0.5, 3)"),
    ],
)
def test_split_refuses(keywords, message):
    with pytest.raises(CertifyError, match=re.escape(message)):
        split(some(5), seed=0, **keywords)


def test_check_disjoint_names_both_sides_and_without_repairs():
    sequences = some(10)
    calibration, evaluation = sequences.take(7), sequences.select(range(3, 10))
    with pytest.raises(CertifyError) as caught:
        check_disjoint(calibration, evaluation)
    message = str(caught.value)
    assert "share 4 sequences (the first 4 tokens are equal)" in message
    assert "calibration [tokens:3, tokens:4, tokens:5, ...]" in message
    assert "evaluation [tokens:3, tokens:4, tokens:5, ...]" in message
    assert "calibration = calibration.without(evaluation)" in message
    repaired = calibration.without(evaluation)
    check_disjoint(repaired, evaluation)
    assert repaired.document_ids == ("tokens:0", "tokens:1", "tokens:2")
    assert repaired.source.selection[0].startswith("without 4 sequences shared with ")


def test_disjointness_is_checked_across_lengths():
    long = some(6, length=8)
    short = as_sequences(long, seq_len=3, d_vocab=10**6).select([2])
    with pytest.raises(CertifyError, match=r"share 1 sequences \(the first 3 tokens"):
        check_disjoint(long, short)
    with pytest.raises(CertifyError, match=r"share 1 sequences \(the first 3 tokens"):
        check_disjoint(short, long)
    check_disjoint(long.without(short), short)


def test_too_few_says_what_was_read():
    sequences = as_sequences([[1, 2, 3], [1, 2, 3], [1], [4, 5, 6]], seq_len=3, d_vocab=9)
    check_size(sequences, 2)
    with pytest.raises(CertifyError) as caught:
        check_size(sequences, 3, "evaluation")
    message = str(caught.value)
    assert message.startswith("evaluation: 2 sequences of L = 3 tokens, at least 3 needed.")
    assert "4 documents were read, 1 were too short or padded and 1 repeated" in message
    with pytest.raises(CertifyError, match="calibration: 0 sequences"):
        check_disjoint(sequences.take(0), sequences)
    with pytest.raises(CertifyError, match=r"evaluation: 0 sequences.*\(without 2 sequences"):
        check_disjoint(sequences, sequences.without(sequences))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_shares_of_a_whole_leave_no_gap_and_no_overlap(weights):
    intervals = _intervals([weight / sum(weights) for weight in weights], 1)
    assert intervals[0][0] == pytest.approx(0, abs=1e-15)
    assert intervals[-1][1] == 1
    for (_, high), (low, _) in zip(intervals[:-1], intervals[1:], strict=True):
        assert high == low
