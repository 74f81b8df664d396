"""One SAE in the form the kernels need: every architecture becomes this one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops import Impl, SparseCodes
from saelens_certify.saes.coding import NATIVE, Coding
from saelens_certify.saes.normalize import Mode, TokenScale, normalize


@dataclass(frozen=True)
class Codes:
    """The sparse codes of some tokens, with what turns them back into activations.

    Attributes:
        features: All active features.
        pooled: The active features when features outside the pool are masked before the coding
            rule, or ``None`` when no pool was given.
        token_scale: What undoes the per-token normalisation.
    """

    features: SparseCodes
    pooled: SparseCodes | None
    token_scale: TokenScale | None


@dataclass(frozen=True)
class SAEAdapter:
    """An SAE as ``x -> normalise -> (x - b) W + bias -> gate -> codes -> decode``.

    A feature j is active on a token when its score ``(u . w_j + bias_j) * scale_j`` is above
    ``theta_j``; of the active ones, at most ``k`` with the largest scores are kept. The reconstruction
    equals ``sae.forward`` (checked on real activations before any certificate, see `selfcheck`).

    Attributes:
        architecture: SAELens's name of the architecture.
        input_hook: Hook whose activation is encoded.
        output_hook: Hook whose activation is replaced by the reconstruction.
        encoder: Encoder rows, ``[d_sae, d_in]``, contiguous.
        encoder_bias: ``[d_sae]``, float32.
        input_bias: Subtracted from the normalised activation before encoding, ``[d_in]``, or None.
        score_scale: Per-feature factor on the score, or None.
        theta: Per-feature threshold, strict, or None for 0.
        k: The SAE's own top-k, or None.
        decoder: Effective decoder rows, ``[d_sae, d_out]``, contiguous.
        decoder_bias: ``[d_out]``, float32.
        normalization: Per-token normalisation of the input.
        config: ``sae.cfg.to_dict()``, for the record.
    """

    architecture: str
    input_hook: str
    output_hook: str
    encoder: Float[Tensor, "d_sae d_in"]
    encoder_bias: Float[Tensor, " d_sae"]
    input_bias: Float[Tensor, " d_in"] | None
    score_scale: Float[Tensor, " d_sae"] | None
    theta: Float[Tensor, " d_sae"] | None
    k: int | None
    decoder: Float[Tensor, "d_sae d_out"]
    decoder_bias: Float[Tensor, " d_out"]
    normalization: Mode
    config: Mapping[str, Any]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activation that is encoded."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the activation that is replaced."""
        return self.decoder.shape[1]

    @property
    def device(self) -> torch.device:
        """Device on which the SAE computes."""
        return self.encoder.device

    @cached_property
    def encoder_screen(self) -> ops.Screen:
        """What screening needs to know about the encoder rows."""
        return ops.prepare_screen(self.encoder)

    def encoder_input(
        self, x: Float[Tensor, "tokens d_in"]
    ) -> tuple[Float[Tensor, "tokens d_in"], TokenScale | None]:
        """Normalise and centre activations: what the encoder rows are multiplied with.

        Args:
            x: Activations at the input hook, any float dtype.

        Returns:
            Encoder input in float32, and what undoes the per-token normalisation.
        """
        u, token_scale = normalize(
            x.to(device=self.device, dtype=torch.float32), self.normalization
        )
        return (u if self.input_bias is None else u - self.input_bias), token_scale

    def encode(
        self,
        x: Float[Tensor, "tokens d_in"],
        coding: Coding = NATIVE,
        pool_bits: Int[Tensor, " words"] | None = None,
        impl: Impl = "auto",
    ) -> Codes:
        """Encode activations.

        Args:
            x: Activations at the input hook, any float dtype.
            coding: The coding rule.
            pool_bits: Pool as a bitmask (`ops.pool_bits`); also encodes with features outside it
                masked before the rule, so that the next in-pool features may enter. The rule
                ``topk:K`` acts on what ``sae.encode`` returns: where the SAE has a top-k of its own,
                features outside the pool have taken part in that.
            impl: Which operators run.

        Returns:
            The codes of the tokens.

        Raises:
            ValueError: If an activation is not finite.
        """
        u, token_scale = self.encoder_input(x)
        k = coding.k if self.k is None else self.k
        shared: dict[str, Any] = {
            "scale": self.score_scale,
            "theta": self.theta,
            "screen": self.encoder_screen,
            "impl": impl,
        }
        if k is None:
            features = ops.threshold_encode(u, self.encoder, self.encoder_bias, **shared)
            pooled = None if pool_bits is None else ops.restrict(features, pool_bits)
        else:
            rule_is_own = self.k is None or coding.k is None
            features, pooled = ops.topk_encode(
                u,
                self.encoder,
                self.encoder_bias,
                k=k,
                pool_bits=pool_bits if rule_is_own else None,
                **shared,
            )
            if not rule_is_own and coding.k is not None:
                if pool_bits is not None:
                    pooled = ops.restrict(features, pool_bits).first(coding.k)
                features = features.first(coding.k)
        return Codes(features, pooled, token_scale)

    def decode(
        self,
        features: SparseCodes,
        token_scale: TokenScale | None,
        decoder: Float[Tensor, "d_sae d_out"] | None = None,
        impl: Impl = "auto",
    ) -> Float[Tensor, "tokens d_out"]:
        """Reconstruct activations from codes.

        Args:
            features: Codes to decode; `Codes.features`, or a restricted or permuted version.
            token_scale: `Codes.token_scale` of the same tokens.
            decoder: Decoder rows to use instead of the SAE's own (controls).
            impl: Which operators run.

        Returns:
            Reconstructions in float32.
        """
        rows = self.decoder if decoder is None else decoder
        x_hat, _ = ops.decode(features, rows, self.decoder_bias, impl=impl)
        return x_hat if token_scale is None else token_scale.undo(x_hat)

    def permuted_errors(
        self,
        features: SparseCodes,
        token_scale: TokenScale | None,
        permutations: Int[Tensor, "n_permutations d_sae"],
        target: Float[Tensor, "tokens d_out"],
        impl: Impl = "auto",
    ) -> Float[Tensor, "n_permutations tokens"]:
        """Squared errors of reconstructions from renamed features, without the reconstructions.

        Args:
            features: `Codes.features`.
            token_scale: `Codes.token_scale` of the same tokens.
            permutations: Under each, feature ``j`` is decoded as feature ``permutation[j]``.
            target: Activations that the reconstructions should equal, float32.
            impl: Which operators run.

        Returns:
            ``|target - reconstruction|^2`` in float64.
        """
        if token_scale is not None:
            # In the units of the SAE, where the reconstruction is a plain sum.
            target = target if token_scale.shift is None else target - token_scale.shift
            target = target / token_scale.scale
        stats = ops.decode_permuted_stats(
            features,
            self.decoder,
            permutations.to(self.device),
            target,
            self.decoder_bias,
            impl=impl,
        )
        errors = stats[..., 0]
        return errors if token_scale is None else errors * token_scale.scale[:, 0].double().square()

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return what ``sae.forward(x)`` returns, in float32.

        Args:
            x: Activations at the input hook.

        Returns:
            The reconstruction at the output hook.
        """
        flat = x.reshape(-1, self.d_in)
        codes = self.encode(flat)
        return self.decode(codes.features, codes.token_scale).reshape(*x.shape[:-1], self.d_out)
