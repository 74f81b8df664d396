"""What the sharp bounds are for, on a real model: at small scale what ``make smollm2`` counts at full scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.smollm2.certificates import certify_layer
from benchmarks.smollm2.model import load_smollm2
from benchmarks.smollm2.sharp import SMALL_POOL, against_published
from benchmarks.smollm2.text import Split, sequences
from benchmarks.smollm2.train_saes import HOOKS, LENGTH, trained_saes
from saelens_certify import bounds

HOOK = HOOKS[1]
COUNTS: dict[Split, int] = {"calibration": 400, "evaluation": 200}


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    model = load_smollm2()
    tokens = {side: sequences(side, model.tokenizer, LENGTH, n) for side, n in COUNTS.items()}
    return {"model": model, "sae": trained_saes("ci")[HOOK], **tokens}


def test_a_tenth_of_the_sequences_and_a_third_to_the_first_verdict(world) -> None:
    found = against_published(certify_layer(**world))
    assert found["n_sharp_any_time"] <= found["n_published"] / 10
    # U_SAE may never get there with so few sequences: then its first number is not a number.
    first_published = np.nan_to_num(found["first_published"], nan=found["n_published"])
    assert found["first_sharp_any_time"] <= first_published / 3


def test_a_small_pool_is_certified_where_the_published_bound_never_is(world) -> None:
    certificate = certify_layer(**{**world, "calibration": world["calibration"][:SMALL_POOL]})
    measured, uniform = certificate.measured, certificate.baselines["uniform"]
    floor = bounds.asymptotic_floor(
        bound="u_sae", vocab_size=certificate.vocab_size, risk_pool=measured.risk_pool,
        gap=measured.gap, eta=measured.eta,
    )  # fmt: skip
    assert measured.eta > 0.5
    assert floor > uniform
    assert certificate.bounds["sharp_measured"].nonvacuous(uniform)
