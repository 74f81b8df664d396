"""A run that is killed and started again ends with the same files as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import Certificate, CertifyConfig, CertifyError, EvidenceError, certify, verify
from saelens_certify.evidence import CALIBRATION, CERTIFICATE, MANIFEST, part_name

TESTS = Path(__file__).resolve().parents[1]
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, part_sequences=4, batch_tokens=3 * SEQ_LEN, permutations=1, progress=False
)
N_CALIBRATION, N_EVALUATION = 30, 90


def run(output: Path | None, config: CertifyConfig = CONFIG, n: int = N_EVALUATION) -> Certificate:
    return certify(
        hooked_transformer(),
        make_sae(),
        calibration=make_tokens(N_CALIBRATION, seed=1),
        evaluation=make_tokens(n, seed=2),
        config=config,
        output=output,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, CERTIFICATE)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


def test_killed_runs_end_with_the_same_evidence(tmp_path, finished) -> None:
    """SIGKILL at random moments of calibration and evaluation, again and again, then let it finish."""
    rng = random.Random(0)
    folder = tmp_path / "run"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from engine import test_resume\nfrom pathlib import Path\n"
        "test_resume.run(Path(sys.argv[2]))\n"
    )
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", code, str(TESTS), str(folder)])
        seen = len(list(folder.rglob("*"))) if folder.exists() else 0
        # Imports take seconds: wait until this process has written something, then a random moment.
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            now = len(list(folder.rglob("*"))) if folder.exists() else 0
            if now > seen:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.25))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 4:
            subprocess.run([sys.executable, "-c", code, str(TESTS), str(folder)], check=True)
            break
    assert kills >= 1
    left = {k: v for k, v in contents(folder).items() if not k.endswith(".partial")}
    assert left == contents(finished)
    assert verify(folder).n_sequences == N_EVALUATION


def test_every_prefix_of_a_run_can_be_resumed(tmp_path, finished) -> None:
    """A folder that stops after any file it writes is a valid state."""
    expected = contents(finished)
    n_parts = sum(name.startswith("evidence/") for name in expected)
    for kept in (-1, 0, 1, n_parts // 2, n_parts - 1):
        folder = tmp_path / f"kept{kept}"
        (folder / "evidence" if kept > 0 else folder).mkdir(parents=True)
        if kept < 0:  # killed while the manifest was written
            (folder / f".{MANIFEST}.123.partial").write_bytes(b"half")
            run(folder)
            assert contents(folder).keys() - {f".{MANIFEST}.123.partial"} == expected.keys()
            continue
        (folder / MANIFEST).write_bytes((finished / MANIFEST).read_bytes())
        if kept > 0:
            (folder / "evidence" / ".part-00007.parquet.123.partial").write_bytes(b"half")
            (folder / CALIBRATION).write_bytes(expected[CALIBRATION])
        for index in range(kept):
            (folder / part_name(index)).write_bytes(expected[part_name(index)])
        run(folder)
        left = {k: v for k, v in contents(folder).items() if not k.endswith(".partial")}
        assert left == expected


def test_finished_parts_are_not_measured_again(finished, monkeypatch) -> None:
    from saelens_certify import passes

    def fail(*_args, **_kwargs):
        raise AssertionError("a finished run was measured again")

    monkeypatch.setattr(passes, "measure", fail)
    monkeypatch.setattr(passes, "calibrate", fail)
    again = run(finished)
    assert again.bounds["u_sae"].value == Certificate.load(finished).bounds["u_sae"].value


def test_memory_and_disk_give_the_same_certificate(tmp_path, finished) -> None:
    in_memory = run(None)
    assert in_memory.evidence.equals(Certificate.load(finished).evidence)
    in_memory.save(tmp_path / "saved")
    saved = contents(tmp_path / "saved")
    assert saved == contents(finished)
    assert verify(tmp_path / "saved").certificate.to_metrics() == in_memory.to_metrics()
    loaded = Certificate.load(tmp_path / "saved")
    assert loaded.to_metrics() == in_memory.to_metrics()


def test_changed_sae_settings_are_another_run(finished) -> None:
    """k, normalisation and the like are not parameters, and still part of what is certified."""
    changed = make_sae(k=4)
    with pytest.raises(EvidenceError, match="sae_config_sha256"):
        certify(
            hooked_transformer(), changed, calibration=make_tokens(N_CALIBRATION, seed=1),
            evaluation=make_tokens(N_EVALUATION, seed=2), config=CONFIG, output=finished,
        )  # fmt: skip


def test_edited_files_of_a_finished_run_are_not_sealed_again(tmp_path, finished) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"]["delta"] = 0.5
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EvidenceError, match=r"manifest\.json is not the file that was certified"):
        run(folder)


def test_edited_files_of_an_unfinished_run_do_not_count(tmp_path, finished) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / CERTIFICATE).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"]["delta"] = 0.5
    manifest["model"]["d_vocab"] = 2**40
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert run(folder).to_metrics() == Certificate.load(finished).to_metrics()
    tensors = safetensors.torch.load((folder / CALIBRATION).read_bytes())
    tensors["n_sequences"] -= 10
    (folder / CALIBRATION).write_bytes(safetensors.torch.save(tensors))
    (folder / CERTIFICATE).unlink()
    with pytest.raises(EvidenceError, match="calibration"):
        run(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": CertifyConfig(seq_len=SEQ_LEN, part_sequences=4, alpha=0.4)}, "config.alpha"),
        ({"config": CertifyConfig(seq_len=SEQ_LEN, part_sequences=5)}, "part_sequences"),
        ({"n": N_EVALUATION - 1}, "evaluation_sha256"),
    ],
)
def test_folder_of_another_run_is_refused(finished, change, named) -> None:
    before = contents(finished)
    with pytest.raises(EvidenceError, match=named):
        run(finished, **change)
    assert contents(finished) == before


def test_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EvidenceError, match=r"thesis\.tex"):
        run(tmp_path)
    file = tmp_path / "thesis.tex"
    with pytest.raises(CertifyError, match="is a file"):
        run(file)


def test_truncated_part_is_named_when_resuming(tmp_path, finished) -> None:
    folder = tmp_path / "run"
    for name, content in contents(finished).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_bytes((finished / MANIFEST).read_bytes())
    part = folder / part_name(3)
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(EvidenceError, match=r"part-00003\.parquet.*delete it"):
        run(folder)
    part.unlink()
    run(folder)
    assert contents(folder) == contents(finished)


def test_manifest_records_where_it_came_from(finished) -> None:
    manifest = json.loads((finished / MANIFEST).read_text())
    for key in ("model_sha256", "sae_sha256", "calibration_sha256", "evaluation_sha256"):
        assert len(manifest["identity"][key]) == 64
    assert manifest["sae"]["self_check"]["max_error"] < 1e-5
    assert manifest["versions"]["torch"]
