"""Synthetic inputs of the operator rows: unit rows, Gaussian activations, codes, logits.

One matrix serves as encoder and as decoder (both hold one unit row per feature), so that the largest
shape fits into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.replay import operator_calls
from benchmarks.session import Session
from benchmarks.shapes import Shape
from benchmarks.timing import Contender
from saelens_certify import ops
from saelens_certify.ops import SparseCodes
from saelens_certify.ops.screen import Screen

_FILL_ROWS = 4096


def generator(device: str, stream: int) -> torch.Generator:
    """A random generator with a fixed seed."""
    return torch.Generator(device=device).manual_seed(1000 + stream)


@dataclass(frozen=True)
class Ring:
    """Inputs that take turns, so that a call does not find its input in the cache."""

    parts: list[Any]

    def __getitem__(self, number: int) -> Any:
        return self.parts[number % len(self.parts)]

    def call(self, function: Callable[[Any], object]) -> Contender:
        """Make a contender that applies a function to the inputs in turn."""
        return lambda number: function(self[number])

    def replayed(self, function: Callable[[Any], object]) -> Contender | None:
        """Make a contender of the compiled operators alone; None where there are none."""
        calls = [
            call
            for part in self.parts
            if (call := operator_calls(lambda part=part: function(part))) is not None
        ]
        return (lambda number: calls[number % len(calls)]()) if calls else None


def ring(session: Session, n_bytes: int, make: Callable[[int], Any]) -> Ring:
    """Make as many inputs as are needed to get past the cache."""
    return Ring([make(stream) for stream in range(session.copies(n_bytes))])


class SaeInputs:
    """Weights of one shape, on the session's device."""

    def __init__(self, session: Session, shape: Shape) -> None:
        self.session = session
        self.shape = shape.toy() if session.quick else shape
        self.tokens = self.shape.tokens(session.device)
        self.device = session.device

    @classmethod
    def of(cls, session: Session, shape: Shape) -> SaeInputs:
        """Return the inputs of a shape; only those of the latest shape are kept."""
        return session.keep(f"sae {shape.name}", "inputs", lambda: cls(session, shape))

    @cached_property
    def weight(self) -> Tensor:
        """Unit rows, ``[m, d]`` float32."""
        weight = torch.empty(self.shape.m, self.shape.d, device=self.device)
        source = generator(self.device, 1)
        for rows in weight.split(_FILL_ROWS):
            rows.normal_(generator=source)
            rows /= rows.norm(dim=1, keepdim=True)
        return weight

    @cached_property
    def bias(self) -> Tensor:
        """Encoder bias."""
        return 0.05 * torch.randn(
            self.shape.m, device=self.device, generator=generator(self.device, 2)
        )

    @cached_property
    def decoder_bias(self) -> Tensor:
        """Decoder bias."""
        return torch.randn(self.shape.d, device=self.device, generator=generator(self.device, 3))

    @cached_property
    def screen(self) -> Screen:
        """What an adapter prepares once per SAE and passes to every encode."""
        return ops.prepare_screen(self.weight)

    @cached_property
    def theta(self) -> float:
        """Threshold that about k of the m features of a token exceed."""
        share = torch.tensor(1 - self.shape.k / self.shape.m, dtype=torch.float64)
        return float(torch.special.ndtri(share)) * (1 + 0.05**2) ** 0.5

    @cached_property
    def x(self) -> Ring:
        """Encoder inputs ``[T, d]``: scores are then standard normal."""
        n, d = self.tokens.encode, self.shape.d

        def make(stream: int) -> Tensor:
            return torch.randn(
                n, d, device=self.device, generator=generator(self.device, 10 + stream)
            )

        return ring(self.session, 4 * n * d, make)

    @cached_property
    def target(self) -> Tensor:
        """What the decoders' output is compared with."""
        return torch.randn(
            self.tokens.decode,
            self.shape.d,
            device=self.device,
            generator=generator(self.device, 4),
        )

    @cached_property
    def codes(self) -> Ring:
        """Codes of distinct features, spread evenly: no feature is hot, the worst case of a gather."""
        n, m, k = self.tokens.decode, self.shape.m, self.shape.k

        def make(stream: int) -> SparseCodes:
            source = generator(self.device, 20 + stream)
            options: dict[str, Any] = {"device": self.device, "generator": source}
            first = torch.randint(m, (n, 1), **options)
            # A stride that shares no factor with m (2^a 3^b) visits k different features.
            stride = 6 * torch.randint(1, m // 6, (n, 1), **options) + 1
            slots = torch.arange(k, device=self.device)
            indices = ((first + slots * stride) % m).int()
            values = torch.rand(n, k, **options).add_(0.5).sort(dim=1, descending=True).values
            counts = torch.full((n,), k, dtype=torch.int32, device=self.device)
            return SparseCodes(values, indices, counts)

        return ring(self.session, 8 * n * k, make)

    @cached_property
    def pool_mask(self) -> Tensor:
        """A pool of 95 % of the features."""
        source = generator(self.device, 5)
        return torch.rand(self.shape.m, device=self.device, generator=source) < 0.95


class HeadInputs:
    """Logits and head of one shape, on the session's device."""

    def __init__(self, session: Session, shape: Shape) -> None:
        self.session = session
        self.shape = shape.toy() if session.quick else shape
        self.tokens = self.shape.tokens(session.device)
        self.device = session.device

    @classmethod
    def of(cls, session: Session, shape: Shape) -> HeadInputs:
        """Return the inputs of a shape; only those of the latest shape are kept."""
        return session.keep(f"head {shape.name}", "inputs", lambda: cls(session, shape))

    def targets(self, n: int) -> Tensor:
        """Gold tokens."""
        source = generator(self.device, 6)
        return torch.randint(self.shape.vocab, (n,), device=self.device, generator=source)

    @cached_property
    def logits(self) -> Ring:
        """Pairs of float32 logits that differ a little, as a model's and its proxy's do."""
        n, vocab = self.tokens.logits, self.shape.vocab

        def make(stream: int) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {
                "device": self.device,
                "generator": generator(self.device, 30 + stream),
            }
            base = torch.randn(n, vocab, **options).mul_(3.0)
            return base, base + 0.3 * torch.randn(n, vocab, **options)

        return ring(self.session, 4 * n * vocab, make)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the head's inputs: as models are run on each device."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @cached_property
    def head(self) -> Tensor:
        """Unembedding ``[d, V]``, scaled so that logits have a realistic spread."""
        head = torch.empty(self.shape.d, self.shape.vocab, device=self.device, dtype=self.dtype)
        source = generator(self.device, 7)
        return head.normal_(generator=source).mul_(3.0 / self.shape.d**0.5)

    @cached_property
    def residuals(self) -> Ring:
        """Pairs of residuals ``[T, d]`` after the final norm."""
        n, d = self.tokens.head, self.shape.d

        def make(stream: int) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {
                "device": self.device,
                "generator": generator(self.device, 40 + stream),
            }
            base = torch.randn(n, d, **options)
            other = base + 0.1 * torch.randn(n, d, **options)
            return base.to(self.dtype), other.to(self.dtype)

        return ring(self.session, 2 * n * d * self.dtype.itemsize, make)
