"""Texts scored under the model and its proxies: each once, all proxies together, kept on disk.

A request is a token sequence of which the last few tokens are scored. Evaluation harnesses ask for many
that repeat; requests are known by their content, so that nothing is computed twice, in one run or in a
run that was killed and started again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelens_certify.evidence import dump_table, read_table, reading
from saelens_certify.storage import write_atomically

PROXIES = ("base", "sae", "pool")
"""M, S∘M and h_G."""


@dataclass(frozen=True)
class Request:
    """A token sequence of which the last tokens are scored.

    Attributes:
        tokens: Token ids, context first; at least one more than are scored.
        n_scored: How many of the last tokens are scored.
        n_cut: How many tokens of the context were cut off on the left because the model's context is
            shorter.
    """

    tokens: tuple[int, ...]
    n_scored: int
    n_cut: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 of the tokens and of how many are scored."""
        content = np.array([self.n_scored, *self.tokens], dtype="<i8")
        return hashlib.sha256(content.tobytes()).hexdigest()


@dataclass(frozen=True)
class Score:
    """What the model and its proxies say of a request.

    Attributes:
        logprob: Natural log-probability of the scored tokens given those before them, by proxy.
        greedy: Whether each scored token is the most likely one, by proxy.
        violation: Whether a feature outside the pool is active on any token that others are predicted from, so
            that h_G differs from S∘M.
    """

    logprob: Mapping[str, float]
    greedy: Mapping[str, bool]
    violation: bool


@dataclass(frozen=True)
class ScoredTokens:
    """Sequences of one length under the model and its proxies.

    Attributes:
        logprob: By proxy: natural log-probability of token t + 1 given tokens 0 .. t.
        greedy: By proxy: whether that token is the most likely one.
        violation: Whether h_G predicts something else than S∘M, because a feature outside the pool is active.
    """

    logprob: Mapping[str, Float64[Tensor, "n_sequences predicted"]]
    greedy: Mapping[str, Bool[Tensor, "n_sequences predicted"]]
    violation: Bool[Tensor, " n_sequences"]


Measure = Callable[[Int[Tensor, "n_sequences pos"]], ScoredTokens]


class ScoreStore:
    """Scores of requests, measured when first asked for.

    Sequences are measured in groups of one length, the longest first, so that no pad is ever fed and a
    lack of memory shows at once.

    Args:
        measure: Measures sequences of one length under all proxies.
        folder: Where scores are kept, in files that are whole or absent; None: in memory only. It must
            belong to the same model, SAE, pool and settings.
        part_sequences: Sequences per file: what a killed run may lose.
        progress: Whether to show a progress bar.

    Raises:
        EvidenceError: If a file in the folder is damaged.
    """

    def __init__(
        self,
        measure: Measure,
        folder: Path | None = None,
        part_sequences: int = 512,
        progress: bool = True,
    ) -> None:
        self._measure = measure
        self._folder = folder
        self._part_sequences = part_sequences
        self.progress = progress
        self._scores: dict[str, Score] = {}
        for file in sorted(folder.glob("part-*.parquet")) if folder is not None else ():
            with reading(file):
                self._scores |= _from_table(read_table(file))

    def __len__(self) -> int:
        return len(self._scores)

    def __getitem__(self, request: Request) -> Score:
        return self._scores[request.key]

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of requests, in their order; those not known yet are measured.

        Args:
            requests: Requests; repeated ones are measured once.
        """
        sequences: dict[tuple[int, ...], dict[str, Request]] = {}
        for request in requests:
            if request.key not in self._scores:
                sequences.setdefault(request.tokens, {})[request.key] = request
        # By length, then by content: neither the order of the requests nor a kill changes the parts.
        ordered = sorted(
            (sorted(asked.values(), key=lambda r: r.n_scored) for asked in sequences.values()),
            key=lambda asked: (-len(asked[0].tokens), asked[0].tokens),
        )
        n_tokens = sum(len(asked[0].tokens) for asked in ordered)
        with tqdm(
            total=n_tokens, desc="scoring", unit="tok", unit_scale=True,
            disable=not self.progress or not ordered,
        ) as bar:  # fmt: skip
            for start in range(0, len(ordered), self._part_sequences):
                self._add_part(ordered[start : start + self._part_sequences], bar)
        return [self._scores[request.key] for request in requests]

    def _add_part(self, part: Sequence[Sequence[Request]], bar: tqdm) -> None:
        found: dict[str, Score] = {}
        lengths: dict[str, Request] = {}
        for length, group in itertools.groupby(part, key=lambda asked: len(asked[0].tokens)):
            same = list(group)
            tokens = torch.tensor([asked[0].tokens for asked in same], device="cpu")
            found |= dict(_scores(same, self._measure(tokens)))
            bar.update(length * len(same))
        for asked in part:
            lengths |= {request.key: request for request in asked}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]
            table = _to_table(found, lengths)
            write_atomically(self._folder / f"part-{name}.parquet", dump_table(table))
        self._scores |= found


def _scores(
    same: Sequence[Sequence[Request]], measured: ScoredTokens
) -> Iterator[tuple[str, Score]]:
    """Scores of requests about measured sequences, row by row."""
    for row, asked in enumerate(same):
        for request in asked:
            last = slice(-request.n_scored, None)
            yield (
                request.key,
                Score(
                    {name: float(measured.logprob[name][row, last].sum()) for name in PROXIES},
                    {name: bool(measured.greedy[name][row, last].all()) for name in PROXIES},
                    bool(measured.violation[row]),
                ),
            )


def _to_table(scores: Mapping[str, Score], requests: Mapping[str, Request]) -> pa.Table:
    keys = sorted(scores)
    columns = {
        "request": pa.array(keys, pa.string()),
        "n_tokens": pa.array([len(requests[key].tokens) for key in keys], pa.int64()),
        "n_scored": pa.array([requests[key].n_scored for key in keys], pa.int64()),
        "violation": pa.array([scores[key].violation for key in keys], pa.bool_()),
    }
    for name in PROXIES:
        logprobs = [scores[key].logprob[name] for key in keys]
        columns[f"logprob_{name}"] = pa.array(logprobs, pa.float64())
        columns[f"greedy_{name}"] = pa.array([scores[key].greedy[name] for key in keys], pa.bool_())
    return pa.table(columns)


def _from_table(table: pa.Table) -> dict[str, Score]:
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return {
        key: Score(
            {name: float(columns[f"logprob_{name}"][row]) for name in PROXIES},
            {name: bool(columns[f"greedy_{name}"][row]) for name in PROXIES},
            bool(columns["violation"][row]),
        )
        for row, key in enumerate(columns["request"])
    }
