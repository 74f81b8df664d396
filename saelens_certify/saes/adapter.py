"""One SAE in the form the measurement needs: every architecture becomes one of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops import Impl, SparseCodes
from saelens_certify.saes.coding import NATIVE, Coding
from saelens_certify.saes.normalize import TokenMap


@dataclass(frozen=True)
class Codes:
    """The sparse codes of some tokens, with what turns them back into activations.

    Attributes:
        features: All active features.
        pooled: The active features when features outside the pool are masked before the coding
            rule, or ``None`` when no pool was given.
        token_map: What decoded features of each token are multiplied by and added to; None where
            they are the reconstruction.
    """

    features: SparseCodes
    pooled: SparseCodes | None
    token_map: TokenMap | None

    def select(self, rows: Bool[Tensor, " tokens"]) -> Codes:
        """Codes of some of the tokens."""
        return Codes(
            self.features.select(rows),
            None if self.pooled is None else self.pooled.select(rows),
            None if self.token_map is None else self.token_map.select(rows),
        )


@dataclass(frozen=True, kw_only=True)
class SAEAdapter(ABC):
    """An SAE as ``activation -> codes -> decoded sum -> reconstruction``.

    The reconstruction equals ``sae.forward`` (checked on real activations before any certificate,
    see `selfcheck`). Subclasses say how codes are found.

    Attributes:
        architecture: SAELens's name of the architecture.
        input_hook: Hook whose activation is encoded.
        output_hook: Hook whose activation is replaced by the reconstruction.
        d_in: Width of the activation that is encoded.
        d_sae: Number of features.
        d_out: Width of the activation that is replaced.
        decoder: Effective decoder rows, ``[d_sae, d_out]``, contiguous; None where the SAE's own
            ``decode`` is called.
        decoder_bias: ``[d_out]``, float32, or None for 0.
        config: ``sae.cfg.to_dict()``, for the record.
    """

    architecture: str
    input_hook: str
    output_hook: str
    d_in: int
    d_sae: int
    d_out: int
    decoder: Float[Tensor, "d_sae d_out"] | None
    decoder_bias: Float[Tensor, " d_out"] | None
    config: Mapping[str, Any]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device on which the SAE computes."""

    @abstractmethod
    def encode(
        self,
        x: Float[Tensor, "*batch pos d_in"],
        coding: Coding = NATIVE,
        pool_bits: Int[Tensor, " words"] | None = None,
        *,
        coded: Bool[Tensor, "*batch pos"] | None = None,
        impl: Impl = "auto",
    ) -> Codes:
        """Encode activations of whole sequences.

        Args:
            x: Activations at the input hook, any float dtype; ``[pos, d_in]`` is one sequence.
            coding: The coding rule. ``topk:K`` keeps the K largest of what ``sae.encode`` returns;
                where the SAE has a top-k of its own, features outside the pool have taken part in
                that.
            pool_bits: Pool as a bitmask (`ops.pool_bits`); also encodes with features outside it
                masked before the rule, so that the next in-pool features may enter.
            coded: Tokens whose codes are wanted; None for all. Others may still be read, by SAEs
                that look at whole sequences.
            impl: Which operators run.

        Returns:
            The codes of the wanted tokens, sequence after sequence.

        Raises:
            CertifyError: If an activation is not finite.
        """

    def decode(
        self,
        features: SparseCodes,
        token_map: TokenMap | None,
        decoder: Float[Tensor, "d_sae d_out"] | None = None,
        impl: Impl = "auto",
    ) -> Float[Tensor, "tokens d_out"]:
        """Reconstruct activations from codes.

        Args:
            features: Codes to decode; `Codes.features`, or a restricted or permuted version.
            token_map: `Codes.token_map` of the same tokens.
            decoder: Decoder rows to use instead of the SAE's own (controls).
            impl: Which operators run.

        Returns:
            Reconstructions in float32.
        """
        rows = self.decoder if decoder is None else decoder
        assert rows is not None  # adapters without rows decode in their own way
        decoded, _ = ops.decode(features, rows, self.decoder_bias, impl=impl)
        return decoded if token_map is None else token_map.apply(decoded)

    def permuted_errors(
        self,
        features: SparseCodes,
        token_map: TokenMap | None,
        permutations: Int[Tensor, "n_permutations d_sae"],
        target: Float[Tensor, "tokens d_out"],
        impl: Impl = "auto",
    ) -> Float[Tensor, "n_permutations tokens"]:
        """Squared errors of reconstructions from renamed features, without the reconstructions.

        Args:
            features: `Codes.features`.
            token_map: `Codes.token_map` of the same tokens.
            permutations: Under each, feature ``j`` is decoded as feature ``permutation[j]``.
            target: Activations that the reconstructions should equal, float32.
            impl: Which operators run.

        Returns:
            ``|target - reconstruction|^2`` in float64.
        """
        assert self.decoder is not None
        # In the units of the SAE, where the reconstruction is a plain sum.
        wanted = target if token_map is None else token_map.invert(target)
        stats = ops.decode_permuted_stats(
            features,
            self.decoder,
            permutations.to(self.device),
            wanted,
            self.decoder_bias,
            impl=impl,
        )
        errors = stats[..., 0]
        if token_map is None or token_map.scale is None:
            return errors
        return errors * token_map.scale[:, 0].double().square()

    def reconstruct(
        self, x: Float[Tensor, "*batch pos d_in"], impl: Impl = "auto"
    ) -> Float[Tensor, "*batch pos d_out"]:
        """Return what ``sae.forward(x)`` returns, in float32.

        Args:
            x: Activations at the input hook, heads joined; one token, one sequence or more.
            impl: Which operators run.

        Returns:
            The reconstruction at the output hook.
        """
        codes = self.encode(by_sequence(x), impl=impl)
        decoded = self.decode(codes.features, codes.token_map, impl=impl)
        return decoded.reshape(*x.shape[:-1], self.d_out)

    def added_up(
        self,
        x: Float[Tensor, "tokens d_in"],  # noqa: ARG002 - adapters with an encoder of their own look at it
        codes: Codes,
    ) -> Float[Tensor, " tokens"]:
        """Sum of the sizes that enter each token's reconstruction, the measure of its rounding.

        Args:
            x: Activations of the tokens.
            codes: Their codes.
        """
        return self._decoded_sizes(codes, codes.features.values.abs())

    def _decoded_sizes(
        self, codes: Codes, sizes: Float[Tensor, "tokens slots"]
    ) -> Float[Tensor, " tokens"]:
        features = codes.features
        if self.decoder is not None:
            slots = features.indices.long().clamp_min(0)
            sizes = sizes * self.decoder.float().norm(dim=-1)[slots]
        total = (sizes * features.used()).sum(dim=-1)
        if self.decoder_bias is not None:
            total = total + self.decoder_bias.norm()
        if codes.token_map is not None and codes.token_map.scale is not None:
            total = total * codes.token_map.scale[:, 0]
        if codes.token_map is not None and codes.token_map.shift is not None:
            total = total + codes.token_map.shift.norm(dim=-1)
        return total.clamp_min(1e-30)


def by_sequence(x: Float[Tensor, "... d_in"]) -> Float[Tensor, "batch pos d_in"]:
    """Bring activations to ``[batch, pos, d_in]``; fewer dimensions are one sequence, more are joined."""
    while x.dim() < 3:
        x = x.unsqueeze(0)
    return x.flatten(0, -3)


def coded_tokens(
    x: Float[Tensor, "*batch pos d_in"], coded: Bool[Tensor, "*batch pos"] | None
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of the wanted tokens, sequence after sequence."""
    return x.reshape(-1, x.shape[-1]) if coded is None else x[coded.to(x.device)]
