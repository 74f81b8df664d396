"""From activations at the SAE's hooks to the numbers that are tested, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saelens_certify import ops
from saelens_certify.certificate import Certificate
from saelens_certify.config import Positions
from saelens_certify.errors import CertifyError
from saelens_certify.monitor.reference import sequence_values
from saelens_certify.ops import Impl
from saelens_certify.saes import Coding, SAEAdapter

# Tokens encoded in one call: enough for an efficient matrix product, few enough for little memory.
_ENCODED_TOKENS = 2048


@dataclass(frozen=True)
class Selection:
    """The tokens of one forward that are measured: the first L real ones of some sequences.

    Attributes:
        rows: The sequences, by their place in the batch.
        places: Position in the batch of each kept token; real tokens first.
        real: Which of the kept tokens are real; the rest is padding.
        coded: Which of them the SAE codes.
        complete: Which sequences have L real tokens.
    """

    rows: Int[Tensor, " rows"]
    places: Int[Tensor, "rows pos"]
    real: Bool[Tensor, "rows pos"]
    coded: Bool[Tensor, "rows pos"]
    complete: NDArray[np.bool_]

    def take(self, activation: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "rows pos width"]:
        """Return a copy of the activations of the kept tokens, heads joined."""
        flat = activation.detach().flatten(2)
        rows, places = self.rows.to(flat.device), self.places.to(flat.device)
        return flat[rows[:, None], places]


@dataclass(frozen=True)
class Columns:
    """What was measured on each sequence of a selection.

    Attributes:
        tokens: Coded tokens.
        outside_tokens: Coded tokens with an active feature outside the pool.
        outside: Active features outside the pool.
        active: Active features.
        error: Squared error per token, without the first position.
        power: Squared distance from the calibration mean per token, without the first position.
        broken: Whether an activation was not finite; then the numbers above are 0.
    """

    tokens: NDArray[np.float64]
    outside_tokens: NDArray[np.float64]
    outside: NDArray[np.float64]
    active: NDArray[np.float64]
    error: NDArray[np.float64]
    power: NDArray[np.float64]
    broken: NDArray[np.bool_]

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The tested statistics; a broken sequence has the worst value of each.

        No sequence of the evidence was broken (certification would have stopped), so the reference
        bounds also hold for statistics that count a broken sequence as 1.
        """
        values = sequence_values(
            self.outside_tokens > 0, self.outside, self.active, self.error, self.power
        )
        values[self.broken] = 1.0
        return values


