"""A store wherever documents are taken: as sequences, by `certify`, by `verify`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integrations import sae_lens_world as world
from saelens_certify import CertifyConfig, CertifyError, certify, verify
from saelens_certify.data import as_sequences, load_documents
from saelens_certify.integrations.sae_lens import sequences_of_store
from saelens_certify.preparation import sequences_for

CONFIG = CertifyConfig(seq_len=world.SEQ_LEN, progress=False, seed=5)
SETTINGS: dict[str, Any] = {"seq_len": world.SEQ_LEN, "d_vocab": world.D_VOCAB}


def test_a_store_is_a_source_like_any_other() -> None:
    store = world.store()
    wanted = sequences_of_store(store, CONFIG)
    assert as_sequences(store, **SETTINGS).hashes == wanted.hashes
    assert sequences_for(world.model(), store, CONFIG).hashes == wanted.hashes
    assert load_documents(store).source.kind == "activations_store"
    sampled = sequences_for(world.model(), store, CONFIG, limit=30)
    assert sampled.hashes == sequences_of_store(store, CONFIG, limit=30).hashes
    assert sampled.hashes != wanted.hashes[:30]


def test_its_own_bos_rule_holds() -> None:
    sae = world.trained_sae()
    sae.cfg.metadata.prepend_bos = False
    store = world.store(sae=sae)
    found = as_sequences(store, **SETTINGS, tokenizer=world.tokenizer(), prepend_bos=True)
    assert not found.source.prepends_bos
    assert sequences_for(world.model(), store, CONFIG).hashes == found.hashes


def test_what_does_not_go_with_a_store_is_refused() -> None:
    with pytest.raises(CertifyError, match="split='test' goes with a dataset"):
        as_sequences(world.store(), **SETTINGS, split="test")
    with pytest.raises(CertifyError, match="document_ids= goes with"):
        as_sequences(world.store(), **SETTINGS, document_ids=["a"])
    stream = world.store(world.text_dataset().to_iterable_dataset())
    with pytest.raises(CertifyError, match="limit="):
        as_sequences(stream, **SETTINGS)
    assert len(as_sequences(stream, **SETTINGS, limit=7)) == 7


@pytest.mark.filterwarnings("ignore:the ActivationsStore:UserWarning")
@pytest.mark.parametrize("sides", ["one store", "two stores", "texts and a store", "a stream"])
def test_verify_takes_the_store_that_certify_took(sides: str, tmp_path: Path) -> None:
    sae = world.trained_sae()
    if sides == "a stream":
        evaluation = world.store(world.text_dataset().to_iterable_dataset(), sae)
    else:
        evaluation = world.store(sae=sae)
    calibration: Any = {
        "two stores": world.store(world.text_dataset(seed=4), sae),
        "texts and a store": world.texts(60, seed=4),
    }.get(sides, evaluation)
    certificate = certify(
        world.model(),
        sae,
        calibration=calibration,
        evaluation=evaluation,
        config=CONFIG,
        output=tmp_path,
    )
    measured = {"model": world.model(), "sae": sae, "sample": 8}
    again = verify(tmp_path, evaluation=evaluation, **measured)
    assert again.n_remeasured == 8
    assert again.largest_difference < 1e-4
    assert again.n_sequences == len(certificate.evidence)
    other = world.store(world.text_dataset(seed=9), sae)
    with pytest.raises(CertifyError, match="not the certified evaluation sequences"):
        verify(tmp_path, evaluation=other, **measured)


def test_the_core_imports_no_integration() -> None:
    """Imports go from integrations to the core; data knows stores without SAELens."""
    code = (
        "import sys, saelens_certify.certification, saelens_certify.verification\n"
        "print([n for n in sys.modules if n.startswith('saelens_certify.integrations')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
    data = Path(sys.modules["saelens_certify"].__file__ or "").parent / "data"
    for path in data.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("import sae_lens", "from sae_lens")), path
            assert "saelens_certify.integrations" not in line, path
