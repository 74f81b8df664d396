"""Where a certificate stands among baselines: the unigram model's risk, and the share of information kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from saelens_certify.bounds import mean_up
from saelens_certify.bounds.baselines import Risk, risk_limit
from saelens_certify.bounds.kept import Kept, information_kept

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate


def unigram_risk(certificate: Certificate) -> Risk:
    """Return the risk of the calibration unigram model with two-sided confidence limits."""
    losses, share = certificate.losses, certificate.config.share
    values = losses.loss("unigram").samples
    uniform = certificate.time_uniform
    lower, upper = (
        risk_limit(values, losses.low, losses.high, share / 2, side, time_uniform=uniform)
        for side in ("lower", "upper")
    )
    return Risk(mean_up(values), lower, upper, 1 - certificate.config.delta)


def kept(certificate: Certificate) -> dict[str, Kept]:
    """Return the share of M's advantage over each baseline that each proxy keeps."""
    losses = certificate.losses
    base = losses.loss("base").samples
    baselines = {"unigram": losses.loss("unigram").samples, "uniform": losses.baseline}
    confidence = 1 - certificate.config.delta
    found = {
        f"{proxy}_{name}": information_kept(
            baseline,
            base,
            losses.loss(proxy).samples,
            losses.low,
            losses.high,
            certificate.config.share,
            baseline=name,
            time_uniform=certificate.time_uniform,
        )
        for proxy in ("sae", "pool")
        for name, baseline in baselines.items()
    }
    return {name: replace(share, confidence=confidence) for name, share in found.items()}