@dataclass(frozen=True)
class Observer:
    """Measures activations as the certificate's evidence was measured.

    Attributes:
        adapter: The SAE.
        pool_bits: The certificate's pool.
        mean: Calibration mean of the activation, without position 0.
        coding: Coding rule.
        positions: Which positions are coded.
        special_ids: Ids of special tokens.
        seq_len: L.
        impl: Which operators run.
    """

    adapter: SAEAdapter
    pool_bits: Int[Tensor, " words"]
    mean: Float[Tensor, " d_out"]
    coding: Coding
    positions: Positions
    special_ids: tuple[int, ...]
    seq_len: int
    impl: Impl

    @classmethod
    def of(cls, certificate: Certificate, adapter: SAEAdapter) -> Observer:
        """Build the observer of a certificate."""
        config = certificate.config
        return cls(
            adapter=adapter,
            pool_bits=certificate.pool.bits(adapter.device),
            mean=certificate.calibration.mean_activations()[1].to(adapter.device),
            coding=Coding.parse(config.coding),
            positions=config.positions,
            special_ids=tuple(certificate.manifest["identity"]["special_ids"]),
            seq_len=config.seq_len,
            impl=config.impl,
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether special tokens inside a sequence are left out, which only token ids tell."""
        return self.positions == "no_bos" and bool(self.special_ids)

    def select(
        self,
        rows: NDArray[np.intp],
        n_positions: int,
        tokens: Int[Tensor, "batch pos"] | None,
        mask: Bool[Tensor, "batch pos"] | None,
    ) -> Selection:
        """Find the first L real tokens of some sequences, and which of them are coded.

        Args:
            rows: The sequences.
            n_positions: Positions of the forward.
            tokens: Token ids, where known: special tokens are then left out as certified.
            mask: Which positions are real; None: all.
        """
        index = torch.from_numpy(rows)
        kept = min(n_positions, self.seq_len)
        if mask is None:
            places = torch.arange(kept, device="cpu").expand(len(rows), kept)
            real = torch.ones(len(rows), kept, dtype=torch.bool, device="cpu")
        else:
            of_rows = mask[index]
            places = (~of_rows).to(torch.int8).sort(dim=1, stable=True).indices[:, :kept]
            real = of_rows.gather(1, places)
        coded = real.clone()
        if self.positions == "no_bos":
            coded[:, 0] = False
            if tokens is not None and self.needs_tokens:
                special = torch.isin(tokens[index], torch.tensor(self.special_ids, device="cpu"))
                coded &= ~special.gather(1, places)
        complete = (real.sum(dim=1) == self.seq_len) & coded.any(dim=1)
        return Selection(index, places, real, coded, complete.numpy())

    def measure(
        self,
        selection: Selection,
        x: Float[Tensor, "rows pos d_in"],
        y: Float[Tensor, "rows pos d_out"],
    ) -> Columns:
        """Encode, decode and compare.

        Args:
            selection: Which tokens these are.
            x: Their activations at the input hook, from `Selection.take`.
            y: Their activations at the output hook.

        Raises:
            CertifyError: If a width is not the SAE's.
        """
        adapter = self.adapter
        for name, given, width in (
            (adapter.input_hook, x, adapter.d_in),
            (adapter.output_hook, y, adapter.d_out),
        ):
            if given.shape[-1] != width:
                raise CertifyError(
                    f"the activation at {name} has width {given.shape[-1]}, the SAE expects {width}"
                )
        group = max(1, _ENCODED_TOKENS // max(1, x.shape[1]))
        parts = [
            self._measure_few(
                selection.coded[i : i + group].to(adapter.device),
                x[i : i + group].to(adapter.device, torch.float32),
                y[i : i + group].to(adapter.device, torch.float32),
            )
            for i in range(0, len(x), group)
        ]
        return Columns(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _measure_few(
        self,
        coded: Bool[Tensor, "rows pos"],
        x: Float[Tensor, "rows pos d_in"],
        y: Float[Tensor, "rows pos d_out"],
    ) -> tuple[NDArray[Any], ...]:
        finite = (x.isfinite().all(dim=-1) & y.isfinite().all(dim=-1)) | ~coded
        broken = ~finite.all(dim=1)
        coded = coded & ~broken[:, None]
        # Padding, and what is broken, must not reach an encoder that looks at whole sequences.
        x = x.nan_to_num(0.0, 0.0, 0.0)
        codes = self.adapter.encode(x, self.coding, coded=coded, impl=self.impl)
        target = y[coded].double()
        decoded = self.adapter.decode(codes.features, codes.token_map, impl=self.impl)
        later = coded.clone()
        later[:, 0] = False
        outside = ops.count_outside(codes.features, self.pool_bits, impl=self.impl)
        sums = [
            _sums(coded, torch.ones_like(outside)),
            _sums(coded, outside > 0),
            _sums(coded, outside),
            _sums(coded, codes.features.counts),
            _means(coded, later, (target - decoded.double()).square().sum(dim=-1)),
            _means(coded, later, (target - self.mean.double()).square().sum(dim=-1)),
        ]
        table = torch.stack([*sums, broken.double()]).cpu().numpy()  # one wait for the device
        return (*table[:-1], table[-1] > 0)


def evidence_values(certificate: Certificate) -> NDArray[np.float64]:
    """Return the tested statistics of the certificate's evaluation sequences."""
    names = ("violation", "outside", "l0", "mse_no_first", "variance_no_first")
    return sequence_values(*(certificate.column(name) for name in names))


def _placed(coded: Bool[Tensor, "rows pos"], values: Tensor) -> Float[Tensor, "rows pos"]:
    out = torch.zeros(coded.shape, dtype=torch.float64, device=coded.device)
    out[coded] = values.double()
    return out


def _sums(coded: Bool[Tensor, "rows pos"], values: Tensor) -> Float[Tensor, " rows"]:
    return _placed(coded, values).sum(dim=1)


def _means(
    coded: Bool[Tensor, "rows pos"], kept: Bool[Tensor, "rows pos"], values: Tensor
) -> Float[Tensor, " rows"]:
    """Mean of per-token values over the kept tokens of each sequence; 0 where there are none."""
    total = (_placed(coded, values) * kept).sum(dim=1)
    return total / kept.sum(dim=1).clamp(min=1)
