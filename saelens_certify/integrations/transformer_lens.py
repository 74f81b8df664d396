"""Proxies of an SAE as hooks for any TransformerLens model: what a certificate measures, to look at."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.controls import CONTROL
from saelens_certify.errors import CertifyError
from saelens_certify.forward import check_hook, resolve_hook
from saelens_certify.identity import check_sae
from saelens_certify.ops import Impl
from saelens_certify.pool import Pool
from saelens_certify.positions import coded_positions, special_token_ids
from saelens_certify.proxies import (
    Variant,
    all_features,
    matched,
    permuted,
    pool_restricted,
    random_decoder,
)
from saelens_certify.saes import Coding, SAEAdapter, adapt
from saelens_certify.saes.loading import open_sae

Hook = tuple[str, Callable[..., Tensor | None]]


def proxy_hooks(
    sae: Any,
    variant: str | Variant = "sae",
    pool: Any = None,
    *,
    model: Any = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    coding: str | None = None,
    coded: Bool[Tensor, "batch pos"] | None = None,
    seed: int | None = None,
    impl: Impl = "auto",
) -> list[Hook]:
    """Return ``fwd_hooks`` that put a proxy in place of the activation that an SAE explains.

    For any ``run_with_hooks`` of a HookedTransformer or a TransformerBridge. Unlike SAELens's own
    splice, skip terms are part of the reconstruction, and a transcoder whose input hook did not fire
    is an error. With a certificate as ``pool`` these are the very proxies that it is about. The hooks may
    be used in several threads and any number of times; no gradient flows through them.

    Args:
        sae: A SAELens SAE (or how to load it), or its adapter. It is not changed.
        variant: ``"sae"``: S∘M, all features. ``"pool"``: h_G, features outside the pool masked.
            ``"permuted_R"``: the R-th feature permutation of the seed. ``"matched_R"``: the R-th
            within deciles of frequency, of a certificate. ``"random_decoder_R"``: random
            directions of the rows' norms. Or a `Variant`.
        pool: The concept pool of ``"pool"``: a `Certificate` of this SAE, a `Pool`, or a boolean mask over
            features.
        model: The model that will run. Checks that it has the hooks, and names them as it knows
            them: a SAETransformerBridge leaves hooks on TransformerLens's older names out without a word.
        tokens: The token ids that will run; needed with ``model`` where a certificate has
            ``positions="no_bos"`` and ``coded`` is not given.
        coding: Coding rule, as in `CertifyConfig`; None: the certificate's, or ``"native"``.
        coded: Positions that the proxy replaces; None: those of the certificate, or all.
        seed: Seed of permutations and random decoders; None: the certificate's, or 0.
        impl: Which operators run.

    Returns:
        One hook, or two where the SAE reads and writes at different places.

    Raises:
        CertifyError: If the variant is unknown, a pool is missing or of another SAE, or the model
            has no such hook.
    """
    if isinstance(sae, (str, Path)):
        sae = open_sae(sae).sae
    adapter = sae if isinstance(sae, SAEAdapter) else adapt(sae)
    config = CertifyConfig()
    if isinstance(pool, Certificate):
        config = pool.config
        if not isinstance(sae, SAEAdapter):
            check_sae(pool, sae, adapter)
    config = dataclasses.replace(
        config,
        coding=config.coding if coding is None else coding,
        seed=config.seed if seed is None else seed,
    )
    if model is not None and not hasattr(model, "hook_dict"):
        raise CertifyError(
            f"model is a {type(model).__name__}; pass a HookedTransformer or a TransformerBridge"
        )
    if coded is None and config.positions != "all":
        if tokens is None or model is None:
            raise CertifyError(
                f"the certificate has positions={config.positions!r}; pass tokens= and model=, so that the "
                "same positions are left alone, or coded="
            )
        coded = coded_positions(tokens, config.positions, special_token_ids(model))
    splice = _Splice(
        adapter,
        _variant(adapter, variant, config.seed, pool),
        _pool_of(pool, adapter),
        Coding.parse(config.coding),
        coded,
        impl,
    )
    if splice.pool is None and splice.variant.only_violations:
        raise CertifyError(
            "variant 'pool' needs pool=, the features that may be used; pass a certificate, a Pool or a "
            "boolean mask over features"
        )
    hooks: list[Hook] = [(adapter.output_hook, splice.replace)]
    if adapter.input_hook == adapter.output_hook:
        hooks = [(adapter.output_hook, splice.replace_itself)]
    else:
        hooks.insert(0, (adapter.input_hook, splice.note_input))
    if model is None:
        return hooks
    for name, _ in hooks:
        check_hook(model, name)
    return [(resolve_hook(model, name), function) for name, function in hooks]


class _Splice:
    """The hook functions of one proxy."""

    def __init__(
        self,
        adapter: SAEAdapter,
        variant: Variant,
        pool: Pool | None,
        coding: Coding,
        coded: Bool[Tensor, "batch pos"] | None,
        impl: Impl,
    ) -> None:
        self.adapter, self.variant, self.pool = adapter, variant, pool
        self.coding, self.coded = coding, coded
        self.impl: Impl = impl
        self._input = threading.local()  # between the two hooks of a transcoder

    def replace_itself(self, activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG002 - TL's signature
        return self._spliced(activation, activation)

    def note_input(self, activation: Tensor, hook: Any) -> None:  # noqa: ARG002 - TL's signature
        self._input.value = activation

    def replace(self, activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG002 - TL's signature
        x = self._input.__dict__.pop("value", None)
        if x is None:
            raise CertifyError(
                f"hook {self.adapter.input_hook!r}, which the transcoder reads, did not fire before "
                f"{self.adapter.output_hook!r}; some hooks are off by default (e.g. hook_mlp_in needs "
                "model.set_use_hook_mlp_in(True))"
            )
        return self._spliced(x, activation)

    def _spliced(
        self, x: Float[Tensor, "batch pos ..."], activation: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "batch pos ..."]:
        adapter = self.adapter
        coded = self.coded
        if coded is None:
            coded = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
        if coded.dtype != torch.bool or coded.shape != activation.shape[:2]:
            raise CertifyError(
                f"coded is a {coded.dtype} tensor of shape {tuple(coded.shape)}; the activation at "
                f"{adapter.output_hook} needs a boolean one of {tuple(activation.shape[:2])} sequences "
                "and positions"
            )
        width = x.flatten(2).shape[2]
        if width != adapter.d_in:
            raise CertifyError(
                f"the activation at {adapter.input_hook} has width {width}, the SAE expects "
                f"{adapter.d_in}; it belongs to another hook or another model"
            )
        x_hat = self._proxy(x.flatten(2), coded.to(adapter.device))
        spliced = activation.flatten(2).clone()
        spliced[coded.to(spliced.device)] = x_hat.to(spliced)
        return spliced.reshape(activation.shape)

    @torch.no_grad()
    def _proxy(
        self, x: Float[Tensor, "batch pos d_in"], coded: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "coded d_out"]:
        bits = None if self.pool is None else self.pool.bits(self.adapter.device)
        codes = self.adapter.encode(x, self.coding, bits, coded=coded, impl=self.impl)
        features = self.variant.rewrite(codes)
        return self.adapter.decode(features, codes.token_map, self.variant.decoder, impl=self.impl)


def _variant(adapter: SAEAdapter, variant: str | Variant, seed: int, pool: Any) -> Variant:
    if isinstance(variant, Variant):
        return variant
    if variant == "sae":
        return all_features()
    if variant == "pool":
        return pool_restricted()
    control = CONTROL.fullmatch(str(variant))
    if control is None:
        raise CertifyError(
            f"unknown variant {variant!r}; use 'sae', 'pool', 'permuted_0' (1, 2, ...), 'matched_0', "
            "'random_decoder_0' or a Variant"
        )
    kind, index = control.group(1), int(control.group(2))
    if kind == "random_decoder":
        return random_decoder(adapter, seed, index)
    if kind == "permuted":
        return permuted(adapter.d_sae, seed, index)
    if not isinstance(pool, Certificate):
        raise CertifyError(
            f"variant {variant!r} needs pool=, a certificate: its calibration says how frequent each "
            "feature is"
        )
    return matched(pool.calibration.counts, seed, index)


def _pool_of(pool: Any, adapter: SAEAdapter) -> Pool | None:
    if isinstance(pool, Certificate):
        pool = pool.pool
    if pool is None:
        return None
    if isinstance(pool, np.ndarray):
        pool = torch.from_numpy(pool)
    if isinstance(pool, Tensor) and pool.dtype == torch.bool:
        pool = Pool(pool.cpu())
    if not isinstance(pool, Pool):
        what = f"{pool.dtype} tensor" if isinstance(pool, Tensor) else type(pool).__name__
        raise CertifyError(
            f"pool is a {what}; pass a certificate, a Pool or a boolean mask over features"
        )
    if pool.mask.shape != (adapter.d_sae,):
        raise CertifyError(
            f"the pool has {tuple(pool.mask.shape)} entries, the SAE {adapter.d_sae} features; it was "
            "made for another SAE"
        )
    return pool
