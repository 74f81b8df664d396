"""The result of a certificate in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saelens_certify.rounding import percent, rounded_down, rounded_up

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate


def verdict(certificate: Certificate) -> str:
    """Say in one sentence what was certified; numbers are rounded to the safe side.

    Args:
        certificate: The certificate; its headline bound decides.
    """
    bound, baselines = certificate.headline, certificate.baselines
    uniform, unigram = baselines["uniform"], baselines["unigram"]
    per_cluster = "" if certificate.clusters is None else ", averaged over clusters of sequences,"
    said = (
        f"With {percent(bound.confidence)} confidence the model's expected smoothed loss "
        f"(alpha = {certificate.config.alpha:g}){per_cluster} is at most {rounded_up(bound.value, 2):.2f} bits "
        f"per token by way of this SAE{_family(certificate)}"
    )
    if not certificate.nonvacuous:
        return (
            f"{said}: vacuous, a uniform guess over {certificate.vocab_size} tokens has "
            f"{rounded_down(uniform, 2):.2f}.{_decided(certificate)}"
        )
    over_unigram = certificate.bounds["sharp_unigram"].value
    beyond = (
        f" By a separate statement of the same confidence it is at least {rounded_down(-over_unigram, 2):.2f} below "
        "that of a unigram model."
        if over_unigram < 0
        else f" It is not shown to be below that of a unigram model (measured {unigram:.2f})."
    )
    return (
        f"{said}: {rounded_down(uniform - bound.value, 2):.2f} below a uniform guess ({uniform:.2f}).{beyond}"
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
        return (
            f" Not decided after all {_units(certificate, certificate.measured.n_sequences)}; another run on more "
            "documents needs a delta of its own."
        )
    if stop.reason == "futile" and not certificate.nonvacuous:
        return (
            f" Futile, with {percent(1 - certificate.config.delta)} confidence, after {_units(certificate, stop.n)}: with "
            f"ever more sequences {certificate.config.until_bound} tends to {rounded_down(stop.value, 2):.2f} or "
            "more with this pool."
        )
    measured = certificate.measured.n_sequences
    return f" Decided after {stop.n} of {_units(certificate, measured)}."


def _units(certificate: Certificate, n: int) -> str:
    return f"{n} {certificate.unit}"
