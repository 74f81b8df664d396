"""`verify` fails on any edit: of a number, of a file, of what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import (
    Certificate,
    CertifyConfig,
    CertifyError,
    EvidenceError,
    as_sequences,
    certify,
    verify,
)
from saelens_certify.evidence import CALIBRATION, CERTIFICATE, MANIFEST, part_name

EVALUATION = make_tokens(40, seed=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "run"
    certify(
        hooked_transformer(), make_sae(), calibration=make_tokens(20, seed=1), evaluation=EVALUATION,
        config=CertifyConfig(seq_len=SEQ_LEN, part_sequences=16, permutations=1, progress=False),
        output=folder,
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def numbers(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, (int, float)):
        yield path


def edited(value: Any, path: tuple) -> Any:
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = (
        (not old) if isinstance(old, bool) else old + (1 if isinstance(old, int) else 1e-6)
    )
    return value


def test_untouched_folder_verifies(folder) -> None:
    result = verify(folder)
    assert result.n_sequences == len(EVALUATION)
    assert result.n_files == 5  # manifest, calibration, three parts


@pytest.mark.parametrize("name", [CERTIFICATE, MANIFEST])
def test_any_edited_number_in_json_is_found(folder, name) -> None:
    file = folder / name
    content = json.loads(file.read_text())
    paths = list(numbers(content))
    assert len(paths) > 25
    for path in paths:
        file.write_text(json.dumps(edited(content, path)))
        with pytest.raises(EvidenceError, match=name.replace(".", r"\.")):
            verify(folder)
    file.write_text(json.dumps(content))


def test_any_edited_number_in_the_evidence_is_found(folder) -> None:
    for index in range(3):
        file = folder / part_name(index)
        good = file.read_bytes()
        table = pq.read_table(file)
        for name in table.column_names:
            if pa.types.is_string(table.schema.field(name).type):
                continue
            values = table.column(name).to_numpy().copy()
            values[1] = ~values[1] if values.dtype == bool else np.nextafter(values[1], 99)
            column = table.column_names.index(name)
            pq.write_table(table.set_column(column, name, pa.array(values)), file)
            with pytest.raises(EvidenceError, match=f"part-0000{index}"):
                verify(folder)
        file.write_bytes(good)
    verify(folder)


def test_edited_calibration_is_found(folder) -> None:
    file = folder / CALIBRATION
    tensors = safetensors.torch.load(file.read_bytes())
    for name, tensor in tensors.items():
        changed = {k: v.clone() for k, v in tensors.items()}
        changed[name].view(-1)[0] += 1
        file.write_bytes(safetensors.torch.save(changed))
        with pytest.raises(EvidenceError, match="calibration"):
            verify(folder)
        assert tensor.numel() > 0


def test_an_edit_with_its_hash_repaired_is_still_found(folder) -> None:
    """Someone edits a loss and the file hash in the certificate: the bounds no longer follow."""
    from saelens_certify.storage import sha256_file

    file = folder / part_name(0)
    table = pq.read_table(file)
    losses = table.column("loss_pool").to_numpy() * 0.5
    table = table.set_column(table.column_names.index("loss_pool"), "loss_pool", pa.array(losses))
    table = table.set_column(table.column_names.index("loss_sae"), "loss_sae", pa.array(losses))
    pq.write_table(table, file)
    certificate = json.loads((folder / CERTIFICATE).read_text())
    certificate["eval_result_unstructured"]["files"][part_name(0)] = sha256_file(file)
    (folder / CERTIFICATE).write_text(json.dumps(certificate))
    with pytest.raises(EvidenceError, match="was edited: eval_result_metrics"):
        verify(folder)


@pytest.mark.parametrize("key", ["eval_result_unstructured", "eval_result_metrics", "eval_config"])
def test_json_of_the_wrong_shape_is_evidence_damage(folder, key) -> None:
    content = json.loads((folder / CERTIFICATE).read_text())
    (folder / CERTIFICATE).write_text(json.dumps({**content, key: []}))
    with pytest.raises(EvidenceError, match="certificate"):
        verify(folder)


@pytest.mark.parametrize("name", [MANIFEST, CALIBRATION, CERTIFICATE, part_name(0), part_name(2)])
def test_missing_and_truncated_files_are_named(folder, name) -> None:
    file = folder / name
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(EvidenceError, match=file.name.replace(".", r"\.")):
        verify(folder)
    file.unlink()
    with pytest.raises(EvidenceError, match=file.name.replace(".", r"\.")):
        verify(folder)


def test_doubled_part_is_found(folder) -> None:
    shutil.copy(folder / part_name(1), folder / part_name(3))
    with pytest.raises(EvidenceError, match="part-00003"):
        verify(folder)
    with pytest.raises(EvidenceError, match="twice"):
        Certificate.load(folder)


def test_a_run_is_named_by_its_folder_or_its_certificate(folder, tmp_path) -> None:
    assert verify(folder / CERTIFICATE).n_sequences == len(EVALUATION)
    assert Certificate.load(str(folder / CERTIFICATE)).measured.n_sequences == len(EVALUATION)
    cases: list[tuple[Any, str]] = [
        (None, "give the folder of a run, not NoneType"),
        (Certificate.load(folder), r"not Certificate.*certificate\.save\(folder\)"),
        (folder / MANIFEST, "is a file; give the folder"),
        (tmp_path / "typo", "there is no folder .*typo"),
        (tmp_path / "typo" / CERTIFICATE, "there is no folder .*typo"),
    ]
    for read in (verify, Certificate.load):
        for wrong, message in cases:
            with pytest.raises(CertifyError, match=message) as raised:
                read(wrong)
            assert raised.type is CertifyError  # wrong input, no damaged evidence


def test_an_unfinished_run_says_how_to_finish_it(folder) -> None:
    (folder / CERTIFICATE).unlink()
    for path in (folder, folder / CERTIFICATE):
        with pytest.raises(EvidenceError, match="did not finish; repeat the same command"):
            verify(path)


def test_remeasuring_a_sample(folder) -> None:
    evaluation = as_sequences(EVALUATION, seq_len=SEQ_LEN, d_vocab=101)
    kit = {"model": hooked_transformer(), "sae": make_sae(), "evaluation": evaluation}
    result = verify(folder, **kit, sample=9)
    assert result.n_remeasured == 9
    assert result.largest_difference < 1e-5
    assert verify(folder, **{**kit, "evaluation": EVALUATION}, sample=3).n_remeasured == 3
    with pytest.raises(CertifyError, match="sample"):
        verify(folder, **kit, sample=0)
    with pytest.raises(CertifyError, match="all of model, sae"):
        verify(folder, model=kit["model"])
    other = make_sae()
    with torch.no_grad():
        other.b_dec += 1e-3
    with pytest.raises(CertifyError, match="not the certified SAE"):
        verify(folder, **{**kit, "sae": other})
    with pytest.raises(CertifyError, match="not the certified evaluation"):
        verify(folder, **{**kit, "evaluation": evaluation.take(20)})


def test_forged_evidence_fails_when_measured_again(folder) -> None:
    """Consistent hashes and bounds over invented losses: only measuring again tells."""
    certificate = Certificate.load(folder)
    table = certificate.evidence
    losses = pa.array(np.maximum(certificate.column("loss_base") - 0.5, 0.9))
    for name in ("loss_base", "loss_sae", "loss_pool"):
        table = table.set_column(table.column_names.index(name), name, losses)
    shutil.rmtree(folder)
    Certificate(certificate.manifest, certificate.calibration, table).save(folder)
    verify(folder)
    evaluation = as_sequences(EVALUATION, seq_len=SEQ_LEN, d_vocab=101)
    with pytest.raises(EvidenceError, match="measured again and differs"):
        verify(folder, model=hooked_transformer(), sae=make_sae(), evaluation=evaluation)
