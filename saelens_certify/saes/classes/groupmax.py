"""Group-max autoencoders and transcoders, in SAELens's form: SAELens itself has none.

The features stand in k equal groups of neighbours; of each group the largest is kept, if positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.transcoder import SkipTranscoderConfig, Transcoder, TranscoderConfig
from sae_lens.util import filter_valid_dataclass_fields
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.classes.self_loading import SelfLoading
from saelens_certify.saes.classes.topk_transcoder import KeptConfig, MixedDtypeSkip


class GroupMax(torch.nn.Module):
    """Keeps the largest of each of k groups of neighbouring features, if it is positive."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the features with all but the largest of each group set to 0."""
        groups = x.relu().unflatten(-1, (self.k, -1))
        largest, where = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, where, largest).flatten(-2)


@dataclass
class GroupsConfig(KeptConfig):
    """What configurations of group-max classes share: ``k`` is the number of groups."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_sae % self.k:
            raise CertifyError(
                f"{self.d_sae} features do not fall into k = {self.k} equal groups, as groupmax needs"
            )


class KeepsGroupMax(SelfLoading):
    """Mixin: of each group the largest feature is kept, if positive."""

    cfg: Any

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Return the selection of features."""
        return GroupMax(self.cfg.k)


@dataclass
class GroupMaxSAEConfig(GroupsConfig, StandardSAEConfig):
    """Configuration of a `GroupMaxSAE`."""

    name: ClassVar[str] = "groupmax"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> GroupMaxSAEConfig:
        """Create a configuration; SAELens's own method asks its registry."""
        result = cls(**filter_valid_dataclass_fields(config_dict, cls))
        if "metadata" in config_dict:
            result.metadata = SAEMetadata(**config_dict["metadata"])
        return result


class GroupMaxSAE(KeepsGroupMax, StandardSAE):
    """``z = groupmax((x - b_dec) W_enc + b_enc)``, output ``z W_dec + b_dec``."""

    config_class: ClassVar[type[SAEConfig]] = GroupMaxSAEConfig


@dataclass
class GroupMaxTranscoderConfig(GroupsConfig, TranscoderConfig):
    """Configuration of a `GroupMaxTranscoder`."""

    apply_b_dec_to_input: bool = False
    name: ClassVar[str] = "groupmax_transcoder"


class GroupMaxTranscoder(KeepsGroupMax, Transcoder):
    """``z = groupmax(x W_enc + b_enc)``, output ``z W_dec + b_dec`` at another hook."""

    config_class: ClassVar[type[SAEConfig]] = GroupMaxTranscoderConfig


@dataclass
class GroupMaxSkipTranscoderConfig(GroupsConfig, SkipTranscoderConfig):
    """Configuration of a `GroupMaxSkipTranscoder`."""

    apply_b_dec_to_input: bool = False
    name: ClassVar[str] = "groupmax_skip_transcoder"


class GroupMaxSkipTranscoder(KeepsGroupMax, MixedDtypeSkip):
    """A `GroupMaxTranscoder` that adds ``x W_skip.T``, with ``W_skip`` of shape ``[d_out, d_in]``."""

    config_class: ClassVar[type[SAEConfig]] = GroupMaxSkipTranscoderConfig
