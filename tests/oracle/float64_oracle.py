"""The slow, independent oracle behind the tests: every number of a certificate in float64.

Whole hooked forwards of a float64 copy of a HookedTransformer, dense features, a dense stable sort
for every top-k, dense decode and a full softmax. It shares no code with the engine and calls neither
``sae.encode`` nor ``sae.forward``: SAE parameters are read and the arithmetic is written out
(``oracle_sae.py``), so that an error in either shows up as a difference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .oracle_sae import F64, OracleSAE, code

# ------------------------------------------------------------------------------------- the model


def float64_copy(model: Any) -> Any:
    """Return a float64 copy of a HookedTransformer (tables such as rotary ones keep their values)."""
    exact: Any = copy.deepcopy(model)
    torch.nn.Module.double(exact)
    exact.cfg.dtype = F64
    return exact.eval()


def smoothed_loss_bits(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], alpha: float
) -> Float[Tensor, " batch"]:
    """Return each sequence's mean of -log2((1 - alpha) p(target) + alpha / V) over its L - 1 targets."""
    gold = _gold(logits.softmax(-1), tokens)
    return -torch.log2((1.0 - alpha) * gold + alpha / logits.shape[-1]).mean(-1)


def _gold(
    values: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch targets"]:
    return values[:, :-1].gather(-1, tokens[:, 1:, None].long()).squeeze(-1)


def _coded_positions(length: int, positions: str) -> Bool[Tensor, " pos"]:
    if positions not in ("all", "no_bos"):
        raise ValueError(f"unknown positions {positions!r}: all or no_bos")
    coded = torch.ones(length, dtype=torch.bool)
    coded[0] = positions == "all"
    return coded


# ----------------------------------------------------------------------------- calibrate, evaluate


@dataclass(frozen=True)
class OracleCalibration:
    """What calibration sees."""

    counts: Int[Tensor, " d_sae"]
    """Number of coded tokens in which each feature is active."""
    gap: Float[Tensor, "sequences pos"]
    """Per token: the smallest gap around a selection decision (NaN where not coded)."""

    def pool(self, tau: int = 1) -> Bool[Tensor, " d_sae"]:
        """Return the features active on at least ``tau`` calibration tokens."""
        return self.counts >= tau


@dataclass(frozen=True)
class OracleProxy:
    """One proxy beside the model: one entry a sequence."""

    loss: Float[Tensor, " sequences"]
    kl: Float[Tensor, " sequences"]
    """KL(M || proxy) in bits, mean over the L - 1 predicting positions."""
    top1_agreement: Float[Tensor, " sequences"]
    gold_logprob_gap: Float[Tensor, " sequences"]
    """Mean over targets of |log2 p_M - log2 p_proxy|."""
    squared_error: Float[Tensor, "sequences pos"]
    """|y - ŷ|² per token (NaN where not coded), y being the activation that is replaced."""

    @property
    def mse(self) -> Float[Tensor, " sequences"]:
        """Mean over coded tokens of the summed squared error."""
        return self.squared_error.nanmean(-1)

    @property
    def mse_no_first(self) -> Float[Tensor, " sequences"]:
        """The same without position 0."""
        return self.squared_error[:, 1:].nanmean(-1)


@dataclass(frozen=True)
class OracleEvaluation:
    """Evidence: one entry a sequence, and per-token detail."""

    loss_base: Float[Tensor, " sequences"]
    sae: OracleProxy
    """S∘M: all features."""
    pool: OracleProxy
    """h_G: features outside the pool are masked."""
    controls: dict[str, OracleProxy]
    violation: Bool[Tensor, " sequences"]
    l0: Float[Tensor, " sequences"]
    """Active features a coded token, mean."""
    active: Int[Tensor, "sequences pos"]
    """Active features per token (0 where not coded)."""
    outside: Int[Tensor, "sequences pos"]
    """Active features outside the pool per token."""
    gap: Float[Tensor, "sequences pos"]
    """Smallest gap around a selection decision of S∘M per token (NaN where not coded)."""
    gap_pool: Float[Tensor, "sequences pos"]
    """The same for h_G."""

    @property
    def loss_sae(self) -> Float[Tensor, " sequences"]:
        """Loss of S∘M."""
        return self.sae.loss

    @property
    def loss_pool(self) -> Float[Tensor, " sequences"]:
        """Loss of h_G."""
        return self.pool.loss

    @property
    def kl(self) -> Float[Tensor, " sequences"]:
        """KL(M || S∘M) in bits."""
        return self.sae.kl

    @property
    def top1_agreement(self) -> Float[Tensor, " sequences"]:
        """Share of predictions whose most likely token is the model's, under S∘M."""
        return self.sae.top1_agreement

    @property
    def gold_logprob_gap(self) -> Float[Tensor, " sequences"]:
        """Mean over targets of |log2 p_M - log2 p_S∘M|."""
        return self.sae.gold_logprob_gap

    @property
    def squared_error(self) -> Float[Tensor, "sequences pos"]:
        """|y - ŷ|² per token under S∘M."""
        return self.sae.squared_error

    @property
    def mse(self) -> Float[Tensor, " sequences"]:
        """Mean over coded tokens of the summed squared error of S∘M."""
        return self.sae.mse


@dataclass(frozen=True)
class Control:
    """S∘M with its features decoded in other directions."""

    permutation: Int[Tensor, " d_sae"] | None = None
    """Feature ``j`` is decoded as feature ``permutation[j]``."""
    decoder: Float[Tensor, "d_sae d_out"] | None = None
    """Decoder rows in place of the SAE's own."""

    def decode(
        self,
        sae: OracleSAE,
        codes: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"],
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of this control."""
        if self.permutation is not None:
            renamed = torch.zeros_like(codes)
            renamed[..., self.permutation.long()] = codes
            codes = renamed
        return sae.decode(codes, x, self.decoder)


@torch.no_grad()
def calibrate(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences pos"],
    *,
    coding: str = "native",
    positions: str = "all",
    batch_size: int = 8,
) -> OracleCalibration:
    """Count, per feature, the calibration tokens in which it is active.

    Args:
        model: A HookedTransformer; a float64 copy is made unless it is float64 already.
        sae: A SAELens SAE whose metadata names the hook.
        tokens: Token ids, whole sequences without pads.
        coding: ``native`` or ``topk:K``.
        positions: ``all``, or ``no_bos`` to leave position 0 out.
        batch_size: Sequences a forward; changes memory only.
    """
    exact, own = _float64(model), OracleSAE.read(sae)
    coded = _coded_positions(tokens.shape[1], positions)
    counts = torch.zeros(own.d_sae, dtype=torch.int64)
    gaps = []
    for batch in tokens.split(batch_size):
        _, x, _ = _run(exact, own, batch)
        codes, gap = code(own, x, coding)
        counts += ((codes != 0) & coded[None, :, None]).sum((0, 1))
        gaps.append(_where_coded(gap, coded))
    return OracleCalibration(counts=counts, gap=torch.cat(gaps))


@torch.no_grad()
def evaluate(
    model: Any,
    sae: Any,
    pool: Bool[Tensor, " d_sae"],
    tokens: Int[Tensor, "sequences pos"],
    *,
    coding: str = "native",
    positions: str = "all",
    alpha: float = 0.5,
    d_vocab: int | None = None,
    batch_size: int = 8,
    controls: Mapping[str, Control] | None = None,
) -> OracleEvaluation:
    """Measure M, S∘M, h_G and controls on evaluation sequences: a whole forward for each.

    Args:
        model: A HookedTransformer; a float64 copy is made unless it is float64 already.
        sae: A SAELens SAE whose metadata names the hook.
        pool: Features that h_G may use.
        tokens: Token ids, whole sequences without pads.
        coding: ``native`` or ``topk:K``.
        positions: ``all``, or ``no_bos`` to leave position 0 as the model has it.
        alpha: Smoothing of the loss.
        d_vocab: True vocabulary when the head is padded; further columns are cut off.
        batch_size: Sequences a forward; changes memory only.
        controls: Other decodings of S∘M's features, by name.
    """
    exact, own = _float64(model), OracleSAE.read(sae)
    coded = _coded_positions(tokens.shape[1], positions)
    parts: list[dict[str, Tensor]] = []
    proxies: dict[str, list[OracleProxy]] = {}
    for batch in tokens.split(batch_size):
        logits, x, y = _run(exact, own, batch)
        codes, gap = code(own, x, coding)
        codes_pool, gap_pool = code(own, x, coding, pool)
        decoded = {"sae": own.decode(codes, x), "pool": own.decode(codes_pool, x)}
        for name, control in (controls or {}).items():
            decoded[name] = control.decode(own, codes, x)
        for name, y_hat in decoded.items():
            patched, _, _ = _run(exact, own, batch, torch.where(coded[None, :, None], y_hat, y))
            proxy = _compare(logits[..., :d_vocab], patched[..., :d_vocab], batch, alpha)
            error = _where_coded((y - y_hat).pow(2).sum(-1), coded)
            proxies.setdefault(name, []).append(OracleProxy(**proxy, squared_error=error))

        active = (codes != 0) & coded[None, :, None]
        n_active = active.sum(-1)
        n_outside = (active & ~pool).sum(-1)
        parts.append(
            {
                "loss_base": smoothed_loss_bits(logits[..., :d_vocab], batch, alpha),
                "violation": (n_outside > 0).any(-1),
                "l0": n_active[:, coded].to(F64).mean(-1),
                "active": n_active,
                "outside": n_outside,
                "gap": _where_coded(gap, coded),
                "gap_pool": _where_coded(gap_pool, coded),
            }
        )
    joined = {name: _join(of_batches) for name, of_batches in proxies.items()}
    return OracleEvaluation(
        sae=joined.pop("sae"),
        pool=joined.pop("pool"),
        controls=joined,
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
    )


def _compare(
    logits: Float[Tensor, "batch pos d_vocab"],
    patched: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    alpha: float,
) -> dict[str, Tensor]:
    """Compare a proxy's predictions with the model's."""
    log_p, log_q = logits.log_softmax(-1), patched.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1] / math.log(2.0)
    same = (logits.argmax(-1) == patched.argmax(-1))[:, :-1]
    gold_gap = (_gold(log_p, tokens) - _gold(log_q, tokens)).abs() / math.log(2.0)
    return {
        "loss": smoothed_loss_bits(patched, tokens, alpha),
        "kl": kl.mean(-1),
        "top1_agreement": same.to(F64).mean(-1),
        "gold_logprob_gap": gold_gap.mean(-1),
    }


def _join(proxies: list[OracleProxy]) -> OracleProxy:
    names = [field.name for field in fields(OracleProxy)]
    return OracleProxy(**{n: torch.cat([getattr(p, n) for p in proxies]) for n in names})


def smallest_gap(gap: Float[Tensor, "sequences pos"]) -> Float[Tensor, " sequences"]:
    """Return each sequence's smallest selection gap over its coded tokens (ties: near zero)."""
    return gap.nan_to_num(nan=math.inf).amin(-1)


def _float64(model: Any) -> Any:
    return model if model.cfg.dtype == F64 else float64_copy(model)


def _where_coded(values: Float[Tensor, "batch pos"], coded: Bool[Tensor, " pos"]) -> Tensor:
    return torch.where(coded, values, math.nan)


def _run(
    exact: Any,
    sae: OracleSAE,
    tokens: Int[Tensor, "batch pos"],
    replacement: Float[Tensor, "batch pos d_out"] | None = None,
) -> tuple[
    Float[Tensor, "batch pos d_vocab"],
    Float[Tensor, "batch pos d_in"],
    Float[Tensor, "batch pos d_out"],
]:
    """One whole forward; returns logits, the SAE's input, and the activation that it replaces.

    Activations with heads are joined to ``n_heads * d_head`` and taken apart again.
    """
    read: list[Tensor] = []
    replaced: list[Tensor] = []

    def read_hook(x: Tensor, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
        read.append(x.flatten(2))

    def replace_hook(y: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001 - passed by name
        replaced.append(y.flatten(2))
        return None if replacement is None else replacement.reshape(y.shape)

    # One hook is read before it is replaced: hooks of a point run in this order.
    hooks = [(sae.hook_name, read_hook), (sae.hook_name_out, replace_hook)]
    logits = exact.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    for name, seen in ((sae.hook_name, read), (sae.hook_name_out, replaced)):
        if len(seen) != 1:
            raise ValueError(f"hook {name!r} fired {len(seen)} times, expected once")
        if logits.dtype != F64 or seen[0].dtype != F64:
            raise ValueError(f"the forward left float64: {logits.dtype}, {seen[0].dtype}")
    return logits, read[0], replaced[0]
