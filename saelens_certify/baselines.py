"""Where a certificate stands among baselines: the unigram model's risk, and the share of information kept."""

from __future__ import annotations

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
    # Constant stakes hold at the number of sequences at which a run stopped, whatever made it stop.
    bets = "constant" if certificate.time_uniform else "adaptive"
    lower, upper = (
        risk_limit(values, losses.low, losses.high, share / 2, side, bets=bets)
        for side in ("lower", "upper")
    )
    return Risk(mean_up(values), lower, upper, 1 - certificate.config.delta)


def kept(certificate: Certificate) -> dict[str, Kept]:
    """Return the share of M's advantage over each baseline that each proxy keeps."""
    if certificate.time_uniform:
        return {}
    losses = certificate.losses
    base = losses.loss("base").samples
    baselines = {"unigram": losses.loss("unigram").samples, "uniform": losses.baseline}
    return {
        f"{proxy}_{name}": information_kept(
            baseline,
            base,
            losses.loss(proxy).samples,
            losses.low,
            losses.high,
            certificate.config.share,
            baseline=name,
        )
        for proxy in ("sae", "pool")
        for name, baseline in baselines.items()
    }
