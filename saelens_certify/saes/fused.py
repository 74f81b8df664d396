"""SAEs whose encoder is one matrix and an elementwise rule: encoded by our own operators."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops import Impl, SparseCodes
from saelens_certify.saes.adapter import Codes, SAEAdapter, coded_tokens
from saelens_certify.saes.coding import NATIVE, Coding
from saelens_certify.saes.normalize import Mode, TokenMap, normalize


@dataclass(frozen=True, kw_only=True)
class FusedAdapter(SAEAdapter):
    """An SAE as ``x -> normalise -> (x - b) W + bias -> gate -> codes -> decode (+ skip term)``.

    A feature j is active on a token when its score ``(u . w_j + bias_j) * scale_j`` is above
    ``theta_j`` and, with a gate, ``u . w_j + gate_bias_j`` is above 0; of the active ones, at most
    ``k`` with the largest scores are kept.

    Attributes:
        encoder: Encoder rows, ``[d_sae, d_in]``, contiguous.
        encoder_bias: ``[d_sae]``, float32.
        input_bias: Subtracted from the normalised activation before encoding, ``[d_in]``, or None.
        score_scale: Per-feature factor on the score, positive, or None.
        theta: Per-feature threshold, strict, or None for 0.
        gate_bias: Bias of a gated SAE's gate, or None.
        k: The SAE's own top-k, or None.
        signed: Whether features are ranked by size and keep their sign (AbsTopK).
        normalization: Per-token normalisation of the input.
        undo_normalization: Whether decoded features are taken back to the input's scale; not by
            transcoders, whose output is another activation.
        skip: Skip connection from the raw input to the output, or None.
    """

    encoder: Float[Tensor, "d_sae d_in"]
    encoder_bias: Float[Tensor, " d_sae"]
    input_bias: Float[Tensor, " d_in"] | None = None
    score_scale: Float[Tensor, " d_sae"] | None = None
    theta: Float[Tensor, " d_sae"] | None = None
    gate_bias: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    signed: bool = False
    normalization: Mode = "none"
    undo_normalization: bool = True
    skip: Float[Tensor, "d_out d_in"] | None = None

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
    ) -> tuple[Float[Tensor, "tokens d_in"], TokenMap | None]:
        """Normalise and centre activations: what the encoder rows are multiplied with.

        Args:
            x: Activations at the input hook, any float dtype.

        Returns:
            Encoder input in float32, and what turns decoded features into the reconstruction.
        """
        x = x.to(device=self.device, dtype=torch.float32)
        u, undo = normalize(x, self.normalization)
        token_map = undo if self.undo_normalization else None
        if self.skip is not None:
            token_map = TokenMap(shift=x @ self.skip.float().T)
        return (u if self.input_bias is None else u - self.input_bias), token_map

    def encode(
        self,
        x: Float[Tensor, "*batch pos d_in"],
        coding: Coding = NATIVE,
        pool_bits: Int[Tensor, " words"] | None = None,
        *,
        coded: Bool[Tensor, "*batch pos"] | None = None,
        impl: Impl = "auto",
    ) -> Codes:
        """Encode activations; see `SAEAdapter.encode`. Tokens are independent of each other."""
        u, token_map = self.encoder_input(coded_tokens(x, coded))
        k = coding.k if self.k is None else self.k
        if k is None:
            features = ops.threshold_encode(
                u, self.encoder, self.encoder_bias, **self._rule(), impl=impl
            )
            pooled = None if pool_bits is None else ops.restrict(features, pool_bits, impl=impl)
        else:
            rule_is_own = self.k is None or coding.k is None
            features, pooled = self._largest(u, k, pool_bits if rule_is_own else None, impl)
            if not rule_is_own and coding.k is not None:
                if pool_bits is not None:
                    pooled = ops.restrict(features, pool_bits, impl=impl).first(coding.k)
                features = features.first(coding.k)
        return Codes(features, pooled, token_map)

    def added_up(self, x: Float[Tensor, "tokens d_in"], codes: Codes) -> Float[Tensor, " tokens"]:
        """Sum of the sizes that enter each token's reconstruction, scores before cancellation too."""
        u, _ = self.encoder_input(x)
        slots = codes.features.indices.long().clamp_min(0)
        scores = u.norm(dim=-1, keepdim=True) * self.encoder_screen.norms[slots]
        if self.score_scale is not None:
            scores = scores * self.score_scale[slots]
        total = self._decoded_sizes(codes, codes.features.values.abs() + scores)
        if self.skip is not None:
            total = total + x.to(u).norm(dim=-1) * self.skip.float().norm()
        return total

    def scores(
        self, x: Float[Tensor, "tokens d_in"], features: Int[Tensor, " features"]
    ) -> tuple[Float[Tensor, "tokens features"], Float[Tensor, "tokens features"]]:
        """Return some features' distances to their thresholds, and the sizes added up in them.

        Both in float64; distance 0 is where a feature is on the edge of being active by its
        threshold or gate, whichever is nearer.
        """
        u, _ = self.encoder_input(x)
        rows = self.encoder[features].double()
        products = u.double() @ rows.T
        sizes = u.double().norm(dim=-1, keepdim=True) * rows.norm(dim=-1)
        scores = products + self.encoder_bias[features].double()
        if self.score_scale is not None:
            scale = self.score_scale[features].double()
            scores, sizes = scores * scale, sizes * scale
        distances = scores if self.theta is None else scores - self.theta[features].double()
        if self.gate_bias is not None:
            gates = products + self.gate_bias[features].double()
            distances = torch.where(gates.abs() < distances.abs(), gates, distances)
        return distances, sizes

    def _rule(self) -> dict[str, Any]:
        return {
            "scale": self.score_scale,
            "theta": self.theta,
            "gate_bias": self.gate_bias,
            "screen": self.encoder_screen,
        }

    def _largest(
        self,
        u: Float[Tensor, "tokens d_in"],
        k: int,
        pool_bits: Int[Tensor, " words"] | None,
        impl: Impl,
    ) -> tuple[SparseCodes, SparseCodes | None]:
        def largest(u: Tensor, bias: Tensor) -> tuple[SparseCodes, SparseCodes | None]:
            return ops.topk_encode(
                u, self.encoder, bias, k=k, pool_bits=pool_bits, **self._rule(), impl=impl
            )

        positive, positive_pooled = largest(u, self.encoder_bias)
        if not self.signed:
            return positive, positive_pooled
        # -(u . w + bias) is positive where the score is negative: both signs by the same operator.
        negative, negative_pooled = largest(-u, -self.encoder_bias)
        pooled = None
        if positive_pooled is not None and negative_pooled is not None:
            pooled = _by_size(positive_pooled, negative_pooled, k)
        return _by_size(positive, negative, k), pooled


def _by_size(positive: SparseCodes, negative: SparseCodes, k: int) -> SparseCodes:
    """Merge features of both signs: the k of largest size, ties by feature number."""
    values = torch.cat([positive.values, -negative.values], dim=1)
    indices = torch.cat([positive.indices, negative.indices], dim=1)
    by_feature = indices.sort(dim=1, stable=True).indices
    values, indices = values.gather(1, by_feature), indices.gather(1, by_feature)
    # Unused slots have value 0 and no feature has: sorting by size puts them last.
    by_size = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    counts = (positive.counts + negative.counts).clamp(max=k)
    return SparseCodes(
        values.gather(1, by_size).contiguous(), indices.gather(1, by_size).contiguous(), counts
    )
