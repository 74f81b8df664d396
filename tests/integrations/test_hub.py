"""Certificates beside SAEs, in repositories and in model cards."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from saes.hub_cache import HubCache, hub
from safetensors.torch import load_file, save_file

from integrations.certified import Certified, certified
from saelens_certify import CertifyConfig, CertifyError, EvidenceError, certify, verify
from saelens_certify.integrations.hub import (
    attach,
    read_certificate,
    update_readme,
    upload_saes_to_huggingface,
)
from saelens_certify.integrations.model_card import insert_section, model_card_section
from saelens_certify.saes.loading import open_sae

__all__ = ["certified", "hub"]

CARD = "---\nlibrary_name: saelens\ntags:\n- sae\n---\n\n# Mine\n\nWords.\n"


@pytest.fixture
def folder(certified: Certified, tmp_path: Path) -> Path:
    """A copy of the certified SAE's folder."""
    return Path(shutil.copytree(certified.sae, tmp_path / "saes" / "layer_1"))


class FakeApi:
    """The hub's client on a dict; which files an upload takes is decided by the hub's own code."""

    files: dict[str, bytes]

    def __init__(self) -> None:
        self.files = FakeApi.files

    def repo_info(self, _repo_id: str) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    def upload_folder(self, *, folder_path, path_in_repo, allow_patterns, **_: Any) -> None:
        names = [
            str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()
        ]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            self.files[f"{path_in_repo}/{name}"] = (Path(folder_path) / name).read_bytes()

    def upload_file(self, *, path_or_fileobj, path_in_repo, **_: Any) -> None:
        content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else path_or_fileobj.read()
        self.files[path_in_repo] = content

    def hf_hub_download(self, _repo_id: str, name: str, **_: Any) -> str:
        if name not in self.files:
            raise EntryNotFoundError(name)
        path = FakeApi.scratch / name
        path.write_bytes(self.files[name])
        return str(path)

    scratch: Path


@pytest.fixture
def api(monkeypatch, tmp_path) -> type[FakeApi]:
    """Everything that would reach the hub goes to `FakeApi`."""
    FakeApi.files = {}
    FakeApi.scratch = tmp_path / "downloads"
    FakeApi.scratch.mkdir()
    module = importlib.import_module("sae_lens.training.upload_saes_to_huggingface")
    monkeypatch.setattr(module, "HfApi", FakeApi)
    monkeypatch.setattr(module, "create_repo", lambda _: None)
    monkeypatch.setattr(module, "_repo_file_exists", lambda _r, name, _v: name in FakeApi.files)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    return FakeApi


@pytest.mark.parametrize("form", ["folder", "object"])
def test_attached_certificates_are_the_run_s_own(certified, folder, form) -> None:
    path = attach(certified.run if form == "folder" else certified.certificate, folder)
    assert path == folder / "certificate.json"
    assert path.read_bytes() == (certified.run / "certificate.json").read_bytes()
    assert not (folder / "certificate").exists()
    assert read_certificate(folder)["sae_lens_id"] == "layer_1"
    assert open_sae(folder).sae.cfg.k == 8  # still an SAE folder


def test_attached_evidence_can_be_verified_by_others(certified, folder) -> None:
    for _ in range(2):
        attach(certified.run, folder, evidence=True)
    assert verify(folder / "certificate").n_sequences == 50
    names = {p.name for p in (folder / "certificate").rglob("*") if p.is_file()}
    assert names == {
        "certificate.json", "manifest.json", "calibration.safetensors", "part-00000.parquet",
        "part-00001.parquet",
    }  # fmt: skip
    shutil.rmtree(folder / "certificate")
    (folder / "certificate").mkdir()
    with pytest.raises(CertifyError, match="holds no run; move it"):
        attach(certified.run, folder, evidence=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_attaching_attached_evidence_leaves_it(certified, folder, tmp_path) -> None:
    attach(certified.run, folder, evidence=True)
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    for run in (folder / "certificate", tmp_path / "link" / "certificate"):
        attach(run, folder, evidence=True)
        assert contents(folder) == before


@pytest.mark.parametrize("finished", [True, False])
def test_evidence_of_another_certificate_does_not_stay_beside_it(
    certified, folder, api, tmp_path, finished
) -> None:
    """The same SAE, certified anew with another alpha."""
    config = certified.certificate.manifest["config"] | {"alpha": 0.7, "progress": False}
    second = certify(
        hooked_transformer(),
        certified.sae,
        calibration=make_tokens(40, seed=1),
        evaluation=make_tokens(50, seed=2),
        config=CertifyConfig(**config),
        output=tmp_path / "second",
    )
    attach(certified.run, folder, evidence=True)
    attach(certified.run, folder)  # its own evidence may stay
    if not finished:
        (folder / "certificate" / "certificate.json").unlink()
    before = contents(folder)
    with pytest.raises(CertifyError, match=r"of another certificate; .*evidence=True"):
        attach(second, folder)
    assert contents(folder) == before
    shutil.copy(tmp_path / "second" / "certificate.json", folder)
    with pytest.raises(CertifyError, match="of another certificate"):
        upload_saes_to_huggingface({"layer_1": folder}, "someone/saes", show_progress=False)
    assert not api.files
    attach(tmp_path / "second" / "certificate.json", folder, evidence=True)
    assert verify(folder / "certificate").certificate.config.alpha == 0.7
    assert read_certificate(folder)["eval_config"]["alpha"] == 0.7


def test_a_copy_that_fails_leaves_what_was_attached(certified, folder, monkeypatch) -> None:
    attach(certified.run, folder, evidence=True)
    before = contents(folder)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        attach(certified.run, folder, evidence=True)
    assert contents(folder) == before


def test_the_certificate_of_another_sae_is_refused(certified, folder) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_dec"][0] += 1e-6
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(CertifyError, match="not about the SAE in .*weights hash to"):
        attach(certified.run, folder)
    assert not (folder / "certificate.json").exists()


def test_the_same_weights_under_other_settings_are_refused(certified, folder) -> None:
    config = json.loads((folder / "cfg.json").read_text()) | {"k": 9}
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CertifyError, match=r"settings in its cfg.json \(k, "):
        attach(certified.run, folder)


