"""Every experiment as a command, on the bundled model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from saelens_certify import Certificate, demo, verify
from saelens_certify.cli import EXIT_DONE, EXIT_INPUT, main

ALL = ["--model", "demo", "--limit", "40", "--no-progress"]
SAE = str(demo.ASSETS / "saes" / "layer5-topk")
COMMANDS = {
    "feature_shuffling": ["shuffle", *ALL, "--sae", SAE, "--permutations", "2", "--error_permutations", "5"],
    "output_fidelity": ["fidelity", *ALL, "--sae", SAE],
    "error_amplification": ["amplification", *ALL, "--sae", str(demo.ASSETS / "saes" / "layer2-topk")],
    "sensitivity": [
        "sensitivity", *ALL, "--coding", "topk:8", "--ks", "4", "--taus", "3", "--budgets", "10", "--alphas", "0.2",
        "--lengths", "8",
    ],
    "distribution_shift": ["shift", *ALL, "--rates", "0.5"],
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(COMMANDS))
def test_a_command_leaves_table_picture_and_runs(kind, tmp_path, capsys) -> None:
    arguments = [*COMMANDS[kind], "--output", str(tmp_path)]
    assert main(arguments) == EXIT_DONE
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / f"{kind}.json").read_text())
    assert result["title"] in printed
    assert all(finding in printed.replace("\n", " ") for finding in result["findings"])
    with (tmp_path / f"{kind}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["rows"]) > 0
    assert "plotly" in (tmp_path / f"{kind}.html").read_text()
    runs = [path.parent for path in tmp_path.glob("*/certificate.json")]
    assert runs
    for run in runs:
        assert verify(run).n_sequences > 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*/evidence/*")}
    assert main(arguments) == EXIT_DONE
    assert {path: path.read_bytes() for path in tmp_path.glob("*/evidence/*")} == before


def test_layers_takes_a_folder_of_saes_and_other_documents(tmp_path, capsys) -> None:
    saes = tmp_path / "saes"
    saes.mkdir()
    for name in ("layer1-topk", "layer4-jumprelu"):
        shutil.copytree(demo.ASSETS / "saes" / name, saes / name)
    texts = tmp_path / "texts.jsonl"
    passages = demo.load_texts("evaluation", 16)[:60]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    output = tmp_path / "out"
    arguments = ["layers", "--model", "demo", "--sae", str(saes), "--data", str(texts), "--seq_len", "12",
                 "--grid", "4", "16", "--no-progress", "--output", str(output)]  # fmt: skip
    assert main(arguments) == EXIT_DONE
    assert "layer4-jumprelu" in capsys.readouterr().out
    for name in ("layer1-topk", "layer4-jumprelu"):
        certificate = Certificate.load(output / name)
        assert certificate.config.seq_len == 12
        assert certificate.manifest["sae"]["id"].endswith(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity", *ALL], "nothing is varied: give one or more of --ks"),
        (["shuffle", *ALL, "--sae", str(demo.ASSETS / "saes")], "this experiment is about one SAE"),
        (["shift", *ALL, "--other", "code"], "--other 'code' must be NAME=DOCUMENTS"),
        (["shift", *ALL, "--other", "a=x.txt", "a=y.txt"], "--other names 'a' twice"),
        (["amplification", *ALL, "--horizons", "2", "1"], "horizons must be increasing"),
        (["layers", *ALL, "--until", "nonvacuous"], "cannot stop at different times"),
        (["experiment", "--preset", "paper-fig2", "--model", "demo", "--calibration", "x.txt"], "goes with"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == EXIT_INPUT
    assert message in capsys.readouterr().err
    assert not list(Path(tmp_path).glob("out/*/evidence"))


def test_a_published_experiment_by_name(tmp_path, capsys) -> None:
    arguments = ["experiment", "--preset", "paper-tab2", "--model", "demo", "--calibration_sequences", "40",
                 "--evaluation_sequences", "30", "--output", str(tmp_path)]  # fmt: skip
    assert main(arguments) == EXIT_DONE
    assert "Sensitivities" in capsys.readouterr().out
    assert list(tmp_path.rglob("sensitivity.csv"))
