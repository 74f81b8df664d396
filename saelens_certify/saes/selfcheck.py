"""Does the adapter compute what ``sae.forward`` computes? Asked on real activations, every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.adapter import SAEAdapter
from saelens_certify.saes.coding import NATIVE

# Unit of rounding allowed, per dtype of the SAE: of a score, relative to |u| |w_j|, and of a
# reconstruction, relative to the sizes that are added up in it (an SAE whose terms cancel loses digits
# in SAELens's own arithmetic, and that is no fault of the adapter).
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}

_MAX_TOKENS = 128


@dataclass(frozen=True)
class SelfCheck:
    """Result of the comparison.

    Attributes:
        n_tokens: Tokens compared.
        n_ties: Tokens on which the two selected different features because scores tie up to the
            rounding of the SAE's dtype.
        max_error: Largest error of a reconstruction, relative to the sizes that are added up in it,
            ties left out.
        tolerance: What was allowed.
    """

    n_tokens: int
    n_ties: int
    max_error: float
    tolerance: float


@torch.inference_mode()
def self_check(
    sae: Any, adapter: SAEAdapter, activation: Float[Tensor, "batch pos ..."]
) -> SelfCheck:
    """Compare ``adapter.reconstruct`` with ``sae.forward``.

    Args:
        sae: The SAELens object.
        adapter: The adapter made from it.
        activation: Real activations at the input hook, in the hook's own shape.

    Returns:
        How well they agree.

    Raises:
        CertifyError: If they disagree by more than rounding: a certificate would be about another
            function than the SAE.
    """
    per_sequence = activation.shape[1]
    activation = activation[: max(1, _MAX_TOKENS // per_sequence)].to(adapter.device)
    if sae.cfg.reshape_activations == "none":
        activation = activation.flatten(2)  # an SAE on flat heads, at a hook that has them apart
    x = activation.reshape(-1, adapter.d_in).float()
    expected = sae.forward(activation).reshape(-1, adapter.d_out).float()
    found = adapter.reconstruct(x)
    error = (found - expected).norm(dim=-1) / _added_up(adapter, x)
    tolerance = _TOLERANCE.get(sae.W_dec.dtype, _TOLERANCE[torch.float32])
    suspicious = (~(error <= tolerance)).nonzero().flatten().tolist()
    for token in suspicious:
        if not _is_tie(sae, adapter, activation, x, token, tolerance):
            raise CertifyError(
                f"the adapter for {adapter.architecture!r} does not reproduce this SAE: token "
                f"{token} is reconstructed with error {float(error[token]):.2e} (allowed "
                f"{tolerance:.0e} of the terms' size) and no tie of scores explains it; the SAE was modified or its class "
                "differs from the SAELens version this was built for"
            )
    agreeing = torch.ones(len(error), dtype=torch.bool, device=error.device)
    agreeing[suspicious] = False
    worst = float(error[agreeing].max()) if bool(agreeing.any()) else 0.0
    return SelfCheck(len(error), len(suspicious), worst, tolerance)


def _added_up(adapter: SAEAdapter, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " tokens"]:
    """Sum of the sizes that enter each token's reconstruction, scores before cancellation included."""
    codes = adapter.encode(x, NATIVE)
    slots = codes.features.indices.long().clamp_min(0)
    used = codes.features.values != 0
    decoder_norms = adapter.decoder.float().norm(dim=-1)
    u, _ = adapter.encoder_input(x)
    scores = u.norm(dim=-1, keepdim=True) * adapter.encoder_screen.norms[slots]
    if adapter.score_scale is not None:
        scores = scores * adapter.score_scale[slots]
    sizes = (codes.features.values.abs() + scores) * decoder_norms[slots] * used
    total = sizes.sum(dim=-1) + adapter.decoder_bias.norm()
    if codes.token_scale is not None:
        total = total * codes.token_scale.scale[:, 0]
    return total.clamp_min(1e-30)


def _is_tie(
    sae: Any, adapter: SAEAdapter, activation: Tensor, x: Tensor, token: int, margin: float
) -> bool:
    """Whether the features that only one of the two selected have scores that tie."""
    sequence = token // activation.shape[1]
    theirs = sae.encode(activation[sequence : sequence + 1]).reshape(-1, adapter.d_sae)
    theirs = theirs[token % activation.shape[1]] != 0
    codes = adapter.encode(x[token : token + 1], NATIVE).features
    ours = torch.zeros_like(theirs)
    ours[codes.indices[0, : int(codes.counts[0])].long()] = True
    differing = (theirs != ours).nonzero().flatten()
    if len(differing) == 0:
        return False
    u, _ = adapter.encoder_input(x[token : token + 1])
    rows = adapter.encoder[differing].double()
    scores = rows @ u[0].double() + adapter.encoder_bias[differing].double()
    allowed = margin * u.double().norm() * rows.norm(dim=-1)
    if adapter.score_scale is not None:
        scores, allowed = (v * adapter.score_scale[differing].double() for v in (scores, allowed))
    theta = 0.0 if adapter.theta is None else adapter.theta[differing].double()
    at_threshold = (scores - theta).abs() <= allowed
    among_themselves = (scores.max() - scores.min()) <= 2 * allowed.max()
    return bool(at_threshold.all()) or bool(among_themselves)
