"""A small certified SAE in a folder, and its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens

from saelens_certify import Certificate, CertifyConfig, certify


@dataclass(frozen=True)
class Certified:
    """What is certified, and how it went.

    Attributes:
        sae: The SAE's folder, as it was certified; tests work on copies.
        run: The run's folder.
        certificate: The certificate.
    """

    sae: Path
    run: Path
    certificate: Certificate


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """Certify a TopK SAE from a folder, with controls."""
    root = tmp_path_factory.mktemp("certified")
    make_sae().save_model(root / "layer_1")
    certificate = certify(
        hooked_transformer(),
        root / "layer_1",
        calibration=make_tokens(40, seed=1),
        evaluation=make_tokens(50, seed=2),
        config=CertifyConfig(
            seq_len=SEQ_LEN, permutations=2, random_decoders=1, part_sequences=32, progress=False
        ),
        output=root / "run",
    )
    return Certified(root / "layer_1", root / "run", certificate)
