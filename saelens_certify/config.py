"""The settings of a certificate: one frozen object, passed down and written into the manifest."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from saelens_certify.bounds.loss import check_alpha
from saelens_certify.bounds.statements import check_family
from saelens_certify.bounds.stopping import check_until
from saelens_certify.errors import CertifyError
from saelens_certify.ops import Impl
from saelens_certify.saes.coding import Coding

Positions = Literal["all", "no_bos"]
Dependence = Literal["cluster", "refuse", "ignore"]

_POSITIONS = ("all", "no_bos")
_DEPENDENCE = get_args(Dependence)
_IMPLS = ("auto", "native", "torch")
_UNTIL_BOUNDS = ("sharp_betting", "sharp_measured")


@dataclass(frozen=True)
class CertifyConfig:
    """Everything that decides what a certificate says and how it is computed.

    The first group changes the statement and is compared when a run is resumed; the second group
    changes only speed and memory.

    Attributes:
        coding: Coding rule. ``"native"``: the SAE's own features. ``"topk:K"``: the K largest of
            ``sae.encode(x)``, positive ones only (the published protocol has K = 64).
        alpha: Smoothing weight of the loss ``-log2((1 - alpha) p(target) + alpha / V)``, in (0, 1).
        delta: Failure probability of each bound, in (0, 1); the confidence is 1 - delta.
        seq_len: Tokens per sequence, BOS included; L - 1 of them are predicted.
        positions: ``"all"``: every position is coded and spliced (the published protocol).
            ``"no_bos"``: special positions stay as the model has them.
        dependence: What to do with evaluation sequences that repeat each other: several of one document, or
            near duplicates. ``"cluster"``: each such group counts as one draw, by its mean. ``"refuse"``: an
            error that names the documents. ``"ignore"``: taken as independent, and the certificate says so.
        tau: A feature joins the pool if it is active on at least this many calibration tokens.
        permutations: Number of feature permutations measured as controls. With R of them no p-value of the
            shuffle test is below 1 / (1 + R).
        matched_permutations: Number of permutations within deciles of activation frequency on
            calibration documents, measured as controls.
        error_permutations: Number of feature permutations of which only the squared errors are measured, which
            takes no pass of the model; the first ones are those of ``permutations``.
        random_decoders: Number of decoders with random directions and the SAE's own norms, measured as
            controls.
        random_unit_decoders: Number of decoders with random directions of norm 1, measured as controls.
        horizons: Numbers of blocks after the patched one at which the divergence from the model is also read
            out, by the model's own final norm and unembedding (logit lens).
        until: Measure until the verdict is valid, looking all the time: ``"nonvacuous"`` (the bound is below
            a uniform guess), ``"decided"`` (also when no number of sequences can make it so), or a number
            of bits per token. None: measure every evaluation sequence. With it every bound is time-uniform.
        until_bound: The bound behind the verdict, and at which ``until`` looks: ``"sharp_betting"`` or
            ``"sharp_measured"``.
        simultaneous: Number of certificates (SAEs, layers, settings) that share delta, so that they all
            hold at once: each spends delta / simultaneous.
        seed: Seed of the controls; on the command line also of the division of --data.
        part_sequences: Sequences per evidence part: what a killed run may lose.
        batch_tokens: Tokens per forward pass; None: 1024 on a CPU, whose caches larger activations
            leave, and 16384 elsewhere.
        logits_mib: Largest logits tensor alive, in MiB (two are alive at a time), where logits are
            needed at all; None: as large as the head's weights (a head may copy these each time it is
            called), or 64 MiB if that is more.
        impl: Which operators run: ``"native"`` kernels, pure ``"torch"``, or ``"auto"``.
        workers: Ray workers that do the parts of a run, several at a time (extra ``ray``): on the cluster
            that runs, else on this machine. Each has a copy of the model. 0: this process does them all.
        progress: Whether to show progress bars.
    """

    coding: str = "native"
    alpha: float = 0.5
    delta: float = 0.05
    seq_len: int = 32
    positions: Positions = "all"
    dependence: Dependence = "cluster"
    tau: int = 1
    permutations: int = 0
    matched_permutations: int = 0
    error_permutations: int = 0
    random_decoders: int = 0
    random_unit_decoders: int = 0
    horizons: tuple[int, ...] = ()
    until: str | float | None = None
    until_bound: str = "sharp_betting"
    simultaneous: int = 1
    seed: int = 0
    part_sequences: int = 512

    batch_tokens: int | None = None
    logits_mib: int | None = None
    impl: Impl = "auto"
    workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        Coding.parse(self.coding)
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < float(value) < 1):
                raise CertifyError(
                    f"{name} must lie strictly between 0 and 1, got {value!r}; "
                    f"the published value is {'0.5' if name == 'alpha' else '0.05'}"
                )
            object.__setattr__(self, name, float(value))
        minima = {
            "seq_len": 2,
            "tau": 1,
            "permutations": 0,
            "matched_permutations": 0,
            "error_permutations": 0,
            "random_decoders": 0,
            "random_unit_decoders": 0,
            "simultaneous": 1,
            "part_sequences": 1,
            "batch_tokens": 1,
            "logits_mib": 1,
            "workers": 0,
        }
        for name in ("batch_tokens", "logits_mib"):
            if getattr(self, name) is None:
                del minima[name]
        for name, minimum in minima.items():
            value = _integer(getattr(self, name))
            if value is None or value < minimum:
                raise CertifyError(
                    f"{name} must be an integer of at least {minimum}, got {getattr(self, name)!r}"
                )
            object.__setattr__(self, name, value)
        check_alpha(self.alpha)
        check_family(self.delta, self.simultaneous)
        seed = _integer(self.seed)
        if seed is None:
            raise CertifyError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", seed)
        if not isinstance(self.progress, bool):
            raise CertifyError(f"progress must be True or False, got {self.progress!r}")
        object.__setattr__(self, "until", check_until(self.until))
        object.__setattr__(self, "horizons", _horizons(self.horizons))
        if self.until_bound not in _UNTIL_BOUNDS:
            raise CertifyError(
                f"until_bound must be one of {_UNTIL_BOUNDS}, got {self.until_bound!r}"
            )
        if self.positions not in _POSITIONS:
            raise CertifyError(f"positions must be one of {_POSITIONS}, got {self.positions!r}")
        if self.dependence not in _DEPENDENCE:
            raise CertifyError(
                f"dependence must be one of {_DEPENDENCE}, got {self.dependence!r}; "
                "cluster counts sequences that repeat each other as one"
            )
        if self.impl not in _IMPLS:
            raise CertifyError(f"impl must be one of {_IMPLS}, got {self.impl!r}")

    @property
    def share(self) -> float:
        """Failure probability of each bound of this certificate: delta / simultaneous."""
        return self.delta / self.simultaneous

    def tokens_per_pass(self, device: torch.device) -> int:
        """Tokens that a model on this device is given at a time."""
        return self.batch_tokens or (1024 if device.type == "cpu" else 16384)

    def logits_tokens(self, d_model: int, d_vocab: int) -> int:
        """Tokens whose logits, counted as float32, are alive at a time."""
        if self.logits_mib is not None:
            return self.logits_mib * 2**20 // (4 * d_vocab)
        return max(2**26 // (4 * d_vocab), d_model)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {**dataclasses.asdict(self), "horizons": list(self.horizons)}

    def statement(self) -> dict[str, Any]:
        """Return the settings that change what the certificate says, without those of speed."""
        return {k: v for k, v in self.to_dict().items() if k not in SPEED_FIELDS}

    @classmethod
    def check(cls, value: Any, name: str = "config") -> CertifyConfig:
        """Check settings that a caller gave; None stands for the default ones.

        Args:
            value: What was given.
            name: Name of the argument, for the message.

        Raises:
            CertifyError: If it is something else, such as a dict.
        """
        if value is None:
            return cls()
        if not isinstance(value, cls):
            raise CertifyError(
                f"{name} must be a CertifyConfig, got {type(value).__name__}; use CertifyConfig(...), "
                "or CertifyConfig.from_dict(...) for a dict"
            )
        return value

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CertifyConfig:
        """Build a config from JSON values.

        Raises:
            CertifyError: If a key is not a setting.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CertifyError(f"unknown settings {unknown}; known settings: {sorted(known)}")
        return cls(**values)


def _horizons(value: Any) -> tuple[int, ...]:
    """Return horizons as increasing whole numbers.

    Raises:
        CertifyError: If they are anything else.
    """
    found = [_integer(each) for each in value] if isinstance(value, (list, tuple)) else [None]
    whole = [each for each in found if each is not None and each >= 0]
    if len(whole) < len(found) or sorted(set(whole)) != whole:
        raise CertifyError(
            f"horizons must be increasing numbers of blocks, each at least 0, got {value!r}; the published ones "
            "are (0, 1, 2, 4, 8)"
        )
    return tuple(whole)


def _integer(value: Any) -> int | None:
    """Return an integer of any kind (NumPy's too) as int; None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


SPEED_FIELDS = frozenset({"batch_tokens", "logits_mib", "impl", "workers", "progress"})