def test_a_certificate_of_rounded_weights_is_refused(folder, tmp_path) -> None:
    """Verifying from the checkpoint loads it in the certified dtype."""
    with pytest.warns(UserWarning, match="rounded"):
        rounded = open_sae(folder, dtype="bfloat16")
    certificate = certify(
        hooked_transformer(),
        rounded,
        calibration=make_tokens(20, seed=1),
        evaluation=make_tokens(20, seed=2),
        config=CertifyConfig(seq_len=SEQ_LEN, progress=False),
        output=tmp_path / "run",
    )
    with pytest.warns(UserWarning, match="rounded"):
        checked = verify(
            tmp_path / "run",
            model=hooked_transformer(),
            sae=folder,
            evaluation=make_tokens(20, seed=2),
        )
    assert checked.n_remeasured == 20
    with pytest.raises(CertifyError, match="weights rounded to bfloat16.*stores them in float32"):
        attach(certificate, folder)
    rounded.sae.save_model(tmp_path / "bf16")
    attach(certificate, tmp_path / "bf16")


def test_edited_runs_are_refused(certified, folder, tmp_path) -> None:
    run = Path(shutil.copytree(certified.run, tmp_path / "run"))
    text = (run / "certificate.json").read_text()
    bound = f"{certified.certificate.bounds['u_sae'].value}"
    (run / "certificate.json").write_text(text.replace(bound, "1.5"))
    with pytest.raises(EvidenceError, match="edited"):
        attach(run, folder)


def test_saelens_alone_leaves_the_certificate_behind(certified, folder, api) -> None:
    """The reason for `upload_saes_to_huggingface`: SAELens uploads only the names it knows."""
    from sae_lens import upload_saes_to_huggingface as plain

    attach(certified.run, folder)
    plain({"layer_1": folder}, "someone/saes", show_progress=False)
    assert "layer_1/cfg.json" in api.files
    assert "layer_1/certificate.json" not in api.files


@pytest.mark.parametrize("evidence", [False, True])
def test_uploaded_repositories_hold_the_certificates(
    certified, folder, api, hub: HubCache, evidence
):
    attach(certified.run, folder, evidence=evidence)
    saes = {"layer_1": folder, "layer_2": make_sae("jumprelu")}
    upload_saes_to_huggingface(saes, "someone/saes", show_progress=False)
    card = api.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\n---\n")
    assert certified.certificate.verdict() in card
    assert "- layer_2" in card  # SAELens's own text is still there
    expected = {"README.md"} | {
        f"{sae}/{name}" for sae in saes for name in ("cfg.json", "sae_weights.safetensors")
    }
    found = {name for name in api.files if not name.startswith("layer_1/certificate/")}
    assert found == expected | {"layer_1/certificate.json"}
    assert ("layer_1/certificate/evidence/part-00000.parquet" in api.files) == evidence
    upload_saes_to_huggingface(saes, "someone/saes", show_progress=False)
    assert api.files["README.md"].decode() == card
    for name, content in api.files.items():
        hub.add("someone/saes", name, content)
    again = open_sae("someone/saes/layer_1").sae
    assert again.cfg.k == 8


def test_nothing_is_uploaded_with_the_certificate_of_another_sae(certified, folder, api) -> None:
    attach(certified.run, folder)
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"] *= 2
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(CertifyError, match="not about the SAE"):
        upload_saes_to_huggingface({"layer_1": folder}, "someone/saes", show_progress=False)
    assert not api.files


def test_uploads_without_certificates_are_saelens_s(api, tmp_path) -> None:
    make_sae().save_model(tmp_path / "plain")
    upload_saes_to_huggingface({"a": tmp_path / "plain"}, "someone/saes", show_progress=False)
    assert set(api.files) == {"a/cfg.json", "a/sae_weights.safetensors", "README.md"}


