"""SAEs that are encoded by their own code, whole sequences at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify import ops
from saelens_certify.errors import CertifyError
from saelens_certify.ops import Impl, SparseCodes
from saelens_certify.saes.adapter import Codes, SAEAdapter, by_sequence
from saelens_certify.saes.coding import NATIVE, Coding
from saelens_certify.saes.normalize import TokenMap

# Dense activations that are alive at a time, in numbers: 64 MiB of float32.
_DENSE_LIMIT = 2**24

DenseCodes = tuple[Float[Tensor, "batch pos d_sae"], TokenMap | None]


@dataclass(frozen=True, kw_only=True)
class OwnEncoderAdapter(SAEAdapter):
    """An SAE whose codes come from its own code and whose decoder is a matrix.

    Features outside a pool are dropped from what the SAE encodes; its own selection is not run
    again without them.

    Attributes:
        sae: A `working_copy` of the SAELens object.
        dense: Encodes whole sequences with it: dense activations, and what turns the decoded features
            of each token into the reconstruction.
        lock: Its methods keep state on it, so one thread at a time calls them.
    """

    sae: Any
    dense: Callable[[Any, Float[Tensor, "batch pos d_in"]], DenseCodes]
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Device on which the SAE computes."""
        return next(self.sae.parameters()).device

    def encode(
        self,
        x: Float[Tensor, "*batch pos d_in"],
        coding: Coding = NATIVE,
        pool_bits: Int[Tensor, " words"] | None = None,
        *,
        coded: Bool[Tensor, "*batch pos"] | None = None,
        impl: Impl = "auto",
    ) -> Codes:
        """Encode activations of whole sequences; see `SAEAdapter.encode`."""
        x = by_sequence(x).to(self.device)
        if not bool(x.isfinite().all()):
            raise CertifyError(
                f"the activation at {self.input_hook} holds NaN or infinity; the model overflows in "
                "its dtype, or the input is damaged"
            )
        if coded is None:
            coded = torch.ones(x.shape[:2], dtype=torch.bool, device=self.device)
        coded = coded.to(self.device).reshape(x.shape[:2])
        together = max(1, _DENSE_LIMIT // (x.shape[1] * self.d_sae))
        parts = [
            self._encode_few(x[i : i + together], coded[i : i + together], coding, pool_bits, impl)
            for i in range(0, len(x), together)
        ]
        return Codes(
            SparseCodes.cat([part.features for part in parts]),
            SparseCodes.cat([part.pooled for part in parts if part.pooled is not None])
            if pool_bits is not None
            else None,
            TokenMap.cat([part.token_map for part in parts]),
        )

    def _encode_few(
        self,
        x: Float[Tensor, "batch pos d_in"],
        coded: Bool[Tensor, "batch pos"],
        coding: Coding,
        pool_bits: Int[Tensor, " words"] | None,
        impl: Impl,
    ) -> Codes:
        with self.lock, torch.no_grad():
            dense, token_map = self.dense(self.sae, x)
        dense = dense.to_dense() if dense.is_sparse else dense
        wanted = dense.reshape(*coded.shape, self.d_sae)[coded].float()
        features = sparse(wanted, coding.k)
        pooled = None
        if pool_bits is not None:
            everything = features if coding.k is None else sparse(wanted, None)
            pooled = ops.restrict(everything, pool_bits, impl=impl)
            if coding.k is not None:
                pooled = sparse(pooled.to_dense(self.d_sae), coding.k)
        rows = coded.flatten()
        return Codes(features, pooled, None if token_map is None else token_map.select(rows))


@dataclass(frozen=True, kw_only=True)
class OwnCodecAdapter(OwnEncoderAdapter):
    """An SAE of unknown architecture: its own ``encode`` and ``decode``, and nothing else of it.

    ``decoder`` holds ``W_dec`` for its norms only, if there is one.
    """

    def decode(
        self,
        features: SparseCodes,
        token_map: TokenMap | None,
        decoder: Float[Tensor, "d_sae d_out"] | None = None,
        impl: Impl = "auto",
    ) -> Float[Tensor, "tokens d_out"]:
        """Reconstruct activations by ``sae.decode``; see `SAEAdapter.decode`."""
        if decoder is None:
            return self._own_decode(features.to_dense(self.d_sae), token_map)
        # Other rows in place of the SAE's: what is left of it without features, plus their sum.
        none = features.values.new_zeros(features.n_tokens, self.d_sae)
        decoded, _ = ops.decode(features, decoder, None, impl=impl)
        if token_map is not None and token_map.scale is not None:
            decoded = decoded * token_map.scale
        return self._own_decode(none, token_map) + decoded

    def permuted_errors(
        self,
        features: SparseCodes,
        token_map: TokenMap | None,
        permutations: Int[Tensor, "n_permutations d_sae"],
        target: Float[Tensor, "tokens d_out"],
        impl: Impl = "auto",
    ) -> Float[Tensor, "n_permutations tokens"]:
        """Squared errors of reconstructions from renamed features; see `SAEAdapter.permuted_errors`."""
        errors = [
            (target - self.decode(features.map_indices(one), token_map, impl=impl)).double()
            for one in permutations
        ]
        if not errors:
            return torch.empty(0, features.n_tokens, dtype=torch.float64, device=features.device)
        return torch.stack([error.square().sum(dim=-1) for error in errors])

    def _own_decode(
        self, dense: Float[Tensor, "tokens d_sae"], token_map: TokenMap | None
    ) -> Float[Tensor, "tokens d_out"]:
        sae = self.sae
        dtype = next(sae.parameters()).dtype
        with self.lock, torch.no_grad():
            if token_map is not None and token_map.scale is not None:
                # What SAELens's decode reads from the module to undo the normalisation.
                sae.x_norm_coeff = 1 / token_map.scale.to(dtype)
                sae.ln_std = token_map.scale.to(dtype)
                sae.ln_mu = None if token_map.shift is None else token_map.shift.to(dtype)
            return sae.decode(dense.to(dtype)).reshape(len(dense), self.d_out).float()


def sparse(dense: Float[Tensor, "tokens d_sae"], k: int | None) -> SparseCodes:
    """Take the active features out of dense activations.

    Args:
        dense: Activations; active means other than zero.
        k: Keep the k of largest size, ties by feature number; None keeps all, by feature number.

    Returns:
        The codes.
    """
    active = dense != 0
    counts = active.sum(dim=1)
    if k is not None:
        counts = counts.clamp(max=k)
        order = dense.abs().sort(dim=1, descending=True, stable=True).indices
    else:
        order = active.int().sort(dim=1, descending=True, stable=True).indices
    slots = int(counts.max()) if len(counts) else 0
    indices = order[:, :slots]
    used = torch.arange(slots, device=dense.device) < counts[:, None]
    values = dense.gather(1, indices) * used
    return SparseCodes(
        values.float().contiguous(),
        torch.where(used, indices, -1).int().contiguous(),
        counts.int(),
    )
