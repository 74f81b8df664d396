"""The SAE part of the oracle: every architecture written out in float64, dense, without shortcuts.

Parameters are read from a SAELens object; ``encode``, ``decode`` and ``forward`` are never called.
Written from the definitions in SAELens's sources, whole sequences at a time, so that an architecture
that looks at earlier tokens is like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

F64 = torch.float64

TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "topk_transcoder",
    "topk_skip_transcoder",
    "groupmax_transcoder",
    "groupmax_skip_transcoder",
)
KINDS = (
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "groupmax",
    "matching_pursuit",
    "temporal",
    *TRANSCODERS,
)
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale")


@dataclass(frozen=True)
class Selection:
    """What decides which features of a token are active, and what they are worth."""

    values: Float[Tensor, "*batch d_sae"]
    """What a feature is worth if it is selected."""
    margin: Float[Tensor, "*batch d_sae"]
    """A feature may be selected iff this is above 0; a score must change by as much to alter that."""
    k: int | None
    """At most so many are selected, the largest by size; None: all that may be."""
    gap: Float[Tensor, "*batch"] | None = None
    """For a selection that is made already, in steps or groups: the smallest gap of any of them."""


@dataclass(frozen=True)
class OracleSAE:
    """One SAE in float64."""

    kind: str
    parameters: dict[str, Tensor]
    """Name in SAELens -> float64 copy."""
    k: int | None
    """What the SAE's own selection keeps at most."""
    subtract_b_dec: bool
    normalize: str
    rescale: bool
    """Whether scores are pre-activations times decoder norms."""
    hook_name: str
    """Where the input is read."""
    hook_name_out: str
    """What is replaced (the same, but for transcoders)."""
    options: dict[str, Any]
    """Further settings of matching pursuit and temporal SAEs, by their names in SAELens."""

    @staticmethod
    def read(sae: Any) -> OracleSAE:
        """Copy the parameters of a SAELens SAE in inference form.

        Raises:
            ValueError: For an unknown architecture, normalisation or reshaping.
        """
        cfg = sae.cfg
        kind = cfg.architecture()
        if kind not in KINDS:
            raise ValueError(f"the oracle does not know {kind!r}; it knows {', '.join(KINDS)}")
        if cfg.normalize_activations not in NORMALIZATIONS:
            raise ValueError(f"the oracle does not know {cfg.normalize_activations!r}")
        if cfg.reshape_activations not in ("none", "hook_z"):
            raise ValueError(f"the oracle does not know reshaping {cfg.reshape_activations!r}")
        names = (
            "k", "residual_threshold", "max_iterations", "stop_on_duplicate_support", "n_heads",
            "n_attn_layers", "sae_diff_type", "kval_topk", "tied_weights",
            "activation_normalization_factor",
        )  # fmt: skip
        options = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
        k = options.get("k")
        if kind == "temporal" and cfg.sae_diff_type == "topk":
            k = cfg.kval_topk
        if "groupmax" in kind:
            # Here k is a number of groups, and each group selects by itself.
            k = None
        hook = cfg.metadata.hook_name
        return OracleSAE(
            kind=kind,
            parameters={
                name: value.detach().to("cpu", F64).clone()
                for name, value in sae.named_parameters()
            },
            k=k,
            subtract_b_dec=bool(cfg.apply_b_dec_to_input),
            normalize=cfg.normalize_activations,
            rescale=bool(getattr(cfg, "rescale_acts_by_decoder_norm", False)),
            hook_name=hook,
            hook_name_out=cfg.metadata.hook_name_out if kind in TRANSCODERS else hook,
            options=options,
        )

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.parameters["W_dec"].shape[0]

    @property
    def pool_masks_scores(self) -> bool:
        """Whether a native code restricted to a pool lets the next features of the pool enter."""
        return self.kind not in ("matching_pursuit", "temporal") and "groupmax" not in self.kind

    def normalizer(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch one"], Float[Tensor, "*batch one"], float]:
        """Return ``(shift, size, eps)``: the SAE sees (x - shift) / (size + eps) and undoes size, shift."""
        zero = torch.zeros_like(x[..., :1])
        if self.normalize == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True), 1e-5
        if self.normalize == "constant_norm_rescale":
            return zero, x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]), 0.0
        if self.normalize == "constant_scalar_rescale":
            return zero, zero + 1.0 / self.options["activation_normalization_factor"], 0.0
        return zero, zero + 1.0, 0.0

    def seen(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return what the encoder multiplies: normalised, and centred where the SAE centres."""
        shift, size, eps = self.normalizer(x)
        normalized = (x - shift) / (size + eps)
        return normalized - self.parameters["b_dec"] if self.subtract_b_dec else normalized

    def scores(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the values that selection compares, before any activation function."""
        if self.kind == "temporal":
            return self._predict(x)[0]
        if self.kind == "gated":
            p = self.parameters
            return self.seen(x) @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
        scores = self.seen(x) @ self.parameters["W_enc"] + self.parameters["b_enc"]
        return scores * self.parameters["W_dec"].norm(dim=-1) if self.rescale else scores

    def select(self, x: Float[Tensor, "*batch d_in"]) -> Selection:
        """Return what the architecture decides on, before any pool."""
        if self.kind == "matching_pursuit":
            codes, gap = self._pursue(self.seen(x))
            return Selection(codes, certain(codes), None, gap)
        scores = self.scores(x)
        if "groupmax" in self.kind:
            codes, gap = self._best_of_groups(scores)
            return Selection(codes, certain(codes), None, gap)
        if self.kind == "abstopk":
            # Any size but 0 will do, however small.
            return Selection(scores, certain(scores), self.k)
        if self.kind == "gated":
            gate = self.seen(x) @ self.parameters["W_enc"] + self.parameters["b_gate"]
            return Selection(scores, torch.minimum(gate, scores), self.k)
        if "threshold" in self.parameters:
            # relu comes first, so a negative threshold acts like zero.
            return Selection(scores, scores - self.parameters["threshold"].clamp(min=0.0), self.k)
        return Selection(scores, scores, self.k)

    def decode(
        self,
        codes: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"],
        directions: Float[Tensor, "d_sae d_out"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the dense reconstruction of ``codes``, in the units of the activation replaced.

        Args:
            codes: One value per feature.
            x: The input that they came from.
            directions: Decoder rows in place of the SAE's own (a control).
        """
        p = self.parameters
        W_dec = p["W_dec"] if directions is None else directions.to(F64)
        out = (codes / W_dec.norm(dim=-1) if self.rescale else codes) @ W_dec
        if self.kind == "temporal":
            # What attention predicts is no feature: no pool, permutation or control touches it.
            out = out + self._predict(x)[1] @ p["W_dec"]
            with_bias = self.subtract_b_dec or not self.options["tied_weights"]
        else:
            with_bias = self.subtract_b_dec or self.kind != "matching_pursuit"
        if with_bias:
            out = out + p["b_dec"]
        if self.kind not in TRANSCODERS:
            shift, size, _ = self.normalizer(x)
            return out * size + shift
        return out + x @ p["W_skip"].T if "W_skip" in p else out

    def _best_of_groups(
        self, scores: Float[Tensor, "*batch d_sae"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch"]]:
        """Group-max: of each of k groups of neighbouring features the largest, if positive."""
        codes = torch.zeros_like(scores)
        gap = torch.full(scores.shape[:-1], math.inf, dtype=F64)
        size = self.d_sae // self.options["k"]
        for start in range(0, self.d_sae, size):
            group = scores[..., start : start + size]
            codes[..., start : start + size] = keep_largest(group.relu(), 1)
            first, second = _first_two(group)
            gap = torch.minimum(gap, torch.where(first > 0, first - second.relu(), -first))
        return codes, gap

    def _pursue(
        self, seen: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch"]]:
        """Matching pursuit, one token at a time."""
        rows = [self._pursue_token(token) for token in seen.reshape(-1, seen.shape[-1])]
        codes, gaps = (torch.stack(each) for each in zip(*rows, strict=True))
        return codes.reshape(*seen.shape[:-1], -1), gaps.reshape(seen.shape[:-1])

    def _pursue_token(self, residual: Float[Tensor, " d_in"]) -> tuple[Tensor, Tensor]:
        W_dec, options = self.parameters["W_dec"], self.options
        steps = options["max_iterations"]
        codes, support = torch.zeros(self.d_sae, dtype=F64), frozenset[int]()
        gap = torch.tensor(math.inf, dtype=F64)
        for _ in range(W_dec.shape[1] if steps is None else steps):
            scores = W_dec @ residual
            best = int(scores.argmax())
            others = torch.cat([scores[:best], scores[best + 1 :], torch.zeros(1, dtype=F64)])
            # Against the runner-up, or against having nothing to add.
            gap = torch.minimum(gap, (scores[best] - others.max()).abs())
            value = scores[best].clamp(min=0.0)
            codes[best] += value
            residual = residual - value * W_dec[best]
            before, support = support, frozenset(codes.nonzero().flatten().tolist())
            if options["stop_on_duplicate_support"] and support == before:
                break
            if options["residual_threshold"] > 0:
                left = residual.norm() - options["residual_threshold"]
                gap = torch.minimum(gap, left.abs())
                if left < 0:
                    break
        return codes, gap

    def _predict(
        self, x: Float[Tensor, "*batch pos d_in"]
    ) -> tuple[Float[Tensor, "*batch pos d_sae"], Float[Tensor, "*batch pos d_sae"]]:
        """Temporal SAEs: scores of what is new at each token, and codes predicted from before it."""
        p = self.parameters
        W_dec = p["W_dec"]
        W_enc = W_dec.T if self.options["tied_weights"] else p["W_enc"]
        small = 1.0 / (4 * x.shape[-1])
        left = self.seen(x)
        predicted = torch.zeros(*x.shape[:-1], self.d_sae, dtype=F64)
        for layer in range(self.options["n_attn_layers"]):
            now = ((left * small) @ W_enc).relu()
            before = torch.zeros_like(now)
            before[..., 1:, :] = now[..., :-1, :]
            guess = self._attend(layer, before, now).relu()
            direction = guess @ W_dec
            length = direction.norm(dim=-1, keepdim=True) + 1e-6
            share = (direction * left).sum(-1, keepdim=True) / length**2
            predicted = predicted + guess * share
            left = left - direction * share
        return (left * small) @ W_enc, predicted

    def _attend(
        self,
        layer: int,
        before: Float[Tensor, "*batch pos d_sae"],
        now: Float[Tensor, "*batch pos d_sae"],
    ) -> Float[Tensor, "*batch pos d_sae"]:
        """Causal attention of each token over the features of the tokens before it."""

        def linear(name: str, features: Tensor) -> Tensor:
            module = f"attn_layers.{layer}.{name}"
            weight, bias = (self.parameters[f"{module}.{part}"] for part in ("weight", "bias"))
            return features @ weight.T + bias

        heads, length = self.options["n_heads"], now.shape[-2]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        keys = linear("k_ctx", before).chunk(heads, dim=-1)
        values = linear("v_ctx", before).chunk(heads, dim=-1)
        queries = linear("q_target", now).chunk(heads, dim=-1)
        attended = []
        for q, k, v in zip(queries, keys, values, strict=True):
            logits = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            attended.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v)
        return linear("c_proj", torch.cat(attended, dim=-1))


# ---------------------------------------------------------------------------------- coding rules


def keep_largest(values: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Zero all but the ``k`` values of largest size in a row: size descending, index ascending."""
    order = values.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(values)
    return kept.scatter(-1, order, values.gather(-1, order))


def parse_coding(coding: str) -> int | None:
    """Return K of ``topk:K``, or None for ``native``."""
    if coding == "native":
        return None
    name, _, number = coding.partition(":")
    if name != "topk" or not number.isdigit() or int(number) < 1:
        raise ValueError(f"unknown coding rule {coding!r}: native or topk:K")
    return int(number)


def code(
    sae: OracleSAE,
    x: Float[Tensor, "*batch d_in"],
    coding: str = "native",
    pool: Bool[Tensor, " d_sae"] | None = None,
) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch"]]:
    """Return dense codes and, per token, the smallest gap around any selection decision.

    ``native`` with a pool masks the SAE's scores, so a native TopK admits the next in-pool features;
    matching pursuit, temporal and group-max SAEs lose the features outside the pool, and no other enters.
    ``topk:K`` with a pool masks the SAE's features (the output of its own encode) before the K
    largest are taken, which is the published protocol.

    Args:
        sae: The SAE.
        x: Activations at its input hook, float64; whole sequences: the last dimension but one is
            the position, which temporal SAEs look at.
        coding: ``native`` or ``topk:K``.
        pool: Features that may be used; all of them by default.

    Returns:
        Codes, and for each token the least change of a single score (in the units of the input)
        after which another set of features could be selected. Tokens with a tiny gap are ties.
    """
    outer_k = parse_coding(coding)
    found = sae.select(x)
    everything = torch.ones(sae.d_sae, dtype=torch.bool)
    allowed = everything if pool is None else pool
    own_allowed = allowed if outer_k is None and sae.pool_masks_scores else everything

    active = (found.margin > 0) & own_allowed
    codes = torch.where(active, found.values, 0.0)
    if found.k is not None:
        codes = keep_largest(codes, found.k)
    size = found.values.abs() if sae.kind == "abstopk" else found.values
    gap = found.gap
    if gap is None:
        gap = _selection_gap(size, found.margin, found.k, own_allowed.expand_as(size))
    # A temporal SAE multiplies its input by this before any score.
    unit = 4 * x.shape[-1] if sae.kind == "temporal" else 1
    features = torch.where(allowed, codes, 0.0)
    if outer_k is None:
        return features, gap * unit

    if found.k is None and found.gap is None:
        # One decision: threshold and top-K act on the same scores.
        gap = _selection_gap(size, found.margin, outer_k, allowed.expand_as(size))
    else:
        # Two decisions: the SAE's own, then K of what it left.
        outer = _selection_gap(features.abs(), certain(features), outer_k, features != 0)
        gap = torch.minimum(gap, outer)
    return keep_largest(features, outer_k), gap * unit


def _first_two(scores: Float[Tensor, "*batch group"]) -> tuple[Tensor, Tensor]:
    """Return the two largest scores of each row (-inf where there is no second)."""
    padded = torch.cat([scores, torch.full_like(scores[..., :1], -math.inf)], dim=-1)
    ranked = padded.sort(dim=-1, descending=True).values
    return ranked[..., 0], ranked[..., 1]


def certain(values: Tensor) -> Tensor:
    """Return margins of features of which only 0 is inactive."""
    return torch.where(values != 0, math.inf, 0.0).to(F64)


def _selection_gap(
    size: Float[Tensor, "*batch d_sae"],
    margin: Float[Tensor, "*batch d_sae"],
    k: int | None,
    allowed: Bool[Tensor, "*batch d_sae"],
) -> Float[Tensor, "*batch"]:
    """Least change of one score after which "margin above 0, k largest" selects another set."""
    distance = margin.abs().masked_fill(~allowed, math.inf)
    if k is None or k >= size.shape[-1]:
        return distance.amin(-1)
    active = allowed & (margin > 0)
    ranked = torch.where(active, size, -math.inf).sort(dim=-1, descending=True).values
    last_in, first_out = ranked[..., k - 1], ranked[..., k]
    full = last_in.isfinite()
    selected = active & (size >= last_in[..., None])
    # With k active features, an inactive one must pass both its threshold and the last selected.
    to_enter = torch.where(
        full[..., None], torch.maximum(distance, last_in[..., None] - size), distance
    )
    swap = torch.where(full & first_out.isfinite(), last_in - first_out, math.inf)
    leave = torch.where(selected, distance, math.inf).amin(-1)
    enter = torch.where(allowed & ~active, to_enter, math.inf).amin(-1)
    return torch.minimum(torch.minimum(leave, enter), swap)
