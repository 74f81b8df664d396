"""Studies and predictions where model or SAE are on another device, and whatever torch's defaults are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from engine import second_device
from engine.builders import SEQ_LEN, make_tokens
from engine.second_device import SECOND
from engine.test_devices import CPU, PLACES, model_on, sae_on
from saelens_certify import Certificate, CertifyConfig, as_sequences
from saelens_certify.forward import ForwardEngine
from saelens_certify.measure import calibrate
from saelens_certify.predictions import TokenOutputs, token_outputs
from saelens_certify.saes import adapt
from saelens_certify.study import Setting, View, certify_many
from saelens_certify.subject import Reader, Subject

CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, coding="topk:6", permutations=1, matched_permutations=1, error_permutations=2, random_decoders=1,
    random_unit_decoders=1, horizons=(0, 1), tau=4, progress=False,
)  # fmt: skip
CALIBRATION, EVALUATION = (
    as_sequences(make_tokens(n, seed=seed), seq_len=SEQ_LEN, d_vocab=101)
    for n, seed in ((12, 1), (16, 2))
)

pytestmark = pytest.mark.usefixtures("_second_device")


@pytest.fixture(scope="module")
def _second_device() -> None:
    second_device.load()


def study(model: Any, sae: Any, output: Any = None) -> dict[str, Certificate]:
    base = Setting(sae, View(CALIBRATION), View(EVALUATION), CONFIG)
    short = dataclasses.replace(CONFIG, seq_len=6, alpha=0.2)
    settings = {
        "base": base,
        "k": dataclasses.replace(base, config=dataclasses.replace(CONFIG, coding="topk:3")),
        "tau": dataclasses.replace(base, config=dataclasses.replace(CONFIG, tau=7)),
        "budget": dataclasses.replace(base, calibration=View(CALIBRATION, first=9)),
        "short": Setting(sae, View(CALIBRATION, length=6), View(EVALUATION, length=6), short),
    }
    return certify_many(model, settings, output=output)


def predictions(model: Any, sae: Any) -> dict[str, TokenOutputs]:
    adapter, engine = adapt(sae), ForwardEngine(model)
    readers = {"sae": Reader(adapter, CONFIG)}
    counted = calibrate(engine, readers, CALIBRATION.tokens, CONFIG)["sae"]
    subjects = {"sae": Subject.of(adapter, counted, CONFIG)}
    return token_outputs(engine, subjects, EVALUATION.tokens, CONFIG)["sae"]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_depends_on_the_device_or_on_defaults(place, tmp_path) -> None:
    home = model_on(CPU), sae_on(CPU)
    expected, tokens = study(*home), predictions(*home)
    assert any(0 < each.measured.eta < 1 for each in expected.values())
    device, sae_device = PLACES[place]
    away = model_on(device), sae_on(sae_device)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(SECOND):
            found = study(*away, output=tmp_path)
            again = study(*away, output=tmp_path)  # from the folders
            elsewhere = predictions(*away)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, certificate in expected.items():
        for other in (found[name], again[name]):
            assert torch.equal(other.calibration.counts, certificate.calibration.counts)
            for column in certificate.evidence.column_names:
                if column.startswith(("loss", "kl", "violation", "mse")):
                    mine, theirs = (
                        np.array(each.evidence.column(column).to_pylist(), dtype=float)
                        for each in (other, certificate)
                    )
                    np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5, err_msg=column)
    for name, outputs in tokens.items():
        torch.testing.assert_close(elsewhere[name].logprob, outputs.logprob, atol=1e-5, rtol=1e-5)
        assert torch.equal(elsewhere[name].run, outputs.run)