def test_the_section_says_what_the_certificate_says(certified) -> None:
    values = json.loads((certified.run / "certificate.json").read_text())
    section = model_card_section(values)
    certificate = certified.certificate
    for text in (
        "## Faithfulness certificate: `layer_1`",
        certificate.verdict(),
        "| U_SAE |", "| U_SAE+Occam |", "uniform guess (log2 V)", "unigram model",
        "| shuffled features (0) |", "| shuffled features (1) |", "| random decoder (0) |",
        "40 documents", "50 documents", "`native`", "saelens-certify verify", "What it does not say",
        "topk, computed in float32",
    ):  # fmt: skip
        assert text in section
    rows = {
        row.split("|")[1].strip(): float(row.split("|")[2])
        for row in section.splitlines()
        if row.startswith(("| U_SAE", "| direct"))
    }
    for name, label in (("u_sae", "U_SAE"), ("u_sae_occam", "U_SAE+Occam")):
        value = certificate.bounds[name].value
        assert value <= rows[label] <= value + 1.01e-4  # rounded up
    assert list(rows) == ["U_SAE", "U_SAE+Occam", "direct bound on M", "direct bound on h_G"]
    del values["eval_result_unstructured"]["verdict"]
    with pytest.raises(EvidenceError, match="verdict: Field required"):
        model_card_section(values)


def test_sections_without_controls_say_so(certified) -> None:
    values = json.loads((certified.run / "certificate.json").read_text())
    metrics = values["eval_result_metrics"]["faithfulness_certificate"]
    for name in [n for n in metrics if "permuted" in n or "random" in n]:
        del metrics[name]
    assert "No controls" in model_card_section(values)


texts = st.text(st.characters(exclude_characters="\r", exclude_categories=("Cs",)), max_size=60)


@given(
    card=texts, sections=st.lists(texts, min_size=1, max_size=3), name=st.sampled_from(["", "a/b"])
)
def test_insertion_is_idempotent_and_replaces(card, sections, name) -> None:
    full = CARD + card
    for section in sections:
        done = insert_section(full, section, name)
        assert insert_section(done, section, name) == done
        assert done.startswith(CARD.rstrip("\n"))
        full = done
    assert full == insert_section(CARD + card, sections[-1], name)
    both = insert_section(full, "other", "c")
    assert insert_section(both, "other", "c") == both
    assert insert_section(both, sections[-1], name) == both


def test_text_after_the_section_stays() -> None:
    card = insert_section(CARD, "old") + "\nAfterwards.\n"
    assert insert_section(card, "new") == card.replace("old", "new")
    assert insert_section("", "new").startswith("<!-- ")


@pytest.mark.parametrize("damage", ["begin", "end", "twice", "order"])
def test_damaged_markers_are_reported(damage) -> None:
    card = insert_section(CARD, "text")
    begin, end = (line for line in card.splitlines() if line.startswith("<!--"))
    card = {
        "begin": card.replace(begin, ""),
        "end": card.replace(end, ""),
        "twice": card + card,
        "order": card.replace(begin, "#").replace(end, begin).replace("#", end, 1),
    }[damage]
    with pytest.raises(CertifyError, match="mend it"):
        insert_section(card, "text")


def test_line_ends_of_a_readme_stay(certified, tmp_path) -> None:
    values = {"layer_1": json.loads((certified.run / "certificate.json").read_text())}
    path, card = tmp_path / "README.md", CARD.replace("\n", "\r\n").encode()
    path.write_bytes(card)
    update_readme(path, values)
    written = path.read_bytes()
    assert written.startswith(card)
    assert written.count(b"\r\n") == written.count(b"\n")
    mixed = written + b"One line\nof another system.\n"
    path.write_bytes(mixed)
    update_readme(path, values)
    assert path.read_bytes() == mixed


def test_readmes_that_cannot_be_written_are_named(certified, tmp_path) -> None:
    values = {"layer_1": certified.certificate}
    (tmp_path / "latin.md").write_bytes("Café\n".encode("latin-1"))
    with pytest.raises(CertifyError, match=r"latin\.md' is not UTF-8"):
        update_readme(tmp_path / "latin.md", values)
    with pytest.raises(CertifyError, match=r"is a folder; give the file, e\.g\. .*README\.md"):
        update_readme(tmp_path, values)
    with pytest.raises(CertifyError, match="cannot be made"):
        update_readme(tmp_path / "latin.md" / "sub" / "README.md", values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latin.md"]
    made = update_readme(tmp_path / "new" / "folder" / "README.md", values)
    from_file = {"layer_1": read_certificate(certified.run)}
    assert made.read_text() == update_readme(tmp_path / "other.md", from_file).read_text()
    assert certified.certificate.verdict() in made.read_text()


def test_local_readme(certified, folder, tmp_path) -> None:
    attach(certified.run, folder)
    (tmp_path / "README.md").write_text(CARD)
    for _ in range(2):
        update_readme(tmp_path / "README.md", {"layer_1": read_certificate(folder)})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(CARD)
    assert text.count("## Faithfulness certificate") == 1
    with pytest.raises(CertifyError, match="HTML comment"):
        update_readme(tmp_path / "README.md", {"a-->b": read_certificate(folder)})
    with pytest.raises(EvidenceError, match=r"certificate\.json"):
        read_certificate(tmp_path)
