"""The flat numbers of a certificate, as ``sae_lens.run_evals`` nests them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saelens_certify.bounds import loss_range
from saelens_certify.controls import shuffle_metrics

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate


def flat_metrics(certificate: Certificate) -> dict[str, float]:
    """Return every bound by name (bits per token) and what it was computed from.

    Args:
        certificate: The certificate. What it cannot say is left out: published bounds of a run that could stop
            early, limits that do not exist.
    """
    measured, config = certificate.measured, certificate.config
    flat: dict[str, float] = {name: bound.value for name, bound in certificate.bounds.items()}
    flat |= {f"{n}_lower": b.lower for n, b in certificate.bounds.items() if b.lower is not None}
    flat |= {
        "risk_base": measured.risk_base,
        "risk_sae": measured.risk_sae,
        "risk_pool": measured.risk_pool,
        "gap": measured.gap,
        "eta": measured.eta,
        "n_sequences": measured.n_sequences,
        "vocab_size": certificate.vocab_size,
        "dict_size": certificate.dict_size,
        "pool_size": certificate.pool.size,
        "alpha": config.alpha,
        "delta": config.delta,
        "loss_range": float(loss_range(certificate.vocab_size, config.alpha)),
        "log_binom": certificate.complexity,
        "baseline_uniform": certificate.baselines["uniform"],
        "baseline_unigram": certificate.baselines["unigram"],
        "kl": certificate.mean("kl"),
        "top1_agreement": certificate.mean("top1_agreement"),
        "gold_logprob_gap": certificate.mean("gold_logprob_gap"),
        "l0": certificate.mean("l0"),
        "explained_variance": certificate.explained_variance(),
        "explained_variance_no_first": certificate.explained_variance(first=False),
    }
    flat |= {
        "baseline_unigram_lower": certificate.unigram_risk.lower,
        "baseline_unigram_upper": certificate.unigram_risk.upper,
    }
    for name, share in certificate.kept.items():
        ends = {"": share.value, "_lower": share.lower, "_upper": share.upper}
        flat |= {f"kept_{name}{end}": x for end, x in ends.items() if x is not None}
    for name, control in certificate.controls.items():
        flat |= {f"{key}_{name}": value for key, value in control.items()}
    flat |= shuffle_metrics(certificate.shuffle_tests)
    return flat
