"""Does the adapter compute what ``sae.forward`` computes? Asked on real activations, every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.ops import Impl
from saelens_certify.saes.adapter import SAEAdapter
from saelens_certify.saes.copies import float32_copy, working_copy
from saelens_certify.saes.fused import FusedAdapter
from saelens_certify.saes.own import sparse

# Unit of rounding allowed, per dtype of the arithmetic: of a score, relative to |u| |w_j|, and of a
# reconstruction, relative to the sizes that are added up in it (an SAE whose terms cancel loses digits
# in SAELens's own arithmetic, and that is no fault of the adapter).
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}

_MAX_TOKENS = 128
# Ties of scores up to the rounding of float32 are rare; where they are not, something else is wrong.
_MAX_TIES = 0.05


@dataclass(frozen=True)
class SelfCheck:
    """Result of the comparison.

    Attributes:
        n_tokens: Tokens compared.
        n_ties: Tokens on which the two selected different features because scores tie up to rounding;
            on these, the SAE's own selection was decoded and compared.
        max_error: Largest error of a reconstruction, relative to the sizes that are added up in it.
        tolerance: What was allowed.
        rounded_error: Where the SAE is of 16 bits and our operators encode it: the largest error
            against its own 16-bit arithmetic. The others are then against the same weights in float32.
    """

    n_tokens: int
    n_ties: int
    max_error: float
    tolerance: float
    rounded_error: float | None = None


@torch.no_grad()
def self_check(
    sae: Any, adapter: SAEAdapter, activation: Float[Tensor, "batch pos ..."], impl: Impl = "auto"
) -> SelfCheck:
    """Compare ``adapter.reconstruct`` with ``sae.forward``.

    Args:
        sae: The SAELens object; it is left as it was.
        adapter: The adapter made from it.
        activation: Real activations at the input hook, in the hook's own shape.
        impl: Which operators run: those of the measurement.

    Returns:
        How well they agree.

    Raises:
        CertifyError: If they disagree by more than rounding: a certificate would be about another
            function than the SAE.
    """
    dtype = next(sae.parameters()).dtype
    # Rounded once, here: what the SAE would do first, and some of its terms would not take otherwise.
    x = activation.flatten(2).to(device=adapter.device, dtype=dtype)
    few = x[: max(1, _MAX_TOKENS // x.shape[1])]
    _check_independent(adapter, x, impl)
    if dtype in (torch.float64, torch.float32) or not isinstance(adapter, FusedAdapter):
        return _compare(working_copy(sae), adapter, few, _TOLERANCE[dtype], impl)
    # Our operators compute in float32 from weights of 16 bits. So does the SAE when it is taken to
    # float32, where a wrong function cannot hide in the rounding.
    result = _compare(float32_copy(sae), adapter, few.float(), _TOLERANCE[torch.float32], impl)
    rounded = _error(adapter, few, working_copy(sae).forward(few), impl).median()
    if not rounded <= _TOLERANCE[dtype]:
        raise CertifyError(
            f"this SAE in {str(dtype).removeprefix('torch.')} differs from the same weights in float32: "
            f"half of {result.n_tokens} tokens are reconstructed with errors above {float(rounded):.1e} "
            f"of the terms' size (allowed {_TOLERANCE[dtype]:.0e}); load it in float32"
        )
    return SelfCheck(
        result.n_tokens, result.n_ties, result.max_error, result.tolerance, float(rounded)
    )


def _compare(
    sae: Any,
    adapter: SAEAdapter,
    x: Float[Tensor, "batch pos d_in"],
    tolerance: float,
    impl: Impl,
) -> SelfCheck:
    expected = sae.forward(x)
    encoded = sae.encode(x)
    dense = encoded.to_dense() if encoded.is_sparse else encoded
    theirs = dense.reshape(-1, adapter.d_sae).float()
    codes = adapter.encode(x, impl=impl)
    ours = codes.features.to_dense(adapter.d_sae)
    error = _error(adapter, x, expected, impl)
    # With the SAE's own selection, only decoding is left to differ.
    decoded = adapter.decode(sparse(theirs, None), codes.token_map, impl=impl)
    sizes = adapter.added_up(x.reshape(-1, adapter.d_in), codes)
    decoding_error = (decoded - expected.reshape(decoded.shape).float()).norm(dim=-1) / sizes
    suspicious = (~(error <= tolerance)).nonzero().flatten().tolist()
    flat = x.reshape(-1, adapter.d_in)
    for token in suspicious:
        tied = _is_tie(adapter, flat[token : token + 1], ours[token], theirs[token], tolerance)
        if not tied or not decoding_error[token] <= tolerance:
            raise CertifyError(
                f"{_differs(adapter)}: token {token} is reconstructed with error "
                f"{float(error[token]):.2e} (allowed {tolerance:.0e} of the terms' size) and no tie of "
                "scores explains it; the SAE was modified, its forward is more than decode(encode(x)), "
                "or its class differs from the SAELens version this was built for"
            )
    if len(suspicious) > max(1, _MAX_TIES * len(error)):
        raise CertifyError(
            f"{_differs(adapter)}: on {len(suspicious)} of {len(error)} tokens the two select other "
            "features, more than ties of scores can explain"
        )
    error[suspicious] = decoding_error[suspicious]
    return SelfCheck(len(error), len(suspicious), float(error.max()), tolerance)


def _differs(adapter: SAEAdapter) -> str:
    return f"the adapter for {adapter.architecture!r} does not reproduce this SAE"


def _error(
    adapter: SAEAdapter, x: Float[Tensor, "batch pos d_in"], expected: Tensor, impl: Impl
) -> Float[Tensor, " tokens"]:
    """Errors of reconstructions, relative to the sizes that are added up in them."""
    found = adapter.reconstruct(x, impl).reshape(-1, adapter.d_out)
    difference = (found - expected.reshape(found.shape).float()).norm(dim=-1)
    codes = adapter.encode(x, impl=impl)
    return difference / adapter.added_up(x.reshape(-1, adapter.d_in), codes)


def _is_tie(
    adapter: SAEAdapter,
    x: Float[Tensor, "1 d_in"],
    ours: Float[Tensor, " d_sae"],
    theirs: Float[Tensor, " d_sae"],
    margin: float,
) -> bool:
    """Whether the features that only one of the two selected have scores that tie.

    Either each of them is at its threshold, or as many were exchanged for others of the same score.
    """
    only_ours, only_theirs = (ours != 0) & (theirs == 0), (theirs != 0) & (ours == 0)
    differing = (only_ours | only_theirs).nonzero().flatten()
    if len(differing) == 0 or not isinstance(adapter, FusedAdapter):
        return False
    distances, sizes = (values[0] for values in adapter.scores(x, differing))
    allowed = margin * sizes
    if bool((distances.abs() <= allowed).all()):
        return True
    ranked = distances.abs() if adapter.signed else distances
    exchanged = adapter.k is not None and _count(only_ours) == _count(only_theirs)
    return exchanged and bool((ranked.max() - ranked.min()) <= 2 * allowed.max())


def _count(mask: Bool[Tensor, " d_sae"]) -> int:
    return int(mask.sum())


def _check_independent(adapter: SAEAdapter, x: Float[Tensor, "batch pos d_in"], impl: Impl) -> None:
    """Check that a sequence's codes do not depend on what else is in the batch.

    Raises:
        CertifyError: If they do: what is certified would change with the batch size.
    """
    if isinstance(adapter, FusedAdapter):
        return  # tokens are encoded one by one
    x = x[:4, : _MAX_TOKENS // 4]
    together = adapter.encode(x, impl=impl).features.to_dense(adapter.d_sae)
    alone = torch.cat(
        [adapter.encode(one, impl=impl).features.to_dense(adapter.d_sae) for one in x]
    )
    changed = int(((together != 0) != (alone != 0)).any(dim=-1).sum())
    # Rounding of other matrix shapes moves a feature now and then.
    if changed > len(together) // 10:
        raise CertifyError(
            f"the codes of {changed} of {len(together)} tokens depend on which other sequences are in "
            f"the batch, so architecture {adapter.architecture!r} is no function of its input; "
            "certify a form of the SAE that encodes each sequence by itself"
        )
