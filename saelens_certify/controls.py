"""Controls: random copies of the SAE, what was measured with them and what that says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from saelens_certify.bounds.means import mean_distance_up, mean_up
from saelens_certify.bounds.shuffle import ShuffleTest, shuffle_test
from saelens_certify.frequency import frequency_groups, n_movable

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate

CONTROL = re.compile(r"(permuted|matched|random_decoder|random_unit_decoder)_(\d+)")
"""Name of a control: its kind and its number."""

BEYOND = {
    "permuted": "alignment",
    "matched": "alignment beyond frequency",
    "random_decoder": "alignment beyond norm",
    "random_unit_decoder": "alignment, or norms",
}
"""What a small p-value of each kind of control says that the real SAE has."""

_NULLS = {
    "permuted": (
        "Which decoder row belongs to which feature says nothing: every pairing of the {m} features with the "
        "{m} rows was equally likely to be the SAE's."
    ),
    "matched": (
        "Among features of like frequency, which decoder row belongs to which feature says nothing: every pairing "
        "within deciles of calibration frequency was equally likely to be the SAE's. Features that were never "
        "active form a group of their own. {movable} of the {m} features can move, {seen} of them were active."
    ),
    "random_decoder": (
        "The decoder's directions say nothing: independent, each equally likely to be any direction, given the "
        "norm of each row."
    ),
    "random_unit_decoder": (
        "Neither the decoder's directions nor the norms of its rows say anything: independent rows of norm 1, each "
        "equally likely to be any direction."
    ),
}


def control_names(certificate: Certificate) -> list[str]:
    """Names of the controls that were measured: by kind, and within a kind by number."""
    names = (name.removeprefix("loss_") for name in certificate.evidence.column_names)
    found = [match for name in names if (match := CONTROL.fullmatch(name))]
    kinds = list(BEYOND)
    found.sort(key=lambda match: (kinds.index(match.group(1)), int(match.group(2))))
    return [match.group(0) for match in found]


def first_of_each_kind(names: Iterable[str], few: int = 3) -> list[str]:
    """Names of the first few controls of each kind: enough to look at."""
    return [name for name in names if int(name.rpartition("_")[2]) < few]


def measured_controls(certificate: Certificate) -> dict[str, dict[str, float]]:
    """Return risk, gap to the model and KL from it of every control, by name; bits per token."""
    base = certificate.column("loss_base")

    def gap(name: str) -> float:
        other = certificate.column(f"loss_{name}")
        if certificate.clusters is None:
            return mean_distance_up(base, other)
        return mean_up(certificate.losses.units(np.abs(base - other)))

    return {
        name: {
            "risk": certificate.mean(f"loss_{name}"),
            "gap": gap(name),
            "kl": certificate.mean(f"kl_{name}"),
        }
        for name in control_names(certificate)
    }


def shuffle_tests(certificate: Certificate) -> dict[str, ShuffleTest]:
    """Compare the SAE with the controls of each kind that was measured.

    Returns:
        By kind, in the order of `BEYOND`. Empty also if the SAE's own losses decided
        how many sequences were measured (``until``): its copies did not, so they are not exchangeable.
    """
    if certificate.time_uniform:
        return {}
    names = control_names(certificate)
    tests = {}
    for kind in BEYOND:
        columns = [f"loss_{name}" for name in names if name.rpartition("_")[0] == kind]
        if not columns:
            continue
        tests[kind] = shuffle_test(
            certificate.column("loss_base"),
            certificate.column("loss_sae"),
            np.stack([certificate.column(column) for column in columns]),
            vocab_size=certificate.vocab_size,
            alpha=certificate.config.alpha,
            delta=certificate.config.share,
            null=_null(kind, certificate),
            clusters=certificate.clusters,
        )
    return tests


def shuffle_entries(tests: Mapping[str, ShuffleTest]) -> dict[str, dict[str, Any]]:
    """Return shuffle tests as plain JSON values."""
    return {
        kind: {**dataclasses.asdict(test), "assumptions": list(test.assumptions)}
        for kind, test in tests.items()
    }


def shuffle_metrics(tests: Mapping[str, ShuffleTest]) -> dict[str, float]:
    """Return the numbers of shuffle tests under flat names."""
    flat: dict[str, float] = {}
    for kind, test in tests.items():
        flat |= {
            f"shuffle_p_value_{kind}": test.p_value,
            f"shuffle_effect_{kind}": test.effect,
            f"shuffle_effect_{kind}_lower": test.lower,
            f"shuffle_effect_{kind}_upper": test.upper,
            f"shuffle_share_{kind}": test.share,
        }
    return flat


def _null(kind: str, certificate: Certificate) -> str:
    groups = frequency_groups(certificate.calibration.counts)
    movable, unseen = n_movable(groups), n_movable(groups[groups == 0])
    return _NULLS[kind].format(m=certificate.dict_size, movable=movable, seen=movable - unseen)
