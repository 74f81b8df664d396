"""The form that would be saved: as SAELens saves it, from weights that stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import D_MODEL, D_SAE, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, SAETrainer, StandardSAE, StandardSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

from saelens_certify import CertifyError
from saelens_certify.integrations.sae_lens import inference_form

ARCHITECTURES = sorted(SAE_TRAINING_CLASS_REGISTRY)
SHARED = ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"]


def training_sae(architecture: str, seed: int = 0, **options: Any) -> Any:
    """A training SAE whose every parameter and buffer is far from its initial value."""
    sae_class, config_class = get_sae_training_class(architecture)
    special: dict[str, Any] = {}
    if "topk" in architecture:
        special["k"] = 8
    if architecture == "matryoshka_batchtopk":
        special["matryoshka_widths"] = [16, D_SAE]
    torch.manual_seed(seed)
    sae: Any = sae_class(
        config_class(
            d_in=D_MODEL,
            d_sae=D_SAE,
            metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"),
            **{**special, **options},
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.35)
    return sae


def scalers() -> dict[str, ActivationScaler]:
    """No scaling, a factor, a whitening, and both."""
    torch.manual_seed(1)
    matrix = torch.eye(D_MODEL, dtype=torch.float64) + 0.05 * torch.randn(D_MODEL, D_MODEL)
    whitening = ActivationWhitening(
        mean=torch.randn(D_MODEL, dtype=torch.float64),
        matrix=matrix.double(),
        inverse_matrix=torch.linalg.inv(matrix.double()),
    )
    return {
        "none": ActivationScaler(),
        "factor": ActivationScaler(scaling_factor=0.4),
        "whitening": ActivationScaler(whitening=whitening),
        "both": ActivationScaler(scaling_factor=0.4, whitening=whitening),
    }


def snapshot(sae: Any) -> dict[str, Any]:
    """Everything about an SAE that a caller could notice."""
    return {
        "state": {name: value.clone() for name, value in sae.state_dict().items()},
        "pointers": {name: value.data_ptr() for name, value in sae.named_parameters()},
        "grads": {
            name: None if value.grad is None else value.grad.clone()
            for name, value in sae.named_parameters()
        },
        "cfg": copy.deepcopy(sae.cfg.to_dict()),
        "training": sae.training,
        "attributes": sorted(vars(sae)),
        "rng": (torch.get_rng_state(), str(np.random.get_state())),  # noqa: NPY002
    }


def assert_same(left: Any, right: Any) -> None:
    """Bitwise equality of nested containers."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_sae_lens_would_save(architecture: str, tmp_path: Path) -> None:
    sae = training_sae(architecture)
    before = snapshot(sae)
    found = inference_form(sae, ActivationScaler())
    assert_same(snapshot(sae), before)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert type(found) is type(saved)
    assert found.cfg.to_dict() == saved.cfg.to_dict()
    assert_same(dict(found.state_dict()), dict(saved.state_dict()))


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("scaler", ["factor", "whitening", "both"])
def test_the_scaler_is_folded(architecture: str, scaler: str) -> None:
    """On raw activations the result does what the scaled SAE did between scale and unscale."""
    sae = training_sae(architecture, seed=2)
    scaling = scalers()[scaler]
    before = snapshot(sae)
    found = inference_form(sae, scaling)
    assert_same(snapshot(sae), before)
    # Also by saving: SAELens's own inference form, given scaled activations.
    plain = inference_form(sae)
    x = torch.randn(200, D_MODEL) * 3 + 1
    with torch.no_grad():
        wanted = scaling.unscale(plain(scaling.scale(x)))
        torch.testing.assert_close(found(x), wanted, atol=2e-4, rtol=2e-4)
        assert (found.encode(x) != 0).any()
    assert found.cfg.normalize_activations == "none"
    assert scaling.scaling_factor == scalers()[scaler].scaling_factor


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "standard"])
def test_an_inference_sae_is_folded_on_a_copy(kind: str) -> None:
    sae = make_sae(kind, normalize_activations="expected_average_only_in")
    scaling = scalers()["factor"]
    before = snapshot(sae)
    found = inference_form(sae, scaling)
    assert_same(snapshot(sae), before)
    assert found is not sae
    x = torch.randn(100, D_MODEL) * 3
    with torch.no_grad():
        wanted = scaling.unscale(sae(scaling.scale(x)))
        torch.testing.assert_close(found(x), wanted, atol=2e-4, rtol=2e-4)


