"""Certificates with made-up evidence, on the provenance of a real run."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
from engine.builders import D_VOCAB, SEQ_LEN, hooked_transformer, make_sae, make_tokens

from saelens_certify import Certificate, CertifyConfig, certify
from saelens_certify.bounds import loss_cap
from saelens_certify.evidence import to_table

CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)
_HIGHEST = float(loss_cap(D_VOCAB))


@functools.cache
def real() -> Certificate:
    """A run on a tiny model, of which settings and calibration are taken."""
    return certify(
        hooked_transformer(), make_sae(), calibration=make_tokens(12, seed=1),
        evaluation=make_tokens(8, seed=2), config=CONFIG,
    )  # fmt: skip


def certificate(
    hook: str = "blocks.1.hook_resid_post",
    *,
    risk: float = 2.0,
    gap: float = 0.1,
    eta: float = 0.0,
    n: int = 400,
    seed: int = 0,
    clusters: list[str | None] | None = None,
    **settings: Any,
) -> Certificate:
    """A certificate whose losses have about these means; V = 101, so that a uniform guess has 6.66 bits."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(risk - 0.5, risk + 0.5, n)
    sae = np.minimum(base + gap * rng.uniform(0.5, 1.5, n), _HIGHEST)
    violation = rng.random(n) < eta
    pool = np.where(violation, np.minimum(sae + 0.05, _HIGHEST), sae)
    columns = {
        "loss_base": base,
        "loss_sae": sae,
        "loss_pool": pool,
        "violation": violation,
        "loss_unigram": rng.uniform(4.0, 6.0, n),
        "rarest": np.where(violation, 0.0, 99.0),
        "mse": rng.uniform(0.1, 0.3, n),
        "variance": rng.uniform(1.0, 2.0, n),
        **{f"{key}{suffix}": rng.gamma(2.0, 0.2, n) for key in ("kl", "gold_logprob_gap") for suffix in ("", "_pool")},
        **{f"top1_agreement{suffix}": rng.integers(0, 12, n) / 11 for suffix in ("", "_pool")},
    }  # fmt: skip
    manifest = copy.deepcopy(dict(real().manifest))
    manifest["identity"]["hook_out"] = hook
    manifest["config"] = dataclasses.replace(CONFIG, **settings).to_dict()
    sizes = None if clusters is None else [1] * n
    table = to_table([f"{i:06}" for i in range(n)], [""] * n, columns, clusters, sizes)
    return Certificate(manifest, real().calibration, table)
