"""How many sequences the sharp bounds need on SmolLM2, next to the published certificate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from benchmarks.smollm2.certificates import certify_layer
from benchmarks.smollm2.fetch import CACHE_DIR
from benchmarks.smollm2.model import load_smollm2
from benchmarks.smollm2.text import Split, sequences
from benchmarks.smollm2.train_saes import HOOKS, LENGTH, trained_saes
from saelens_certify import Certificate, bounds
from saelens_certify.bounds import Crossing

FULL: dict[Split, int] = {"calibration": 1000, "evaluation": 1200}
SMALL_POOL = 40  # calibration sequences


def smollm2_sequences(quick: bool = False) -> dict[str, dict[str, float]]:
    """Certify the SAEs of both layers and count sequences.

    Args:
        quick: Whether to do it at toy size.

    Returns:
        `against_published` by hook.
    """
    model = load_smollm2()
    small: dict[Split, int] = {"calibration": 24, "evaluation": 200}
    counts = small if quick else FULL
    tokens = {side: sequences(side, model.tokenizer, LENGTH, n) for side, n in counts.items()}
    return {
        hook: against_published(
            certify_layer(model, sae, tokens["calibration"], tokens["evaluation"])
        )
        for hook, sae in trained_saes("ci", HOOKS, CACHE_DIR, model).items()
    }


def against_published(certificate: Certificate) -> dict[str, float]:
    """Count sequences, in the order of their hashes.

    Returns:
        ``published``: U_SAE at all N sequences, bits. ``n_sharp``, ``n_sharp_any_time``: numbers of sequences at
        which sharp_betting is below it, for a number fixed in advance and looked at all the time.
        ``first_published``, ``first_sharp``, ``first_sharp_any_time``: numbers at which each is first below
        log2 V. NaN where that never happens.
    """
    losses, total = certificate.losses, certificate.measured.n_sequences
    published, delta = certificate.bounds["u_sae"].value, certificate.config.delta
    steps = np.arange(1, total + 1)
    u_sae = bounds.Growth.of(losses, steps).bounds(
        ["u_sae"],
        vocab_size=certificate.vocab_size,
        dict_size=certificate.dict_size,
        pool_size=certificate.pool.size,
        alpha=certificate.config.alpha,
        delta=delta,
    )["u_sae"]
    any_time = certificate.sequence("sharp_betting", steps)[1]

    def sharp(limit: float) -> Crossing | None:
        return bounds.first_fixed("sharp_betting", losses, delta, steps, limit=limit)

    return {
        "published": published,
        "n_published": float(total),
        "n_sharp": _number(sharp(published)),
        "n_sharp_any_time": _number(bounds.first_below(steps, any_time, published)),
        "first_published": _number(bounds.first_below(steps, u_sae, losses.baseline)),
        "first_sharp": _number(sharp(losses.baseline)),
        "first_sharp_any_time": _number(bounds.first_below(steps, any_time, losses.baseline)),
    }


def small_pool(
    model: Any,
    sae: SAE[Any],
    calibration: Int[Tensor, "sequences pos"],
    evaluation: Int[Tensor, "sequences pos"],
    output: Path,
) -> dict[str, float]:
    """Certify with a pool from few sequences, which most text violates.

    Returns:
        What was measured, the bounds, and ``u_sae_floor``: what the published certificate tends to.
    """
    certificate = certify_layer(model, sae, calibration[:SMALL_POOL], evaluation, output)
    measured = certificate.measured
    floor = bounds.asymptotic_floor(
        bound="u_sae",
        vocab_size=certificate.vocab_size,
        risk_pool=measured.risk_pool,
        gap=measured.gap,
        eta=measured.eta,
    )
    lower = bounds.floor_sequence("sharp_betting", certificate.losses, certificate.config.delta)
    return {
        "calibration_sequences": float(SMALL_POOL),
        "pool_size": float(certificate.pool.size),
        **{k: float(v) for k, v in dataclasses.asdict(measured).items()},
        "uniform": certificate.baselines["uniform"],
        "u_sae": certificate.bounds["u_sae"].value,
        "u_sae_floor": float(floor),
        "sharp_betting": certificate.bounds["sharp_betting"].value,
        "sharp_betting_floor_at_least": float(lower[-1]),
        "sharp_measured": certificate.bounds["sharp_measured"].value,
        "first_sharp_measured_any_time": _number(
            bounds.first_any_time(
                "sharp_measured",
                certificate.losses,
                certificate.config.delta,
                np.arange(1, measured.n_sequences + 1),
            )
        ),
    }


def _number(crossing: Crossing | None) -> float:
    return float("nan") if crossing is None else float(crossing.n)