def test_nothing_to_do_gives_the_same_object() -> None:
    sae = make_sae("topk")
    assert inference_form(sae, ActivationScaler()) is sae
    assert inference_form(sae) is sae


@settings(max_examples=20)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_it_is_what_the_trainer_ends_with(factor: float, seed: int) -> None:
    """Folding on a copy equals what `SAETrainer.fit` does to the SAE at its end."""
    sae = training_sae("batchtopk", seed=seed)
    found = inference_form(sae, ActivationScaler(scaling_factor=factor))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=0,
            train_batch_size_samples=4,
            lr_end=1e-4,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(()),
    )
    trainer.activation_scaler.scaling_factor = factor
    assert_same(dict(found.state_dict()), dict(inference_form(trainer.fit()).state_dict()))


def test_the_copy_does_not_write_to_the_original() -> None:
    """SAELens's normalisation closures write to the module that made them; a deep copy keeps them."""
    sae = training_sae("topk", normalize_activations="layer_norm")
    found = inference_form(sae)
    found.encode(torch.randn(3, D_MODEL))
    assert hasattr(found, "ln_mu")
    assert not hasattr(sae, "ln_mu")


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_a_scaler_beside_per_token_normalisation_is_refused(mode: str) -> None:
    sae = make_sae("topk", normalize_activations=mode)
    with pytest.raises(CertifyError, match="folding would be wrong"):
        inference_form(sae, ActivationScaler(scaling_factor=2.0))


def test_what_sae_lens_cannot_fold_is_refused() -> None:
    sae = training_sae("matching_pursuit")
    scaling = scalers()["whitening"]
    before = snapshot(sae)
    with pytest.raises(CertifyError, match="cannot be folded into a 'matching_pursuit' SAE"):
        inference_form(sae, scaling)
    assert_same(snapshot(sae), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("moved", ["by itself", "with its configuration"])
@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "inference"])
def test_the_precision_is_that_of_the_weights(
    architecture: str, moved: str, dtype: torch.dtype
) -> None:
    """`sae.half()` changes the weights alone; a copy in the configured float32 would be another SAE."""
    sae = make_sae("topk") if architecture == "inference" else training_sae(architecture)
    if moved == "by itself":
        torch.nn.Module.to(sae, dtype=dtype)
        assert sae.cfg.dtype == "float32"
    else:
        sae.to(dtype=dtype)
    before = snapshot(sae)
    found = inference_form(sae, ActivationScaler(scaling_factor=0.5))
    assert_same(snapshot(sae), before)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    assert found.cfg.dtype == str(dtype).removeprefix("torch.")
    assert found.dtype == dtype
    assert torch.equal(found.b_dec, sae.b_dec / 0.5)
    assert found(torch.randn(4, D_MODEL, dtype=dtype)).dtype == dtype


def test_several_precisions_are_refused() -> None:
    sae = training_sae("topk")
    sae.W_enc.data = sae.W_enc.data.half()
    with pytest.raises(CertifyError, match=r"several dtypes \(torch.float16, torch.float32\)"):
        inference_form(sae)


def test_an_error_term_is_refused_and_not_lost_in_the_copy() -> None:
    for sae in (training_sae("topk"), make_sae("topk")):
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            sae.use_error_term = True
        with pytest.raises(CertifyError, match="use_error_term=True"):
            inference_form(sae, ActivationScaler(scaling_factor=2.0))
        assert sae.use_error_term


def test_a_class_without_a_decoder_matrix_has_a_device_too() -> None:
    class Factored(StandardSAE):
        """A third party's: its decoder is a product."""

        def initialize_weights(self) -> None:
            super().initialize_weights()
            del self.W_dec
            self.left = torch.nn.Parameter(torch.randn(D_SAE, 3))
            self.right = torch.nn.Parameter(torch.randn(3, D_MODEL))

        def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
            self.W_enc.data *= scaling_factor
            self.right.data /= scaling_factor
            self.b_dec.data /= scaling_factor

    sae = Factored(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE))
    found = inference_form(sae, ActivationScaler(scaling_factor=2.0))
    assert torch.equal(found.right, sae.right / 2)
    assert found.right.device == sae.right.device
