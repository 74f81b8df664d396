"""Error amplification: how much of a divergence is there at the hook, and how much do the later blocks add?

The residuals of M and of S∘M after the same number of further blocks are read out by the model's own final norm and
unembedding, and the next-token distributions compared (arXiv:2606.18383, horizon-conditioned KL). See
`saelens_certify.horizons` for what such a read-out shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import certify_saes, saved
from saelens_certify.forward import locate
from saelens_certify.report.experiments.amplification import amplification_figure
from saelens_certify.report.terms import layer_of

KIND = "error_amplification"

FULL = "full"
"""The horizon after all remaining blocks: the model's own prediction."""

Horizon = int | Literal["full"]

PUBLISHED_HORIZONS = (0, 1, 2, 4, 8)

KL_FLOOR = 1e-6
"""Bits per token below which a divergence counts as this much: the accuracy to which it is measured."""


@dataclass(frozen=True)
class Amplification:
    """How a divergence grows from the hook to the prediction.

    On a logarithmic scale it splits without remainder into what is wrong at the hook and what the model makes of it:

        log2 KL_full = log2 KL_0 + growth        KL_full = local * 2 ** growth

    A factor, and not a difference in bits: a block that scales every error scales the divergence in proportion, so
    the same model amplifies a small and a large error alike, and SAEs of unequal quality at one layer
    have one growth. Divergences below `KL_FLOOR` count as this, so that rounding does not pass for growth; an SAE
    that is exact at the hook and stays so has growth 0.

    Attributes:
        local: KL_0, read out at the hook, bits per token.
        full: KL of the model's own prediction, bits per token.
        growth: log2(KL_full / KL_0), doublings; negative where the remaining blocks undo the error.
        per_block: growth / number of remaining blocks; 0 if there are none.
        step: Horizon at the end of the steepest step between neighbouring horizons: most doublings per
            block; None if no step leads up.
        step_growth: Doublings per block in this step; None with it.
    """

    local: float
    full: float
    growth: float
    per_block: float
    step: Horizon | None
    step_growth: float | None


def amplification(kl: Mapping[Horizon, float], blocks_after: int) -> Amplification:
    """Split a divergence into local error and growth.

    Args:
        kl: Mean KL(M || S∘M) by horizon, bits per token; 0 and ``"full"`` among them. Horizons that leave no block
            are the same as ``"full"`` and take no part.
        blocks_after: Number of blocks that run after the patched one.

    Raises:
        CertifyError: If horizon 0 or ``"full"`` is missing.
    """
    if 0 not in kl or FULL not in kl:
        raise CertifyError(
            f"horizons {list(kl)} lack 0 or {FULL!r}: local error and growth need both"
        )
    blocks = {int(h): int(h) for h in kl if h == 0 or (h != FULL and int(h) < blocks_after)}
    ordered: list[Horizon] = [*sorted(blocks), FULL]
    at = {**blocks, FULL: blocks_after}
    logs = {h: math.log2(max(kl[h], KL_FLOOR)) for h in ordered}
    steepest: tuple[float, Horizon] | None = None
    for before, after in zip(ordered, ordered[1:], strict=False):
        if at[after] > at[before]:
            slope = (logs[after] - logs[before]) / (at[after] - at[before])
            if slope > 0.0 and (steepest is None or slope > steepest[0]):
                steepest = slope, after
    growth = logs[FULL] - logs[0]
    return Amplification(
        local=float(kl[0]),
        full=float(kl[FULL]),
        growth=growth,
        per_block=growth / blocks_after if blocks_after else 0.0,
        step=None if steepest is None else steepest[1],
        step_growth=None if steepest is None else steepest[0],
    )


