"""Certificates of SAEs on SmolLM2, and how fast they are issued next to the published protocol."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from benchmarks.reference_protocol import (
    PUBLISHED_BATCH,
    reference_calibrate,
    reference_evaluate,
)
from saelens_certify import Certificate, CertifyConfig, certify
from saelens_certify.forward import ForwardEngine
from saelens_certify.measure import calibrate, measure
from saelens_certify.saes import adapt
from saelens_certify.subject import Reader, Subject

BEST_BATCH = 128


def certify_layer(
    model: Any,
    sae: SAE[Any],
    calibration: Int[Tensor, "sequences pos"],
    evaluation: Int[Tensor, "sequences pos"],
    output: Path | None = None,
) -> Certificate:
    """Issue the certificate of one SAE, with one feature permutation as a control."""
    config = CertifyConfig(permutations=1, seq_len=calibration.shape[1])
    return certify(
        model, sae, calibration=calibration, evaluation=evaluation, config=config, output=output
    )


def speed(
    model: Any, sae: SAE[Any], tokens: Int[Tensor, "sequences pos"], rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Time calibration and evaluation against the published protocol, interleaved.

    Both measure M, S∘M and h_G on the same tokens and the same model object; the pool is that of the
    first half of the tokens, so that some sequences violate it.

    Args:
        model: The model.
        sae: The SAE.
        tokens: Sequences; calibration and evaluation each run over all of them.
        rounds: Times that every contender runs, in turn; medians are reported.

    Returns:
        For "calibration" and "evaluation": tokens per second of this package, of the reference with
        the published batch of 16 sequences and with its best batch, and the ratios to both.
    """
    config = CertifyConfig(progress=False, seq_len=tokens.shape[1])
    engine, adapter = ForwardEngine(model), adapt(sae)
    reader = Reader(adapter, config)
    half = calibrate(engine, {"sae": reader}, tokens[: len(tokens) // 2], config)["sae"]
    subject = Subject.of(adapter, half, config)
    pool = subject.pool.mask

    def reference(batch: int) -> dict[str, Callable[[], Any]]:
        return {
            "calibration": lambda: reference_calibrate(model, sae, tokens, None, batch),
            "evaluation": lambda: reference_evaluate(model, sae, pool, tokens, None, batch),
        }

    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "ours": {
            "calibration": lambda: calibrate(engine, {"sae": reader}, tokens, config),
            "evaluation": lambda: measure(engine, {"sae": subject}, tokens, config),
        },
        "reference_published_batch": reference(PUBLISHED_BATCH),
        "reference_best_batch": reference(BEST_BATCH),
    }
    result: dict[str, dict[str, float]] = {}
    for stage in ("calibration", "evaluation"):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, stages in contenders.items():
                start = time.perf_counter()
                stages[stage]()
                seconds[name].append(time.perf_counter() - start)
        rate = {k: tokens.numel() / statistics.median(v) for k, v in seconds.items()}
        result[stage] = {
            **{f"{name}_tokens_per_s": value for name, value in rate.items()},
            "ratio_to_published_batch": rate["ours"] / rate["reference_published_batch"],
            "ratio_to_best_batch": rate["ours"] / rate["reference_best_batch"],
        }
    result["evaluation"]["share_of_sequences_rerun"] = share_rerun(engine, subject, tokens, config)
    return result


def share_rerun(
    engine: ForwardEngine, subject: Subject, tokens: Tensor, config: CertifyConfig
) -> float:
    """Return the share of sequences that violate the pool, for which h_G needs a pass of its own."""
    columns = measure(engine, {"sae": subject}, tokens, config)["sae"]
    return float(columns["violation"].mean())
