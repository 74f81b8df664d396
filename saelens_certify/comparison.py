"""Several certificates at once: bounds that hold together, so that the best may be chosen after looking."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saelens_certify.bounds import Bound, betting_p_value, holm
from saelens_certify.bounds.sharp import SHARP, find_sharp
from saelens_certify.bounds.statements import check_family
from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class Member:
    """One certificate among several.

    Attributes:
        bound: Its bound at delta / k (Bonferroni): the bounds of all k certificates hold together.
        p_value: p-value of "the bound's expectation is at or above log2 V", by betting.
        nonvacuous: Whether that is rejected by Holm's procedure: all rejections are right together with
            probability 1 - delta.
        uniform: log2 V, bits per token.
        n_sequences: Independent draws behind it.
    """

    bound: Bound
    p_value: float
    nonvacuous: bool
    uniform: float
    n_sequences: int


@dataclass(frozen=True)
class Comparison:
    """Certificates that hold together with one confidence.

    Attributes:
        members: By name, in the order given.
        delta: Probability that any of the bounds, or (separately) any of the verdicts, is wrong.
        family: Number of certificates that share delta: those given, or the larger family they belong to.
    """

    members: Mapping[str, Member]
    delta: float
    family: int

    @property
    def best(self) -> str:
        """Name of the certificate with the smallest bound; choosing it after looking is covered."""
        return min(self.members, key=lambda name: self.members[name].bound.value)


def compare(
    certificates: Mapping[str, Certificate], *, delta: float | None = None, bound: str | None = None
) -> Comparison:
    """Make statements about several SAEs, layers or settings that hold together.

    Each certificate by itself fails with probability delta, and the best of many fails more often. Here bounds are
    computed again from the evidence at delta / k, so that they hold all at once (Bonferroni), and the verdicts
    "non-vacuous" are decided by Holm's procedure, which rejects at least as often.

    What is covered is the choice among *these* certificates: give all that were looked at, also those
    that were bad.

    Args:
        certificates: By name.
        delta: Failure probability of the whole; None: that of the certificates, if it is one.
        bound: Which sharp bound: sharp_betting, sharp_measured, sharp_occam or sharp_direct_base; None:
            that of the first certificate's verdict.

    Returns:
        The bounds and verdicts, by name.

    Raises:
        CertifyError: For no certificates, an unknown bound, or certificates of different delta if none is given.
    """
    if (
        not isinstance(certificates, Mapping)
        or not certificates
        or not all(isinstance(each, Certificate) for each in certificates.values())
    ):
        raise CertifyError(
            "compare takes certificates by name, {name: certificate}, at least one; Certificate.load(folder) "
            "reads one"
        )
    bound = bound or next(iter(certificates.values())).headline.name
    _check_alike(certificates)
    sharp = SHARP.get(bound)
    if sharp is None or sharp.claim != "R(M)" or sharp.method != "betting":
        raise CertifyError(
            f"bound={bound!r} does not bound the model's risk by betting: choose 'sharp_betting', "
            "'sharp_measured', 'sharp_occam' or 'sharp_direct_base'"
        )
    if delta is None:
        found = sorted({certificate.config.delta for certificate in certificates.values()})
        if len(found) > 1:
            raise CertifyError(f"the certificates have different delta {found}: give delta=")
        delta = found[0]
    # Certificates of a larger family were looked at together with its other members.
    number = max(len(certificates), *(each.config.simultaneous for each in certificates.values()))
    check_family(delta, number)
    p_values = {name: _p_value(each, bound, delta / number) for name, each in certificates.items()}
    rejected = holm(p_values, delta * len(certificates) / number)
    members = {
        name: Member(
            bound=each.bounds_at(delta, number)[bound],
            p_value=p_values[name],
            nonvacuous=rejected[name],
            uniform=each.baselines["uniform"],
            n_sequences=each.measured.n_sequences,
        )
        for name, each in certificates.items()
    }
    return Comparison(members, delta, number)


def _check_alike(certificates: Mapping[str, Certificate]) -> None:
    """Refuse bounds of different losses; warn about different models or documents.

    Raises:
        CertifyError: If alpha, the length of the sequences or the vocabulary differ.
    """

    def differ(what: str, values: list[Any]) -> str:
        shown = ", ".join(
            f"{name}: {value}" for name, value in zip(certificates, values, strict=True)
        )
        return f"the certificates differ in {what} ({shown})"

    each = list(certificates.values())
    for what, values in (
        ("alpha", [c.config.alpha for c in each]),
        ("seq_len", [c.config.seq_len for c in each]),
        ("vocabulary size", [c.vocab_size for c in each]),
    ):
        if len(set(values)) > 1:
            raise CertifyError(
                f"{differ(what, values)}, so their bounds are of different losses and the smallest means nothing"
            )
    for what, key in (("model", "model_sha256"), ("documents", "evaluation_sha256")):
        values = [c.manifest["identity"][key][:12] for c in each]
        if len(set(values)) > 1:
            warnings.warn(
                f"{differ(what, values)}: the bounds hold together, but are not about one risk",
                stacklevel=3,
            )


def _p_value(certificate: Certificate, bound: str, level: float) -> float:
    """p-value of a bound's expectation being at or above log2 V."""
    sharp = find_sharp(bound)
    x = sharp.variable(certificate.losses)
    return betting_p_value(
        x.samples,
        x.low,
        x.high,
        certificate.losses.baseline,
        level,
        complexity=certificate.complexity if sharp.occam else 0.0,
        time_uniform=certificate.time_uniform,
    )
