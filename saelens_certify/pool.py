"""The concept pool: the features that calibration has seen, kept as counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.errors import CertifyError, EvidenceError


@dataclass(frozen=True)
class Pool:
    """A set G of features.

    Attributes:
        mask: True for the features in the pool, on the CPU.
    """

    mask: Bool[Tensor, " d_sae"]

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " d_sae"], tau: int = 1) -> Pool:
        """Take the features that were active on at least ``tau`` calibration tokens."""
        return cls(mask=(counts >= tau).cpu())

    @cached_property
    def size(self) -> int:
        """Number of features P in the pool."""
        return int(self.mask.sum())

    @cached_property
    def key(self) -> bytes:
        """Its bits: equal for equal pools."""
        return self.bits(torch.device("cpu")).numpy().tobytes()

    def bits(self, device: torch.device) -> Int[Tensor, " words"]:
        """Return the pool as a bitmask on ``device``."""
        return ops.pool_bits(self.mask.to(device))


@dataclass(frozen=True)
class Calibration:
    """What one pass over the calibration documents leaves behind; all of it adds up.

    Attributes:
        counts: Number of coded tokens on which each feature is active, int64.
        target_counts: How often each token id is a target (positions 1 .. L-1), int64.
        activation_sums: Sum of the activation at the output hook, float64, over coded tokens at
            position 0 (row 0) and at all later positions (row 1).
        activation_tokens: Number of tokens in each of the two sums, int64.
        n_sequences: Sequences seen.
    """

    counts: Int[Tensor, " d_sae"]
    target_counts: Int[Tensor, " d_vocab"]
    activation_sums: Float[Tensor, "2 d_out"]
    activation_tokens: Int[Tensor, " 2"]
    n_sequences: int

    @classmethod
    def empty(cls, d_sae: int, d_vocab: int, d_out: int) -> Calibration:
        """Return a calibration that has seen nothing."""
        return cls(
            counts=torch.zeros(d_sae, dtype=torch.int64, device="cpu"),
            target_counts=torch.zeros(d_vocab, dtype=torch.int64, device="cpu"),
            activation_sums=torch.zeros(2, d_out, dtype=torch.float64, device="cpu"),
            activation_tokens=torch.zeros(2, dtype=torch.int64, device="cpu"),
            n_sequences=0,
        )

    def check_resumable(self, empty: Calibration, n: int, length: int, where: str) -> None:
        """Check that this can be the first part of a calibration.

        Raises:
            EvidenceError: If sizes or counts are impossible.
        """
        shapes = [
            (a.shape, b.shape)
            for a, b in (
                (self.counts, empty.counts),
                (self.target_counts, empty.target_counts),
                (self.activation_sums, empty.activation_sums),
                (self.activation_tokens, empty.activation_tokens),
            )
        ]
        possible = (
            all(a == b for a, b in shapes)
            and 0 <= self.n_sequences <= n
            and int(self.target_counts.sum()) == self.n_sequences * (length - 1)
            and self.n_sequences <= self.n_tokens <= self.n_sequences * length
        )
        if not possible:
            raise EvidenceError(
                f"the calibration in {where} does not fit this run: it is damaged or was edited; "
                "delete calibration.safetensors and the evidence folder, and run again"
            )

    @property
    def n_tokens(self) -> int:
        """Coded tokens seen."""
        return int(self.activation_tokens.sum())

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            counts=self.counts + other.counts,
            target_counts=self.target_counts + other.target_counts,
            activation_sums=self.activation_sums + other.activation_sums,
            activation_tokens=self.activation_tokens + other.activation_tokens,
            n_sequences=self.n_sequences + other.n_sequences,
        )

    def pool(self, tau: int) -> Pool:
        """Return the pool of features active on at least ``tau`` calibration tokens.

        Raises:
            CertifyError: If no feature is.
        """
        pool = Pool.from_counts(self.counts, tau)
        if pool.size == 0:
            raise CertifyError(
                f"no feature was active on {tau} or more of the {self.n_tokens} calibration tokens, "
                "so the pool is empty; lower tau, add calibration documents, or check that the SAE "
                "belongs to this hook"
            )
        return pool

    def mean_activations(self) -> Float[Tensor, "2 d_out"]:
        """Return the mean activation over all coded tokens (row 0) and without position 0 (row 1)."""
        total = self.activation_sums.sum(dim=0) / max(1, self.n_tokens)
        later = self.activation_sums[1] / max(1, int(self.activation_tokens[1]))
        return torch.stack([total, later])

    def unigram_bits(self, alpha: float) -> Float[Tensor, " d_vocab"]:
        """Return the loss of each target under a unigram model of the calibration targets.

        The model is add-one smoothed, its probabilities go through the same smoothed loss as the
        language model's, so that its risk is a baseline in the same unit.

        Args:
            alpha: Smoothing weight of the loss.

        Returns:
            Bits per token, float64.
        """
        v = self.target_counts.numel()
        p = (self.target_counts.double() + 1) / (int(self.target_counts.sum()) + v)
        return -torch.log2((1 - alpha) * p + alpha / v)
