"""The store of scores, on measures that are made of the tokens themselves."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify.integrations.scored_requests import (
    PROXIES,
    Request,
    ScoredTokens,
    ScoreStore,
)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(1, 5)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_store_sums_the_last_tokens_and_measures_once(asked, part, rng) -> None:
    """Whatever the order, repeats and parts: values that are made of the tokens come back summed."""
    measured: list[tuple[int, ...]] = []

    def measure(tokens: torch.Tensor) -> ScoredTokens:
        assert tokens.shape[1] >= 2
        measured.extend(map(tuple, tokens.tolist()))
        values = tokens[:, 1:].double() + tokens[:, :-1] / 8
        return ScoredTokens(
            {proxy: values * (index + 1) for index, proxy in enumerate(PROXIES)},
            {proxy: tokens[:, 1:] > index for index, proxy in enumerate(PROXIES)},
            (tokens == 5).any(dim=1),
        )

    requests = [Request(tuple(t), min(n, len(t) - 1)) for t, n in asked]
    requests += rng.choices(requests, k=3)
    rng.shuffle(requests)
    store = ScoreStore(measure, None, part, progress=False)
    half = len(requests) // 2
    scores = store.score(requests[:half]) + store.score(requests[half:])
    for request, score in zip(requests, scores, strict=True):
        t = request.tokens
        places = range(len(t) - request.n_scored, len(t))
        total = sum(t[i] + t[i - 1] / 8 for i in places)
        for index, proxy in enumerate(PROXIES):
            assert score.logprob[proxy] == total * (index + 1)
            assert score.greedy[proxy] == all(t[i] > index for i in places)
        assert score.violation == (5 in t)
    assert len(store) == len({(request.tokens, request.n_scored) for request in requests})
    first = {request.tokens for request in requests[:half]}
    second = {
        request.tokens
        for request in requests[half:]
        if (request.tokens, request.n_scored)
        not in {(each.tokens, each.n_scored) for each in requests[:half]}
    }
    assert sorted(measured) == sorted([*first, *second])


def test_parts_depend_on_what_is_asked_not_on_the_order(tmp_path) -> None:
    """The longest first, one length at a time, and the same files whatever came first."""
    rng = random.Random(0)
    requests = [
        Request(tuple(rng.choices(range(50), k=rng.randrange(3, 7))), rng.randrange(1, 3))
        for _ in range(40)
    ]
    contents, lengths = [], []
    for name in ("one", "other"):
        calls: list[int] = []

        def measure(tokens: torch.Tensor, calls: list[int] = calls) -> ScoredTokens:
            calls.append(tokens.shape[1])
            values = tokens[:, 1:].double()
            return ScoredTokens(
                dict.fromkeys(PROXIES, values),
                dict.fromkeys(PROXIES, values > 9),
                (tokens == 3).any(dim=1),
            )

        folder = tmp_path / name
        ScoreStore(measure, folder, 9, progress=False).score(requests)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        lengths.append(calls)
        rng.shuffle(requests)
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5
    assert lengths[0] == lengths[1] == sorted(lengths[0], reverse=True)
    assert len(lengths[0]) <= 5 + 3, "a length is split by the parts only"
