"""The named shapes, and how many tokens a row takes on each device."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tokens:
    """Tokens per call, chosen so that one call takes seconds at most and memory stays bounded.

    Attributes:
        encode: For the encoders.
        decode: For the decoders and pools.
        logits: For statistics of given logits.
        head: For the head with its statistics.
    """

    encode: int
    decode: int
    logits: int
    head: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its SAE.

    Attributes:
        name: Short name, part of every row's name.
        title: Whose sizes these are.
        d: Width of the residual stream.
        m: Features of the SAE.
        vocab: Vocabulary size.
        k: Active features per token.
        cpu: Tokens per call on a CPU.
        cuda: Tokens per call on a GPU.
    """

    name: str
    title: str
    d: int
    m: int
    vocab: int
    k: int
    cpu: Tokens
    cuda: Tokens

    def tokens(self, device: str) -> Tokens:
        """Return the numbers of tokens for a device type."""
        return self.cuda if device == "cuda" else self.cpu

    def toy(self) -> Shape:
        """Return the same row at a size for tests."""
        few = Tokens(32, 32, 16, 16)
        sizes = {"d": 64 + 32 * (self.d > 1000), "m": 768, "vocab": 1000, "k": 8}
        return replace(self, **sizes, cpu=few, cuda=few)


SHAPES = (
    Shape(
        name="SmolLM2",
        title="SmolLM2-135M",
        d=576,
        m=8192,
        vocab=49152,
        k=64,
        cpu=Tokens(2048, 2048, 512, 1024),
        cuda=Tokens(8192, 8192, 4096, 8192),
    ),
    Shape(
        name="G2",
        title="GPT-2 small",
        d=768,
        m=24576,
        vocab=50257,
        k=32,
        cpu=Tokens(1024, 1024, 512, 512),
        cuda=Tokens(8192, 8192, 4096, 8192),
    ),
    Shape(
        name="GE",
        title="Gemma-2B",
        d=2048,
        m=16384,
        vocab=256000,
        k=64,
        cpu=Tokens(512, 512, 128, 64),
        cuda=Tokens(4096, 4096, 2048, 2048),
    ),
    Shape(
        name="LL",
        title="Llama-3-8B",
        d=4096,
        m=131072,
        vocab=128256,
        k=64,
        cpu=Tokens(128, 128, 128, 64),
        cuda=Tokens(4096, 4096, 4096, 4096),
    ),
)
