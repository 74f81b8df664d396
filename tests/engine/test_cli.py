"""The command line on local folders and files, in process and as a program."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.builders import D_MODEL, D_VOCAB, N_LAYERS, make_sae, make_tokens
from saelens_certify import Certificate
from saelens_certify.cli import (
    EXIT_DONE,
    EXIT_EVIDENCE,
    EXIT_FAILURE,
    EXIT_INPUT,
    EXIT_VACUOUS,
    main,
)

SMALL = [
    "--seq_len",
    "12",
    "--no-progress",
    "--part_sequences",
    "32",
    "--batch_tokens",
    "600",
    "--logits_mib",
    "8",
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> dict[str, Path]:
    """A model folder, an SAE folder and the same documents as text in several formats."""
    root = tmp_path_factory.mktemp("kit")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=D_VOCAB, hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            initializer_range=0.2, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(root / "model")
    words = ["<s>", "</s>", *(f"w{i}" for i in range(2, D_VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(root / "model")
    make_sae("topk", "blocks.1.hook_resid_post").save_model(root / "sae")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words[2:], k=20)) for _ in range(120)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (root / "text.txt").write_text("\n\n".join(texts))
    np.save(root / "tokens.npy", make_tokens(60, seed=9).numpy())
    save_file({"tokens": make_tokens(60, seed=10)}, root / "tokens.safetensors")
    return {"root": root, "model": root / "model", "sae": root / "sae"}


def command(
    kit: dict[str, Path], output: Path, *more: str, data: str | None = "text.jsonl"
) -> list[str]:
    arguments = ["run", "--model", str(kit["model"]), "--sae", str(kit["sae"]), *SMALL]
    if data is not None:
        arguments += ["--data", str(kit["root"] / data)]
    return [*arguments, "--output", str(output), *more]


def test_run_verify_and_resume(kit, tmp_path, capsys) -> None:
    output = tmp_path / "run"
    assert main(command(kit, output, "--permutations", "1", "--random_decoders", "1")) == EXIT_DONE
    printed = capsys.readouterr().out
    for text in (
        "proxy risk", "reconstruction gap", "pool mismatch", "sparse complexity", "concentration: gap",
        "U_SAE+Occam", "direct bound on M", "uniform guess", "unigram", "With 95% confidence",
        "shuffled features",
    ):  # fmt: skip
        assert text in printed
    certificate = Certificate.load(output)
    assert certificate.measured.n_sequences + certificate.calibration.n_sequences == 120
    assert certificate.manifest["sae"]["id"] == str(kit["sae"])
    assert "<html" in (output / "report.html").read_text()
    assert main(["verify", str(output)]) == EXIT_DONE
    assert main(command(kit, output, "--permutations", "1", "--random_decoders", "1")) == EXIT_DONE
    assert main(command(kit, output, "--alpha", "0.3")) == EXIT_EVIDENCE
    assert "config.alpha" in capsys.readouterr().err
    part = output / "evidence" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    assert main(["verify", str(output)]) == EXIT_EVIDENCE


@pytest.mark.parametrize("data", ["text.txt", "tokens.npy", "tokens.safetensors"])
def test_other_sources(kit, tmp_path, data) -> None:
    assert main(command(kit, tmp_path / "run", data=data)) == EXIT_DONE
    metrics = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert metrics["eval_type_id"] == "faithfulness_certificate"


def test_separate_documents(kit, tmp_path) -> None:
    root = kit["root"]
    sides = [
        "--calibration",
        str(root / "tokens.npy"),
        "--evaluation",
        str(root / "tokens.safetensors"),
    ]
    assert main(command(kit, tmp_path / "run", *sides, data=None)) == EXIT_DONE
    assert Certificate.load(tmp_path / "run").measured.n_sequences == 60


def test_a_vacuous_certificate_fails_on_request(kit, tmp_path) -> None:
    assert main(command(kit, tmp_path / "run", "--require_nonvacuous")) == EXIT_VACUOUS


@pytest.mark.parametrize(
    ("more", "data", "message"),
    [
        (["--coding", "top"], "text.jsonl", "unknown coding rule 'top'"),
        (["--alpha", "2"], "text.jsonl", "alpha"),
        (["--calibration_share", "1.5"], "text.jsonl", "calibration_share"),
        ([], "missing.jsonl", "missing.jsonl"),
        ([], None, "--data"),
        (["--calibration", "x"], "text.jsonl", "--data"),
        (["--model", "./nowhere"], "text.jsonl", "./nowhere"),
        (["--sae", "./nowhere"], "text.jsonl", "./nowhere"),
        (["--llm_dtype", "int4"], "text.jsonl", "int4"),
        (["--seq_len", "30"], "text.jsonl", "30"),
        (["--device", "nonsense"], "text.jsonl", "nonsense"),
        (["--picture", "x.gif"], "text.jsonl", "x.gif"),
    ],
)
def test_wrong_input_has_its_own_exit_code(kit, tmp_path, capsys, more, data, message) -> None:
    assert main(command(kit, tmp_path / "run", *more, data=data)) == EXIT_INPUT
    assert message in capsys.readouterr().err.replace("\n", "")


def test_remedies_are_flags_of_the_command_line(kit, tmp_path, capsys) -> None:
    """The same errors serve Python and the shell: they name what both have."""
    text = str(kit["root"] / "text.jsonl")
    for more, data, remedy in (
        (["--calibration", text, "--evaluation", text], None, "give the documents once as --data"),
        (["--text_column", "body"], "text.jsonl", "text_column (--text_column)"),
    ):
        assert main(command(kit, tmp_path / "run", *more, data=data)) == EXIT_INPUT
        assert remedy in capsys.readouterr().err


def test_output_below_a_file(kit, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(command(kit, tmp_path / "file" / "run")) == EXIT_INPUT
    assert "is a file" in capsys.readouterr().err.replace("\n", " ")


def test_output_path_with_markup(kit, tmp_path, capsys) -> None:
    assert main(command(kit, tmp_path / "o[red]x")) == EXIT_DONE
    assert "o[red]x/certificate.json" in capsys.readouterr().out


def test_a_crash_does_not_look_like_a_verdict(kit, tmp_path, monkeypatch) -> None:
    def crash(*_args, **_kwargs):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("saelens_certify.cli.certify", crash)
    assert main(command(kit, tmp_path / "run")) == EXIT_FAILURE


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(kit, tmp_path, dtype) -> None:
    assert main(command(kit, tmp_path / "run", "--llm_dtype", dtype)) == EXIT_DONE


def test_folder_without_a_run(tmp_path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == EXIT_EVIDENCE
    assert "certificate.json" in capsys.readouterr().err.replace("\n", "")


def test_verify_takes_the_certificate_and_names_wrong_folders(kit, tmp_path, capsys) -> None:
    assert main(command(kit, tmp_path / "run")) == EXIT_DONE
    assert main(["verify", str(tmp_path / "run" / "certificate.json")]) == EXIT_DONE
    assert main(["verify", str(tmp_path / "typo")]) == EXIT_INPUT
    assert "there is no folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "run" / "manifest.json")]) == EXIT_INPUT
    (tmp_path / "run" / "certificate.json").unlink()
    assert main(["verify", str(tmp_path / "run")]) == EXIT_EVIDENCE
    assert "repeat the same command" in capsys.readouterr().err


def test_info_and_version_as_a_program() -> None:
    info = subprocess.run(
        [sys.executable, "-m", "saelens_certify", "info"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(info.stdout)["torch"]
    help_text = subprocess.run(
        [sys.executable, "-m", "saelens_certify", "run", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for option in ("--coding", "--alpha", "--delta", "--tau", "--positions", "--seq_len"):
        assert option in help_text
