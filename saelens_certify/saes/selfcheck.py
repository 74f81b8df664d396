"""Does the adapter compute what ``sae.forward`` computes? Asked on real activations, every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.adapter import SAEAdapter
from saelens_certify.saes.borrowed import borrowed
from saelens_certify.saes.fused import FusedAdapter

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


@torch.no_grad()
def self_check(
    sae: Any, adapter: SAEAdapter, activation: Float[Tensor, "batch pos ..."]
) -> SelfCheck:
    """Compare ``adapter.reconstruct`` with ``sae.forward``.

    Args:
        sae: The SAELens object; it is left as it was.
        adapter: The adapter made from it.
        activation: Real activations at the input hook, in the hook's own shape.

    Returns:
        How well they agree.

    Raises:
        CertifyError: If they disagree by more than rounding: a certificate would be about another
            function than the SAE.
    """
    n = max(1, _MAX_TOKENS // activation.shape[1])
    dtype = next(sae.parameters()).dtype
    # Rounded once, here: what the SAE would do first, and some of its terms would not take otherwise.
    x = activation[:n].flatten(2).to(device=adapter.device, dtype=dtype)
    with borrowed(sae, flat_heads=True):
        expected = sae.forward(x).reshape(-1, adapter.d_out).float()
        theirs = sae.encode(x)
    found = adapter.reconstruct(x).reshape(-1, adapter.d_out)
    flat = x.reshape(-1, adapter.d_in)
    codes = adapter.encode(x)
    error = (found - expected).norm(dim=-1) / adapter.added_up(flat, codes)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.float32])
    suspicious = (~(error <= tolerance)).nonzero().flatten().tolist()
    dense = (theirs.to_dense() if theirs.is_sparse else theirs).reshape(-1, adapter.d_sae)
    for token in suspicious:
        ours = codes.features[token : token + 1].to_dense(adapter.d_sae)[0]
        differing = ((dense[token] != 0) != (ours != 0)).nonzero().flatten()
        if not _is_tie(adapter, flat[token : token + 1], differing, tolerance):
            raise CertifyError(
                f"the adapter for {adapter.architecture!r} does not reproduce this SAE: token "
                f"{token} is reconstructed with error {float(error[token]):.2e} (allowed "
                f"{tolerance:.0e} of the terms' size) and no tie of scores explains it; the SAE was "
                "modified, its forward is more than decode(encode(x)), or its class differs from the "
                "SAELens version this was built for"
            )
    _check_independent(adapter, x)
    agreeing = torch.ones(len(error), dtype=torch.bool, device=error.device)
    agreeing[suspicious] = False
    worst = float(error[agreeing].max()) if bool(agreeing.any()) else 0.0
    return SelfCheck(len(error), len(suspicious), worst, tolerance)


def _is_tie(
    adapter: SAEAdapter, x: Float[Tensor, "1 d_in"], differing: Tensor, margin: float
) -> bool:
    """Whether the features that only one of the two selected have scores that tie."""
    if len(differing) == 0 or not isinstance(adapter, FusedAdapter):
        return False
    distances, sizes = (values[0] for values in adapter.scores(x, differing))
    allowed = margin * sizes
    at_threshold = bool((distances.abs() <= allowed).all())
    ranked = distances.abs() if adapter.signed else distances
    among_themselves = bool((ranked.max() - ranked.min()) <= 2 * allowed.max())
    return at_threshold or among_themselves


def _check_independent(adapter: SAEAdapter, x: Float[Tensor, "batch pos d_in"]) -> None:
    """Check that a sequence's codes do not depend on what else is in the batch.

    Raises:
        CertifyError: If they do: what is certified would change with the batch size.
    """
    if isinstance(adapter, FusedAdapter):
        return  # tokens are encoded one by one
    together = adapter.encode(x).features.to_dense(adapter.d_sae)
    alone = torch.cat([adapter.encode(one).features.to_dense(adapter.d_sae) for one in x])
    changed = int(((together != 0) != (alone != 0)).any(dim=-1).sum())
    # Rounding of other matrix shapes moves a feature now and then.
    if changed > len(together) // 10:
        raise CertifyError(
            f"the codes of {changed} of {len(together)} tokens depend on which other sequences are in "
            f"the batch, so architecture {adapter.architecture!r} is no function of its input; "
            "certify a form of the SAE that encodes each sequence by itself"
        )
