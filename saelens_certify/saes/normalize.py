"""Per-token activation normalisation, with the token's statistics owned by the caller.

SAELens keeps them on the module between ``encode`` and ``decode``; an ablation decodes many codes
for one encode, so here they are returned and passed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_certify.errors import CertifyError

Mode = Literal["none", "layer_norm", "constant_norm_rescale"]

_LAYER_NORM_EPS = 1e-5

_REFUSED = {
    "expected_average_only_in": (
        "SAELens applies no factor at inference, so an unfolded SAE sees activations of the wrong "
        "scale; load it with SAE.from_pretrained (which folds the factor) or call "
        "sae.fold_activation_norm_scaling_factor(factor)"
    ),
    "covariance_whitening": (
        "SAELens applies no whitening at inference; fold it with sae.fold_activation_whitening(...) "
        "before certifying"
    ),
}


@dataclass(frozen=True)
class TokenMap:
    """What turns the decoded features of each token into its reconstruction.

    ``x_hat = decoded * scale + shift``: undoes the normalisation, and adds what reaches the output
    beside the features (the skip term of a transcoder, the part predicted from context).

    Attributes:
        scale: Factor of each token, or None for 1.
        shift: Added to each token, or None for 0.
    """

    scale: Float[Tensor, "tokens 1"] | None = None
    shift: Float[Tensor, "tokens 1"] | Float[Tensor, "tokens d_out"] | None = None

    def apply(self, decoded: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens d_out"]:
        """Map decoded features to the units of the activation."""
        out = decoded if self.scale is None else decoded * self.scale
        return out if self.shift is None else out + self.shift

    def invert(self, x: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens d_out"]:
        """Return what decoded features would have to be for the reconstruction to be ``x``."""
        out = x if self.shift is None else x - self.shift
        return out if self.scale is None else out / self.scale

    def select(self, rows: Bool[Tensor, " tokens"]) -> TokenMap:
        """Keep the maps of some tokens."""
        parts = (None if part is None else part[rows] for part in (self.scale, self.shift))
        return TokenMap(*parts)

    @staticmethod
    def cat(parts: Sequence[TokenMap | None]) -> TokenMap | None:
        """Join the maps of consecutive tokens; all of them have the same terms."""
        maps = [part for part in parts if part is not None]
        if not maps:
            return None
        scales = [part.scale for part in maps if part.scale is not None]
        shifts = [part.shift for part in maps if part.shift is not None]
        return TokenMap(
            torch.cat(scales) if scales else None, torch.cat(shifts) if shifts else None
        )


def normalize(
    x: Float[Tensor, "tokens d_in"], mode: Mode
) -> tuple[Float[Tensor, "tokens d_in"], TokenMap | None]:
    """Normalise each token as SAELens does for ``mode``.

    Args:
        x: Activations in float32.
        mode: A value accepted by `check_mode`.

    Returns:
        The normalised activations, and what undoes it (``None`` for mode ``"none"``).
    """
    if mode == "none":
        return x, None
    if mode == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = centred.std(dim=-1, keepdim=True)
        return centred / (std + _LAYER_NORM_EPS), TokenMap(scale=std, shift=mean)
    norm = x.norm(dim=-1, keepdim=True)
    root_d = x.shape[-1] ** 0.5
    return x * (root_d / norm), TokenMap(scale=norm / root_d, shift=None)


def check_mode(mode: str) -> Mode:
    """Return ``mode`` if it can be certified.

    Raises:
        CertifyError: For modes that SAELens leaves out at inference, and for unknown ones.
    """
    if mode in ("none", "layer_norm", "constant_norm_rescale"):
        return mode
    reason = _REFUSED.get(mode, "this version does not know it")
    raise CertifyError(f"the SAE's normalize_activations is {mode!r}: {reason}")
