"""Certificates of tiny SAEs, and monitors of them."""

from __future__ import annotations

import functools
from typing import Any

from engine.builders import SEQ_LEN, make_sae, make_tokens, of_class

from saelens_certify import Certificate, CertifyConfig, certify
from saelens_certify.monitor import Monitor

HOOKS = {
    "hook_z": "blocks.1.attn.hook_z",
    "transcoder": "blocks.1.ln2.hook_normalized",
    "skip_transcoder": "blocks.1.ln2.hook_normalized",
}

EVALUATION = make_tokens(60, seed=2)


@functools.cache
def subject(kind: str = "topk", **overrides: Any) -> Any:
    """An SAE; kind ``"hook_z"`` is a top-k SAE on the heads."""
    if kind == "hook_z":
        return make_sae("topk", HOOKS[kind], reshape_activations="hook_z", **overrides)
    return make_sae(kind, HOOKS.get(kind, "blocks.1.hook_resid_post"), **overrides)


@functools.cache
def model_of(model_class: str) -> Any:
    """One model for all tests."""
    return of_class(model_class)


@functools.cache
def certified(
    kind: str = "topk", model_class: str = "HookedTransformer", **settings: Any
) -> Certificate:
    """A certificate whose pool is small enough to be violated often."""
    return certify(
        model_of(model_class),
        subject(kind),
        calibration=make_tokens(6, seed=1),
        evaluation=EVALUATION,
        config=CertifyConfig(seq_len=SEQ_LEN, progress=False, **settings),
    )


def monitor(
    kind: str = "topk", model_class: str = "HookedTransformer", **options: Any
) -> tuple[Any, Monitor]:
    """A model, and a monitor that measures everything and hides no error."""
    certificate = options.pop("certificate", None) or certified(kind, model_class)
    options = {"share": 1.0, "on_error": "raise", "false_alarm": 1e-9} | options
    return model_of(model_class), Monitor(certificate, subject(kind), **options)
