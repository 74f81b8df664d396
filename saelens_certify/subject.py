"""Who is measured, and how: an SAE read by one setting."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.pool import Calibration, Pool
from saelens_certify.proxies import Variant, error_permutations, variants_of
from saelens_certify.saes import SAEAdapter


@dataclass(frozen=True)
class Reader:
    """One SAE whose features are counted on calibration sequences.

    Attributes:
        adapter: The SAE.
        config: Settings: the coding rule, which positions are coded.
        length: Only the first so many tokens of each sequence count; None: all.
        rows: Which of the sequences given to `calibrate` count; None: all.
    """

    adapter: SAEAdapter
    config: CertifyConfig
    length: int | None = None
    rows: Bool[Tensor, " n_sequences"] | None = None


@dataclass(frozen=True)
class Subject:
    """One SAE under measurement.

    Attributes:
        adapter: The SAE.
        config: Settings: the coding rule, the smoothing, which positions are coded, horizons.
        pool: Its concept pool G.
        variants: What is measured; the first must be `all_features`.
        mean_activations: Calibration means, the baseline of explained variance (rows: all
            positions, without position 0).
        unigram_bits: Loss of each target under the calibration unigram model, float64.
        counts: On how many calibration tokens each feature was active; with them the evidence says how
            rare the rarest feature of each sequence is.
        error_permutations: Renamings of the features whose squared errors are measured, without
            running the model on them; int32 or int64.
        length: Only the first so many tokens of each sequence count; None: all.
    """

    adapter: SAEAdapter
    config: CertifyConfig
    pool: Pool
    variants: tuple[Variant, ...]
    mean_activations: Float[Tensor, "2 d_out"]
    unigram_bits: Float[Tensor, " d_vocab"]
    counts: Int[Tensor, " d_sae"] | None = None
    error_permutations: Int[Tensor, "n_permutations d_sae"] | None = None
    length: int | None = None

    @classmethod
    def of(
        cls,
        adapter: SAEAdapter,
        calibration: Calibration,
        config: CertifyConfig,
        length: int | None = None,
    ) -> Subject:
        """Return what a certificate measures of an SAE.

        Args:
            adapter: The SAE.
            calibration: What calibration left behind.
            config: Settings.
            length: Only the first so many tokens of each sequence count; None: all.

        Raises:
            CertifyError: If the pool is empty.
        """
        return cls(
            adapter=adapter,
            config=config,
            pool=calibration.pool(config.tau),
            variants=variants_of(adapter, config, calibration.counts),
            mean_activations=calibration.mean_activations(),
            unigram_bits=calibration.unigram_bits(config.alpha),
            counts=calibration.counts,
            error_permutations=error_permutations(adapter, config),
            length=length,
        )


def encoding_key(who: Reader | Subject) -> Hashable:
    """Return what those share who can be encoded together: SAE, coding rule and coded positions."""
    return id(who.adapter), who.config.coding, who.config.positions
