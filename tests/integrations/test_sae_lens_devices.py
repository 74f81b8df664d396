"""SAELens's evaluations, stores and training with model and SAE on different devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine import second_device
from engine.second_device import SECOND, THIRD
from engine.test_devices import CPU, PLACES, assert_same, assert_unmoved, snapshot
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from torch import Tensor

from integrations import sae_lens_world as world
from integrations.test_sae_lens_inference import SHARED, training_sae
from saelens_certify import CertifyConfig, certify
from saelens_certify.integrations.sae_lens import CertifyingEvaluator, inference_form, run_evals

CONFIG = CertifyConfig(seq_len=world.SEQ_LEN, progress=False)

pytestmark = pytest.mark.usefixtures("_second_device")


@pytest.fixture(scope="module")
def _second_device() -> None:
    second_device.load()


def model_on(device: str) -> Any:
    model = copy.deepcopy(world.model())
    return model if device == CPU else model.to(device)


def on(device: str, sae: Any) -> Any:
    return sae.to(device=torch.device(device))


@pytest.mark.parametrize("place", PLACES)
def test_run_evals(place) -> None:
    def evaluated(device: str, sae_device: str) -> dict[str, float]:
        model, sae = model_on(device), on(sae_device, world.trained_sae())
        store = world.store_of(model, sae, world.text_dataset(), device=device)
        before = snapshot(model, sae)
        metrics, _ = run_evals(
            sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2),
            certify_config=CONFIG, n_calibration_sequences=30, n_evaluation_sequences=20,
        )  # fmt: skip
        assert_unmoved(before, model, sae)
        return metrics["faithfulness_certificate"]

    assert evaluated(*PLACES[place]) == pytest.approx(evaluated(CPU, CPU), abs=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_stores_as_documents(place) -> None:
    def certified(device: str, sae_device: str) -> Any:
        model, sae = model_on(device), on(sae_device, world.trained_sae())
        store = world.store_of(model, sae, world.text_dataset(), device=device)
        return certify(model, sae, calibration=store, evaluation=store, config=CONFIG)

    assert_same(certified(*PLACES[place]), certified(CPU, CPU))


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("place", PLACES)
def test_a_certificate_in_training(architecture, place) -> None:
    texts = world.texts(200)

    def evaluated(device: str, sae_device: str) -> dict[str, float]:
        model, sae = model_on(device), on(sae_device, training_sae(architecture))
        evaluator = CertifyingEvaluator(
            model=model, calibration=texts[:100], evaluation=texts[100:], config=CONFIG
        )
        before = snapshot(model, sae)
        metrics = evaluator(sae, None, ActivationScaler(scaling_factor=0.7))
        assert_unmoved(before, model, sae)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    found, expected = evaluated(*PLACES[place]), evaluated(CPU, CPU)
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(found) > 5


@pytest.mark.parametrize("scaler_device", [CPU, SECOND, THIRD])
@pytest.mark.parametrize("sae_device", [CPU, SECOND])
def test_whitening_from_another_device_is_folded(sae_device, scaler_device) -> None:
    """SAELens computes it where the activations are."""

    def folded(sae_device: str, scaler_device: str) -> dict[str, Tensor]:
        whitening = ActivationWhitening(
            mean=torch.linspace(-1, 1, 32, dtype=torch.float64).to(scaler_device),
            matrix=2 * torch.eye(32, dtype=torch.float64).to(scaler_device),
            inverse_matrix=torch.eye(32, dtype=torch.float64).to(scaler_device) / 2,
        )
        sae = on(sae_device, training_sae("topk"))
        before = snapshot(sae)
        result = inference_form(sae, ActivationScaler(whitening=whitening))
        assert_unmoved(before, sae)
        assert {str(each.device) for each in result.state_dict().values()} == {sae_device}
        return {name: value.cpu() for name, value in result.state_dict().items()}

    torch.testing.assert_close(folded(sae_device, scaler_device), folded(CPU, CPU))