def error_amplification(
    model: Any,
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    calibration: Any,
    evaluation: Any,
    horizons: Sequence[int] = PUBLISHED_HORIZONS,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Measure how the error of each SAE grows through the blocks after it; all share the base passes.

    Args:
        model: As for `certify`.
        saes: SAEs, at as many layers as wanted, by name; of a sequence, names are made from where they are.
        calibration: As for `certify`; decides the certificates' pool, not the divergences.
        evaluation: As for `certify`.
        horizons: Numbers of blocks after the patched one; 0 and the whole model always take part.
        config: Settings; the horizons take the place of those in it.
        output: Folder of the results.

    Returns:
        Rows: see `amplification_rows`.

    Raises:
        CertifyError: Before any long work, for impossible horizons, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    wanted = tuple(sorted({0, *horizons}))
    config = dataclasses.replace(config, horizons=wanted)
    documents = {"calibration": calibration, "evaluation": evaluation}
    certificates = certify_saes(model, saes, **documents, config=config, output=output)
    rows = amplification_rows(certificates)
    name = next(iter(certificates.values())).manifest["model"]["name"]
    title = f"Error amplification: {name}"
    experiment = Experiment(
        kind=KIND,
        title=title,
        certificates=certificates,
        rows=rows,
        findings=amplification_findings(rows),
        figure=amplification_figure(rows, title),
    )
    return saved(experiment, output)


def amplification_rows(certificates: Mapping[str, Certificate]) -> tuple[Row, ...]:
    """Return one row for each SAE and horizon.

    Args:
        certificates: By name of the SAE; measured with horizon 0 among others.

    Returns:
        Rows with ``name``, ``hook``, ``layer``, ``blocks_after``, ``horizon`` (a number of blocks, or
        ``"full"``; horizons that leave no block are the same as it and are left out) and, over
        sequences, mean, standard deviation and quantiles of the divergence, bits per token. The row ``"full"`` also
        has the `Amplification`. Mean: over independent draws (clusters); the
        published standard deviation is over batches of 16 sequences, so about a quarter of this one.
    """
    rows: list[Row] = []
    for name, certificate in certificates.items():
        hook = certificate.manifest["identity"]["hook_out"]
        after = blocks_after(certificate)
        columns: dict[Horizon, str] = {
            h: f"kl_h{h}" for h in certificate.config.horizons if h == 0 or h < after
        }
        columns[FULL] = "kl"
        found = amplification({h: certificate.mean(c) for h, c in columns.items()}, after)
        for horizon, column in columns.items():
            values = certificate.column(column)
            low, middle, high = (float(q) for q in np.quantile(values, (0.1, 0.5, 0.9)))
            last = horizon == FULL
            rows.append(
                {
                    "name": name,
                    "hook": hook,
                    "layer": layer_of(hook),
                    "blocks_after": after,
                    "horizon": horizon,
                    "kl": certificate.mean(column),
                    "sd": float(values.std()),
                    "kl_p10": low,
                    "kl_p50": middle,
                    "kl_p90": high,
                    "local": found.local if last else None,
                    "growth": found.growth if last else None,
                    "growth_per_block": found.per_block if last else None,
                    "steepest_step_to": found.step if last else None,
                    "steepest_step_growth": found.step_growth if last else None,
                }
            )
    return tuple(rows)


def blocks_after(certificate: Certificate) -> int:
    """Number of blocks that run after the one whose output the SAE replaces."""
    site = locate(certificate.manifest["identity"]["hook_out"])
    return certificate.manifest["model"]["n_layers"] - site.stop


def amplification_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say what the rows say: by SAE, and what tells layers apart."""
    ends = [row for row in rows if row["horizon"] == FULL]
    said = [_one(row) for row in ends]
    said.append(
        "Measured on these sequences, without confidence limits. Read-outs between blocks go through the final norm and "
        "unembedding, for which those residuals were not made: they locate growth."
    )
    ends = [row for row in ends if _number(row["blocks_after"]) > 0]  # elsewhere nothing can grow
    layers = [_number(row["layer"]) for row in ends if row["layer"] is not None]
    if len(set(layers)) > 1 and len(layers) == len(ends):
        said.append(_across(ends))
    return tuple(said)


def _one(row: Row) -> str:
    growth, local, full = (_number(row[key]) for key in ("growth", "local", "kl"))
    after = int(_number(row["blocks_after"]))
    if not after:
        return f"{row['name']}: {local:.4f} bits per token at the hook, and no block after it."
    blocks = "the block that follows" if after == 1 else f"the {after} blocks that follow"
    said = (
        f"{row['name']}: {local:.4f} bits per token at the hook, {full:.4f} after {blocks}, a factor of "
        f"{2.0**growth:.2f} ({growth:+.2f} doublings, {_number(row['growth_per_block']):+.2f} a block)"
    )
    if row["steepest_step_to"] is None:
        return f"{said}; no step leads up."
    where = (
        "the last blocks"
        if row["steepest_step_to"] == FULL
        else f"horizon {row['steepest_step_to']}"
    )
    return f"{said}; steepest up to {where} ({_number(row['steepest_step_growth']):+.2f} a block)."


def _across(ends: Sequence[Row]) -> str:
    """Whether earlier layers are amplified more, and whether growth or local error tells layers apart."""
    layers, growths = ([_number(row[key]) for row in ends] for key in ("layer", "growth"))
    locals_ = [math.log2(max(_number(row["local"]), KL_FLOOR)) for row in ends]
    pairs = [
        (growths[i] - growths[j]) * (layers[j] - layers[i])
        for i in range(len(ends))
        for j in range(i)
        if layers[i] != layers[j]
    ]
    agreeing = sum(pair > 0 for pair in pairs)
    spread = {"growth": max(growths) - min(growths), "local error": max(locals_) - min(locals_)}
    larger, smaller = sorted(spread, key=spread.__getitem__, reverse=True)
    if agreeing == len(pairs):
        said = "Earlier layers are amplified more, without exception, as the paper found"
    else:
        said = (
            f"The earlier layer is amplified more in {agreeing} of {len(pairs)} pairs of layers"
            + ("" if 2 * agreeing > len(pairs) else ", which is not what the paper found")
        )
    return (
        f"{said}. Layers differ more in {larger} ({spread[larger]:.2f} doublings between the extremes) than in "
        f"{smaller} ({spread[smaller]:.2f})."
    )


def _number(value: Any) -> float:
    return float(value)
