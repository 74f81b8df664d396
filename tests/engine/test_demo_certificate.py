"""The README's first command on the bundled model: what it promises must come out."""

from __future__ import annotations

import pytest
import torch

from saelens_certify import Certificate, verify
from saelens_certify.cli import EXIT_DONE, main


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Certificate:
    folder = tmp_path_factory.mktemp("demo") / "demo-output"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--output", str(folder), "--no-progress"]) == EXIT_DONE
    finally:
        torch.set_num_threads(before)
    return verify(folder).certificate


def test_late_layer_is_certified(certificate) -> None:
    assert certificate.nonvacuous
    assert certificate.bounds["u_sae_occam"].value < certificate.baselines["unigram"]
    assert certificate.measured.n_sequences > 3900


def test_controls_are_clearly_worse(certificate) -> None:
    gap = certificate.measured.gap
    assert gap < 0.3
    assert set(certificate.controls) == {"permuted_0", "random_decoder_0"}
    for control in certificate.controls.values():
        assert control["gap"] > 10 * gap
