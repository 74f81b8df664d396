"""The result of a certificate in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate


def percent(confidence: float) -> str:
    """Write a confidence without rounding it up: 95%, 99.9%."""
    return f"{100 * confidence:.12g}%"


def verdict(certificate: Certificate) -> str:
    """Say in one sentence what was certified.

    Args:
        certificate: The certificate; its headline bound decides.
    """
    bound, baselines = certificate.headline, certificate.baselines
    uniform, unigram = baselines["uniform"], baselines["unigram"]
    said = (
        f"With {percent(bound.confidence)} confidence the model's expected smoothed loss "
        f"(alpha = {certificate.config.alpha:g}) is at most {bound.value:.2f} bits per token by way of "
        f"this SAE{_family(certificate)}"
    )
    if not certificate.nonvacuous:
        return (
            f"{said}: vacuous, a uniform guess over {certificate.vocab_size} tokens has {uniform:.2f}."
            f"{_decided(certificate)}"
        )
    over_unigram = certificate.bounds["sharp_unigram"].value
    unigram = (
        f" By a separate statement of the same confidence it is at least {-over_unigram:.2f} below that of a "
        "unigram model."
        if over_unigram < 0
        else f" It is not shown to be below that of a unigram model (measured {unigram:.2f})."
    )
    return (
        f"{said}: {uniform - bound.value:.2f} below a uniform guess ({uniform:.2f}).{unigram}"
        f"{_decided(certificate)}"
    )


def _family(certificate: Certificate) -> str:
    number = certificate.config.simultaneous
    return "" if number == 1 else f" (and so for all {number} certificates of its family at once)"


def _decided(certificate: Certificate) -> str:
    if not certificate.time_uniform:
        return ""
    stop = certificate.stop
    if stop is None:
        return f" Not decided after all {certificate.measured.n_sequences} sequences."
    if stop.reason == "futile":
        return (
            f" Futile, with {percent(1 - certificate.config.delta)} confidence, after {stop.n} sequences: the "
            f"bound's limit is at least {stop.value:.2f}, so no number of sequences certifies this pool."
        )
    return f" Decided after {stop.n} sequences."
