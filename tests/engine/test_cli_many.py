"""The command line on several SAEs at once, and on SAEs of SAELens's registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from saes.hub_cache import HubCache, hub

from engine.builders import make_sae
from engine.test_cli import SMALL, kit
from saelens_certify import Certificate
from saelens_certify.cli import EXIT_DONE, EXIT_EVIDENCE, EXIT_INPUT, EXIT_VACUOUS, main

__all__ = ["hub", "kit"]

JB = "gpt2-small-res-jb"


def command(kit: dict[str, Path], output: Path, *more: str) -> list[str]:
    data = str(kit["root"] / "text.jsonl")
    model = str(kit["model"])
    return ["run", "--model", model, *SMALL, "--data", data, "--output", str(output), *more]


def patterns(release: str, sae_id: str) -> list[str]:
    return ["--sae_regex_pattern", release, "--sae_block_pattern", sae_id]


def hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def test_patterns_certify_each_match_into_its_own_folder(
    kit, hub: HubCache, tmp_path, capsys
) -> None:
    for layer in (1, 2):
        hub.add_sae(JB, hook(layer), make_sae("standard", hook(layer)).to(torch.bfloat16))
    arguments = command(kit, tmp_path / "out", *patterns(JB, r"blocks\.[12]\..*"))
    with pytest.warns(UserWarning, match="bfloat16"):
        assert main(arguments) == EXIT_DONE
    assert "2 of 2 SAEs have a certificate" in capsys.readouterr().out
    created = {}
    for layer in (1, 2):
        folder = tmp_path / "out" / JB / hook(layer)
        certificate = Certificate.load(folder)
        assert certificate.manifest["sae"]["id"] == f"{JB}/{hook(layer)}"
        assert certificate.manifest["sae"]["dtype"] == "bfloat16"
        assert certificate.manifest["sae"]["origin"]["checkpoint_dtype"] == "bfloat16"
        envelope = json.loads((folder / "certificate.json").read_text())
        assert (envelope["sae_lens_release_id"], envelope["sae_lens_id"]) == (JB, hook(layer))
        assert (folder / "report.html").exists()
        created[layer] = envelope
    with pytest.warns(UserWarning, match="bfloat16"):
        assert main(arguments) == EXIT_DONE  # resumed: nothing is measured again
    for layer, before in created.items():
        path = tmp_path / "out" / JB / hook(layer) / "certificate.json"
        assert json.loads(path.read_text()) == before


def test_nothing_starts_while_a_configuration_is_refused(
    kit, hub: HubCache, tmp_path, capsys, monkeypatch
) -> None:
    hub.add_sae(JB, hook(1), make_sae("standard", hook(1)))
    hub.add_sae(JB, hook(2), make_sae("standard", hook(2)), normalize_activations="layer_morn")
    hub.add_sae(JB, hook(4), make_sae("standard", hook(4)))  # the model has three layers
    monkeypatch.setattr(SAE, "from_pretrained", None)
    monkeypatch.setattr("saelens_certify.cli_run.load_model", None)
    more = patterns(JB, r"blocks\.[12]\..*")
    assert main(command(kit, tmp_path / "out", *more)) == EXIT_INPUT
    text = capsys.readouterr().err.replace("\n", " ")
    assert "1 of 2 SAEs cannot be certified" in text
    assert hook(2) in text
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_what_only_the_model_tells_is_refused_before_weights(
    kit, hub: HubCache, tmp_path, capsys, monkeypatch
) -> None:
    hub.add_sae(JB, hook(1), make_sae("standard", hook(1)))
    hub.add_sae(JB, hook(4), make_sae("standard", hook(4)))
    monkeypatch.setattr(SAE, "from_pretrained", None)
    more = patterns(JB, r"blocks\.[14]\..*")
    assert main(command(kit, tmp_path / "out", *more)) == EXIT_INPUT
    text = capsys.readouterr().err.replace("\n", " ")
    assert "1 of 2 SAEs cannot be certified" in text
    assert "3 layers" in text
    assert not (tmp_path / "out").exists()


def test_one_that_fails_does_not_stop_the_others(kit, tmp_path, capsys) -> None:
    saes = tmp_path / "saes"
    for name in ("a", "deep/b", "c"):
        make_sae().save_model(saes / name)
    weights = saes / "deep/b" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    arguments = command(kit, tmp_path / "out", "--sae", str(saes))
    assert main(arguments) == EXIT_INPUT
    printed = capsys.readouterr()
    assert "2 of 3 SAEs have a certificate" in printed.out
    assert f"failed: {saes / 'deep/b'} (exit code 2)" in printed.err
    assert sorted(p.parent.name for p in (tmp_path / "out").rglob("certificate.json")) == ["a", "c"]
    weights.write_bytes(whole)
    assert main(arguments) == EXIT_DONE
    assert Certificate.load(tmp_path / "out" / "deep" / "b").measured.n_sequences
    part = tmp_path / "out" / "a" / "evidence" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    assert main(arguments) == EXIT_EVIDENCE


def test_the_worst_exit_code_counts(kit, tmp_path) -> None:
    for name in ("a", "b"):
        make_sae().save_model(tmp_path / "saes" / name)
    more = ["--sae", str(tmp_path / "saes"), "--require_nonvacuous"]
    assert main(command(kit, tmp_path / "out", *more)) == EXIT_VACUOUS


def test_a_folder_with_one_sae_below_it(kit, tmp_path) -> None:
    make_sae().save_model(tmp_path / "saes" / "only")
    assert main(command(kit, tmp_path / "out", "--sae", str(tmp_path / "saes"))) == EXIT_DONE
    assert Certificate.load(tmp_path / "out").manifest["sae"]["id"] == str(tmp_path / "saes/only")


def test_dtype_of_the_sae(kit, tmp_path, capsys) -> None:
    more = ["--sae", str(kit["sae"]), "--sae_dtype"]
    with pytest.warns(UserWarning, match="rounded its weights"):
        assert main(command(kit, tmp_path / "half", *more, "bfloat16")) == EXIT_DONE
    sae = Certificate.load(tmp_path / "half").manifest["sae"]
    assert (sae["dtype"], sae["origin"]["checkpoint_dtype"]) == ("bfloat16", "float32")
    assert main(command(kit, tmp_path / "out", *more, "int3")) == EXIT_INPUT
    assert "unknown dtype of an SAE 'int3'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --sae, or both"),
        (["--sae", "x/y", *patterns("a", "b")], "give either --sae, or both"),
        (["--sae_regex_pattern", "a"], "give either --sae, or both"),
        (patterns("no-such-release", ".*"), "no release of SAELens matches 'no-such-release'"),
        ([*patterns(JB, ".*"), "--picture", "x.png"], "--picture is for one SAE"),
    ],
)
def test_arguments_that_do_not_fit(kit, tmp_path, capsys, more, message, monkeypatch) -> None:
    monkeypatch.setattr("saelens_certify.cli.check_picture", lambda _: None)
    assert main(command(kit, tmp_path / "out", *more)) == EXIT_INPUT
    assert message in " ".join(capsys.readouterr().err.split())
