from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, as_sequences, check_disjoint
from saelens_certify.data.corruption import corrupted, one_document_per_cluster
from saelens_certify.data.near_duplicates import find_clusters
from saelens_certify.dependence import independent_draws
from saelens_certify.errors import CertifyError

V = 300
SPECIAL = (0, 7, 250)


def some(n: int, length: int = 16, seed: int = 0, first: int = 0) -> Sequences:
    tokens = np.random.default_rng(seed).integers(0, V, size=(n, length))
    tokens[:, 0] = first
    return as_sequences(torch.from_numpy(tokens), seq_len=length, d_vocab=V)


def of(sequences: Sequences, rate: float, seed: int = 0) -> Sequences:
    return corrupted(sequences, rate, seed=seed, d_vocab=V, keep=SPECIAL)


rates = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(2, 20), rates, rates, st.integers(-(2**70), 2**70))
def test_lower_rates_replace_a_subset_by_the_same_tokens(n, length, a, b, seed):
    sequences = some(n, length)
    low, high = (of(sequences, rate, seed).tokens for rate in sorted((a, b)))
    changed = low != sequences.tokens
    assert torch.equal(high[changed], low[changed])
    everything = of(sequences, 1.0, seed).tokens
    assert bool(((high == sequences.tokens) | (high == everything)).all())


@settings(max_examples=25)
@given(st.integers(2, 12), rates, st.integers(0, 2**40), st.randoms(use_true_random=False))
def test_neither_order_nor_company_matters(n, rate, seed, random):
    sequences = some(n)
    whole = of(sequences, rate, seed)
    rows = random.sample(range(len(sequences)), random.randint(1, len(sequences)))
    part = of(sequences.select(rows), rate, seed)
    assert torch.equal(part.tokens, whole.tokens[rows])
    assert part.hashes == tuple(whole.hashes[row] for row in rows)
    assert part.document_ids == tuple(sequences.document_ids[row] for row in rows)


@settings(max_examples=25)
@given(rates, st.integers(0, 2**40), st.sampled_from([0, 7, 19]))
def test_the_first_and_special_tokens_stay_and_none_is_put_in(rate, seed, first):
    sequences = some(30, first=first)
    result = of(sequences, rate, seed).tokens
    assert bool((result[:, 0] == first).all())
    special = torch.isin(sequences.tokens, torch.tensor(SPECIAL))
    assert torch.equal(result[special], sequences.tokens[special])
    assert not bool(torch.isin(result[~special], torch.tensor(SPECIAL)).any())
    assert 0 <= int(result.min()) <= int(result.max()) < V


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_rates_are_kept_exactly(rate):
    sequences = some(1500)
    result = of(sequences, rate, seed=3)
    free = ~torch.isin(sequences.tokens, torch.tensor(SPECIAL))
    free[:, 0] = False
    changed = int((result.tokens != sequences.tokens)[free].sum())
    choices = V - len(SPECIAL)
    test = stats.binomtest(changed, int(free.sum()), rate * (1 - 1 / choices))
    assert test.pvalue > 1e-4
    # Documents are corrupted independently: their counts are binomial, not only their sum.
    counts = ((result.tokens != sequences.tokens) & free).sum(dim=1).double()
    trials = free.sum(dim=1).double()
    p = rate * (1 - 1 / choices)
    z = (counts - trials * p) / (trials * p * (1 - p)).sqrt()
    assert abs(float(z.var()) - 1) < 0.2


def test_replacements_are_uniform_over_the_other_tokens():
    random = of(some(3000), 1.0, seed=1).tokens
    free = ~torch.isin(some(3000).tokens, torch.tensor(SPECIAL))
    free[:, 0] = False
    counts = torch.bincount(random[free], minlength=V).numpy()
    allowed = np.setdiff1d(np.arange(V), SPECIAL)
    assert counts[list(SPECIAL)].sum() == 0
    assert stats.chisquare(counts[allowed]).pvalue > 1e-4
    # By position too: no position sees the same stream as another.
    assert abs(np.corrcoef(random.numpy()[:, 1:].T)[np.triu_indices(15, 1)]).max() < 0.1


def test_seeds_and_documents_have_their_own_random_numbers():
    sequences = some(200)
    a, b = (of(sequences, 0.5, seed).tokens != sequences.tokens for seed in (0, 1))
    both = float((a & b)[:, 1:].double().mean())
    assert abs(both - 0.25) < 4 * (0.25 * 0.75 / (200 * 15)) ** 0.5
    assert not torch.equal(of(sequences, 1.0, 0).tokens, of(sequences, 1.0, 1).tokens)
    twins = Sequences.from_tokens(torch.tensor([[0, 11, 12, 13], [0, 11, 12, 14]]))
    one, other = corrupted(twins, 1.0, seed=0, d_vocab=10**6).tokens[:, 1:]
    assert not bool((one == other).any())


