"""Transcoders that keep the k largest features, in SAELens's form: SAELens itself has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.classes.self_loading import SelfLoading


@dataclass
class KeptConfig(SAEConfig):
    """What configurations of classes that keep k features share.

    Attributes:
        k: Number of features kept per token; of these, the positive ones are active.
        name: Name of the architecture.
    """

    k: int = 32
    name: ClassVar[str]

    @classmethod
    def architecture(cls) -> str:
        """Return the name of the architecture."""
        return cls.name

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k, self.d_sae)


class KeepsTopK(SelfLoading):
    """Mixin: the k largest features are kept, if positive."""

    cfg: Any

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Return the selection of features."""
        return TopK(self.cfg.k)


class MixedDtypeSkip(SkipTranscoder):
    """A skip transcoder that takes inputs of any dtype, as its encoder does."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return decoded features plus the linear skip term."""
        return super().forward(x.to(self.dtype))

    def forward_with_activations(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Float[Tensor, "*batch d_sae"]]:
        """Return what `forward` returns, and the features."""
        return super().forward_with_activations(x.to(self.dtype))


@dataclass
class TopKTranscoderConfig(KeptConfig, TranscoderConfig):
    """Configuration of a `TopKTranscoder`."""

    apply_b_dec_to_input: bool = False
    name: ClassVar[str] = "topk_transcoder"


class TopKTranscoder(KeepsTopK, Transcoder):
    """``z = relu(topk(x W_enc + b_enc))``, output ``z W_dec + b_dec`` at another hook."""

    config_class: ClassVar[type[SAEConfig]] = TopKTranscoderConfig


@dataclass
class TopKSkipTranscoderConfig(KeptConfig, SkipTranscoderConfig):
    """Configuration of a `TopKSkipTranscoder`."""

    apply_b_dec_to_input: bool = False
    name: ClassVar[str] = "topk_skip_transcoder"


class TopKSkipTranscoder(KeepsTopK, MixedDtypeSkip):
    """A `TopKTranscoder` that adds ``x W_skip.T``, with ``W_skip`` of shape ``[d_out, d_in]``."""

    config_class: ClassVar[type[SAEConfig]] = TopKSkipTranscoderConfig


def check_k(k: int, d_sae: int) -> None:
    """Check that k features can be kept.

    Raises:
        CertifyError: If they cannot.
    """
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= d_sae:
        raise CertifyError(f"k = {k!r} features cannot be kept of {d_sae}; k is from 1 to {d_sae}")
