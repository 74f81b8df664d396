"""Certificates of sparsify checkpoints against transformers: the module's output is replaced there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.builders import D_MODEL, D_VOCAB, make_tokens
from torch import Tensor

from saelens_certify import CertifyConfig, CertifyError, certify
from saes.sparsify_files import Checkpoint, checkpoint, write
from saes.test_sparsify_hooks import hookpoints, models, replaced_output

EVALUATION = make_tokens(40, seed=2)
KINDS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "autoencoder with skip": {"skip_connection": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "groupmax skip transcoder": {
        "transcode": True, "skip_connection": True, "activation": "groupmax", "k": 8,
    },
}  # fmt: skip


@torch.no_grad()
def losses(logits: Tensor) -> Tensor:
    """Smoothed loss of each sequence in bits, sorted."""
    targets = EVALUATION[:, 1:, None]
    probabilities = logits[:, :-1].double().softmax(dim=-1).gather(-1, targets)[..., 0]
    bits = (0.5 * probabilities + 0.5 / D_VOCAB).log2().mean(dim=-1)
    return (-bits).sort().values


@torch.no_grad()
def replaced_losses(hf_model: Any, hookpoint: str, coder: Checkpoint) -> Tensor:
    def reconstruct(given: Tensor) -> Tensor:
        return coder.forward(given.flatten(0, 1)).reshape(given.shape).float()

    module = hf_model.base_model.get_submodule(hookpoint)
    with replaced_output(module, coder.config["transcode"], reconstruct):
        return losses(hf_model(EVALUATION).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia"])
def test_losses_are_those_of_the_model_with_the_module_replaced(
    family: str, kind: str, tmp_path: Path
) -> None:
    hf_model, model = models(family)
    for hookpoint in hookpoints(family):
        coder = checkpoint(D_MODEL, **{"k": 6, **KINDS[kind]})
        folder = write(coder, tmp_path / hookpoint)
        certificate = certify(
            model,
            folder,
            calibration=make_tokens(20, seed=1),
            evaluation=EVALUATION,
            config=CertifyConfig(seq_len=EVALUATION.shape[1], progress=False),
        )
        found = torch.tensor(certificate.evidence["loss_sae"].to_numpy()).sort().values
        expected = replaced_losses(hf_model, hookpoint, coder)
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)
        with torch.no_grad():
            assert (losses(hf_model(EVALUATION).logits) - expected).abs().mean() > 0.01


def test_hooks_after_another_norm_are_found_before_any_work(tmp_path: Path) -> None:
    folder = write(checkpoint(D_MODEL), tmp_path / "layers.1.mlp")
    tokens = make_tokens(20, seed=1)
    with pytest.raises(CertifyError, match="ln2_post"):
        certify(models("gemma2")[1], folder, calibration=tokens, evaluation=EVALUATION)