def test_golden_tokens_and_hashes():
    # Written down once: the same seed must give the same documents for ever.
    sequences = Sequences.from_tokens(torch.arange(8).reshape(1, 8))
    result = corrupted(sequences, 0.5, seed=5, d_vocab=50_257)
    message = f"saelens_certify.corruption:5:{sequences.hashes[0]}".encode()
    raw = hashlib.shake_256(message).digest(8 * 16)
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(16)]
    expected = [
        token
        if position == 0 or (words[2 * position] >> 11) / 2**53 >= 0.5
        else int((words[2 * position + 1] >> 11) / 2**53 * 50_257)
        for position, token in enumerate(range(8))
    ]
    assert result.tokens.tolist() == [expected]
    assert result.hashes == Sequences.from_tokens(torch.tensor([expected])).hashes
    assert result.document_ids == sequences.document_ids
    (note,) = result.source.selection
    assert "rate=0.5" in note
    assert "seed=5" in note


def test_ends_of_the_range():
    sequences = some(40)
    assert torch.equal(of(sequences, 0.0).tokens, sequences.tokens)
    kept = of(sequences, 1.0).tokens[:, 1:] == sequences.tokens[:, 1:]
    special = torch.isin(sequences.tokens[:, 1:], torch.tensor(SPECIAL))
    assert float(kept[~special].double().mean()) < 0.02


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan"), True, "0.5", None])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(CertifyError, match="rate="):
        corrupted(some(2), rate, seed=0, d_vocab=V)


def test_impossible_settings_are_refused():
    with pytest.raises(CertifyError, match="no token to put in"):
        corrupted(some(2), 0.5, seed=0, d_vocab=2, keep=(0, 1))
    with pytest.raises(CertifyError, match="seed"):
        corrupted(some(2), 0.5, seed=0.5, d_vocab=V)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CertifyError, match="keep"):
        corrupted(some(2), 0.5, seed=0, d_vocab=V, keep=(True,))


def repeating() -> Sequences:
    """Two near duplicates, three sequences of two documents of which two are near duplicates, and loners."""
    tokens = some(40, length=32, seed=4).tokens.clone()
    tokens[1] = tokens[0]
    tokens[1, 30] = 5
    tokens[4] = tokens[3]
    tokens[4, 1] = 6
    names = [f"d{i}" for i in range(40)]
    names[2] = names[3]  # 2 and 3 of one document, 4 a near duplicate of 3
    return Sequences.from_tokens(tokens, names).canonical


def partition(names) -> set[frozenset[int]]:
    groups: dict[str, set[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, set()).add(row)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_clusters_stay_those_of_the_uncorrupted_documents(rate):
    sequences = repeating()
    found = find_clusters(sequences)
    assert sorted(map(len, partition(found.names)), reverse=True)[:3] == [3, 2, 1]
    renamed = one_document_per_cluster(sequences, found)
    again = find_clusters(corrupted(renamed, rate, seed=0, d_vocab=V))
    assert partition(again.names) == partition(found.names)
    if rate == 1.0:  # without the names the dependence would be lost
        lost = find_clusters(corrupted(sequences, rate, seed=0, d_vocab=V))
        assert partition(lost.names) != partition(found.names)


def test_draws_of_corrupted_documents_have_the_original_clusters():
    sequences = repeating()
    calibration = some(20, length=32, seed=9)
    renamed = one_document_per_cluster(sequences, find_clusters(sequences))
    moved = corrupted(renamed, 1.0, seed=0, d_vocab=V)
    check_disjoint(calibration, moved)
    with pytest.warns(UserWarning, match="repeat each other"):
        draws = independent_draws(calibration, moved, CertifyConfig())
    assert draws.sizes is not None
    assert sorted(draws.sizes, reverse=True)[:6] == [3, 3, 3, 2, 2, 1]


def test_only_repeating_sequences_are_renamed():
    sequences = repeating()
    found = find_clusters(sequences)
    renamed = one_document_per_cluster(sequences, found)
    for i, cluster in enumerate(found.names):
        lone = found.names.count(cluster) == 1
        if lone:
            assert renamed.document_ids[i] == sequences.document_ids[i]
        assert renamed.document_ids[i] == sequences.document_ids[sequences.hashes.index(cluster)]
    assert renamed.hashes == sequences.hashes
    assert "document id" in renamed.source.selection[-1]
    lonely = some(10)
    assert one_document_per_cluster(lonely, find_clusters(lonely)) is lonely
    with pytest.raises(CertifyError, match="search again"):
        one_document_per_cluster(lonely, found)
