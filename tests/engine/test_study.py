"""Many certificates from few passes: each is the one that a run by itself would give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.builders import (
    SEQ_LEN,
    gpt2_bridge,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import (
    Certificate,
    CertifyConfig,
    CertifyError,
    EvidenceError,
    certify,
    passes,
    verify,
)
from saelens_certify.certification import read_sides
from saelens_certify.evidence import EVIDENCE, MANIFEST
from saelens_certify.forward import ForwardEngine
from saelens_certify.scratch import FOLDER
from saelens_certify.study import Setting, View, certify_many, folder_name
from saelens_certify.views import Seen

MODELS = {"hooked": hooked_transformer, "llama": llama_bridge, "gpt2": gpt2_bridge}
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, coding="topk:6", tau=2, permutations=1, random_unit_decoders=1, horizons=(0, 1),
    error_permutations=3, part_sequences=16, progress=False,
)  # fmt: skip
CALIBRATION, EVALUATION, SHIFTED = (
    make_tokens(24, seed=1),
    make_tokens(50, seed=2),
    make_tokens(30, seed=9),
)


def documents(model, evaluation=EVALUATION):
    return read_sides(model, CALIBRATION, evaluation, CONFIG)


def study(model) -> dict[str, Setting]:
    """Settings that differ in everything that may differ within a study."""
    calibration, evaluation = documents(model)
    _, shifted = documents(model, SHIFTED)
    early, late = make_sae(), make_sae("standard", "blocks.2.hook_resid_pre")
    inside = make_sae("jumprelu", "blocks.1.hook_mlp_out")
    base = Setting(early, View(calibration), View(evaluation), CONFIG)

    def changed(**changes) -> Setting:
        return dataclasses.replace(base, config=dataclasses.replace(CONFIG, **changes))

    return {
        "base": base,
        "late": dataclasses.replace(base, sae=late),
        "inside": dataclasses.replace(base, sae=inside, config=dataclasses.replace(CONFIG, coding="topk:4", tau=4)),
        "k=3": changed(coding="topk:3"),
        "tau=5": changed(tau=5),
        "alpha=0.2": changed(alpha=0.2),
        "no_bos": changed(positions="no_bos"),
        "budget=18": dataclasses.replace(base, calibration=View(calibration, first=18)),
        "L=6": Setting(
            early, View(calibration, length=6), View(evaluation, length=6),
            dataclasses.replace(CONFIG, seq_len=6),
        ),
        "shifted": dataclasses.replace(base, evaluation=View(shifted)),
    }  # fmt: skip


def alone(model, setting: Setting) -> Certificate:
    """The same by a run by itself, on documents that it cuts by itself."""
    calibration = setting.calibration.sequences.canonical
    calibration = calibration.take(setting.calibration.first or len(calibration)).tokens
    evaluation = setting.evaluation.sequences.tokens
    length = setting.config.seq_len
    beginnings = {tuple(row) for row in evaluation[:, :length].tolist()}
    if length < SEQ_LEN:
        calibration = torch.stack(
            [row for row in calibration if tuple(row[:length].tolist()) not in beginnings]
        )
    return certify(
        model, setting.sae, calibration=calibration, evaluation=evaluation, config=setting.config
    )


def assert_same(found: Certificate, expected: Certificate) -> None:
    assert torch.equal(found.calibration.counts, expected.calibration.counts)
    assert torch.equal(found.calibration.target_counts, expected.calibration.target_counts)
    assert found.calibration.n_sequences == expected.calibration.n_sequences
    assert found.evidence.column_names == expected.evidence.column_names
    assert found.manifest["identity"] == expected.manifest["identity"]
    for name in expected.evidence.column_names:
        mine, theirs = found.evidence.column(name), expected.evidence.column(name)
        if name in ("sequence", "violation", "cluster", "cluster_size", "rarest", "l0", "outside"):
            assert mine.equals(theirs), name
        elif name != "document":
            np.testing.assert_allclose(
                np.array(mine.to_pylist()), np.array(theirs.to_pylist()), atol=1e-5, rtol=1e-5,
                err_msg=name,
            )  # fmt: skip
    assert found.bounds.keys() == expected.bounds.keys()
    for name, bound in expected.bounds.items():
        assert abs(found.bounds[name].value - bound.value) < 1e-5, name


@pytest.fixture(scope="module", params=sorted(MODELS))
def world(request, tmp_path_factory):
    model = MODELS[request.param]()
    output = tmp_path_factory.mktemp(request.param)
    members = study(model)
    return model, members, certify_many(model, members, output=output), output


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "late",
        "inside",
        "k=3",
        "tau=5",
        "alpha=0.2",
        "no_bos",
        "budget=18",
        "L=6",
        "shifted",
    ],
)
def test_a_setting_is_what_a_run_by_itself_is(world, name) -> None:
    model, members, found, _ = world
    expected = alone(model, members[name])
    assert 0 < expected.measured.eta < 1, "the case must have both kinds of sequences"
    assert_same(found[name], expected)


def test_each_folder_is_a_run_that_verifies(world) -> None:
    model, members, found, output = world
    assert not (output / FOLDER).exists()
    for name, setting in members.items():
        sequences = setting.evaluation.sequences.tokens[:, : setting.config.seq_len]
        result = verify(
            output / folder_name(name), model=model, sae=setting.sae, evaluation=sequences
        )
        assert result.n_remeasured == min(32, found[name].evidence.num_rows)


def test_the_same_study_again_measures_nothing(world, monkeypatch) -> None:
    model, members, found, output = world
    monkeypatch.setattr(passes, "measure", None)
    monkeypatch.setattr(passes, "calibrate", None)
    again = certify_many(model, members, output=output)
    assert list(again) == list(members)
    for name, certificate in again.items():
        assert certificate.evidence.equals(found[name].evidence)


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(monkeypatch, function: str, calls: int) -> None:
    own, left = getattr(passes, function), [calls]

    def limited(*arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return own(*arguments)

    monkeypatch.setattr(passes, function, limited)


@pytest.mark.parametrize(("function", "calls"), [("calibrate", 1), ("measure", 1), ("measure", 5)])
def test_a_killed_study_goes_on(world, tmp_path, monkeypatch, function, calls) -> None:
    model, members, found, _ = world
    with monkeypatch.context() as patched:
        killed_after(patched, function, calls)
        with pytest.raises(Killed):
            certify_many(model, members, output=tmp_path)
    counted = {"calibrate": 0, "measure": 0}
    for name in counted:
        own = getattr(passes, name)

        def counting(*arguments, own=own, name=name):
            counted[name] += 1
            return own(*arguments)

        monkeypatch.setattr(passes, name, counting)
    again = certify_many(model, members, output=tmp_path)
    # 24 calibration sequences in parts of 16; 50 and 30 evaluation sequences.
    done = (
        {"calibrate": calls, "measure": 0}
        if function == "calibrate"
        else {"calibrate": 2, "measure": calls}
    )
    assert counted == {"calibrate": 2 - done["calibrate"], "measure": 6 - done["measure"]}
    for name, certificate in again.items():
        assert certificate.evidence.equals(found[name].evidence)
        for part in (tmp_path / folder_name(name) / EVIDENCE).iterdir():
            assert (
                part.read_bytes()
                == (world[3] / folder_name(name) / EVIDENCE / part.name).read_bytes()
            )


def test_damaged_progress_is_not_taken_for_evidence(world, tmp_path, monkeypatch) -> None:
    model, members, _, _ = world
    only = {"base": members["base"]}
    with monkeypatch.context() as patched:
        killed_after(patched, "measure", 3)
        with pytest.raises(Killed):
            certify_many(model, only, output=tmp_path)
    [first] = tmp_path.glob(f"{FOLDER}/*/part-00000.parquet")
    second, whole = first.with_name("part-00001.parquet"), first.read_bytes()
    kept = second.read_bytes()
    second.write_bytes(whole)
    with pytest.raises(EvidenceError, match="does not hold the sequences of part 1"):
        certify_many(model, only, output=tmp_path)
    second.write_bytes(kept)
    [file] = tmp_path.glob(f"{FOLDER}/*/calibration.safetensors")
    tensors = safetensors.torch.load(file.read_bytes())
    tensors["counts"][0] += 1
    file.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(EvidenceError, match="its contents are not those that were written"):
        certify_many(model, only, output=tmp_path)
    file.unlink()
    assert certify_many(model, only, output=tmp_path)["base"].evidence.num_rows == len(EVALUATION)


def test_another_studys_progress_stays(world, tmp_path, monkeypatch) -> None:
    model, members, _, _ = world
    with monkeypatch.context() as patched:
        killed_after(patched, "measure", 3)
        with pytest.raises(Killed):
            certify_many(model, {"late": members["late"]}, output=tmp_path)
    kept = {path.name for path in tmp_path.glob(f"{FOLDER}/*/*")}
    certify_many(model, {"k=3": members["k=3"]}, output=tmp_path)
    assert {path.name for path in tmp_path.glob(f"{FOLDER}/*/*")} == kept
    certify_many(model, {"late": members["late"]}, output=tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_a_view_is_of_sequences() -> None:
    with pytest.raises(CertifyError, match="a View is of Sequences, got Tensor"):
        View(EVALUATION)  # pyright: ignore[reportArgumentType]


def test_more_settings_measure_only_themselves(world, tmp_path, monkeypatch) -> None:
    model, members, found, _ = world
    certify_many(model, {name: members[name] for name in ("base", "late")}, output=tmp_path)
    seen: list[set[str]] = []
    own = passes.measure
    monkeypatch.setattr(
        passes,
        "measure",
        lambda engine, subjects, *rest: seen.append(set(subjects)) or own(engine, subjects, *rest),
    )
    more = certify_many(model, members, output=tmp_path)
    assert not any({"base", "late"} & names for names in seen)
    for name, certificate in more.items():
        np.testing.assert_allclose(
            certificate.column("loss_pool"), found[name].column("loss_pool"), atol=1e-5
        )


def test_what_is_common_runs_once(world, monkeypatch) -> None:
    """One base pass per batch and set of documents; S∘M once for all pools, smoothings and lengths."""
    model, members, _, _ = world
    rows: list[int] = []
    base_passes: list[int] = []
    own_patched, own_base = ForwardEngine.patched, ForwardEngine.base
    monkeypatch.setattr(
        ForwardEngine, "patched",
        lambda self, base, which, *rest: rows.append(len(which)) or own_patched(self, base, which, *rest),
    )  # fmt: skip
    monkeypatch.setattr(
        ForwardEngine,
        "base",
        lambda self, tokens, *rest: (
            base_passes.append(len(tokens)) or own_base(self, tokens, *rest)
        ),
    )
    plain = {
        name: dataclasses.replace(
            members[name],
            config=dataclasses.replace(
                members[name].config, permutations=0, random_unit_decoders=0, horizons=()
            ),
        )
        for name in ("base", "tau=5", "alpha=0.2", "budget=18", "L=6")
    }
    probing = certify_many(model, {"base": plain["base"]})
    overhead = sum(rows) - len(EVALUATION) - int(probing.popitem()[1].column("violation").sum())
    base_passes.clear()
    rows.clear()
    found = certify_many(model, plain)
    violations = {
        name: set(np.flatnonzero(each.column("violation"))) for name, each in found.items()
    }
    pools = len(violations["base"]) + len(violations["tau=5"]) + len(violations["budget=18"])
    # A sequence whose beginning violates L=6's pool may violate it later: then it runs for that pool.
    assert len(EVALUATION) + pools <= sum(rows) - overhead <= 2 * len(EVALUATION) + pools
    assert sum(base_passes) - len(EVALUATION) <= 16  # trying out takes a few sequences


@settings(max_examples=20)
@given(length=st.integers(2, SEQ_LEN), first=st.integers(1, 50), seed=st.integers(2, 100))
def test_views_see_what_a_run_by_itself_is_given(length, first, seed) -> None:
    tokens = make_tokens(50, seed=seed)
    tokens[10:20, 1:4] = tokens[:10, 1:4]  # some beginnings are equal
    model = hooked_transformer()
    _, evaluation = read_sides(
        model, CALIBRATION, tokens, dataclasses.replace(CONFIG, dependence="ignore")
    )
    first = min(first, len(evaluation))
    seen = Seen.of(View(evaluation, first, length))
    expected = {tuple(row) for row in evaluation.tokens[:first, :length].tolist()}
    assert {tuple(row) for row in seen.sequences.tokens.tolist()} == expected
    assert len(seen.sequences) == len(expected)
    assert torch.equal(evaluation.tokens[seen.rows][:, :length], seen.sequences.tokens)
    assert list(seen.sequences.hashes) == sorted(seen.sequences.hashes)


def test_wrong_studies_are_refused_before_any_work(monkeypatch, tmp_path) -> None:
    model = hooked_transformer()
    base = study(model)["base"]

    def with_config(**changes) -> Setting:
        return dataclasses.replace(base, config=dataclasses.replace(CONFIG, **changes))

    monkeypatch.setattr(passes, "calibrate", None)
    for settings_, message in (
        ({}, "at least one setting"),
        ({"a/b": base, "a b": base}, "would share a folder"),
        ({"..": base}, r"cannot be called '\.\.'"),
        ({"": base}, "cannot be called ''"),
        ({"in-progress": base}, "cannot be called 'in-progress'"),
        ({"layer_sweep.json": base}, "cannot be called 'layer_sweep.json'"),
        ({"a" * 300: base}, "cannot be called 'aaa"),
        ({"base": with_config(until="nonvacuous")}, "until='nonvacuous'"),
        ({"base": base, "other": with_config(batch_tokens=7)}, "batch_tokens is None in setting 'base' and 7"),
        ({"base": with_config(seq_len=8)}, "seq_len = 8"),
        ({"base": dataclasses.replace(base, calibration=View(base.calibration.sequences, first=999))}, "first 999"),
        ({"base": dataclasses.replace(base, calibration=View(base.calibration.sequences, length=1))}, "first 1 tokens"),
        ({"base": dataclasses.replace(base, calibration=base.evaluation)}, "share"),
        ({"base": dataclasses.replace(base, config=dataclasses.asdict(CONFIG))}, "must be a CertifyConfig"),
    ):  # fmt: skip
        with pytest.raises(CertifyError, match=message):
            certify_many(model, settings_, output=tmp_path / "study")
    monkeypatch.undo()
    with pytest.raises(CertifyError, match="setting 'rare': no feature was active on 999999"):
        certify_many(model, {"rare": with_config(tau=999999)})


def test_another_run_in_a_settings_folder_is_named(tmp_path) -> None:
    model = hooked_transformer()
    base = study(model)["base"]
    certify_many(model, {"base": base}, output=tmp_path)
    other = dataclasses.replace(base, config=dataclasses.replace(CONFIG, tau=3))
    with pytest.raises(CertifyError, match="holds another run: config.tau is 2 there, 3 here"):
        certify_many(model, {"base": other}, output=tmp_path)
    assert (tmp_path / "base" / MANIFEST).exists()
    assert isinstance(tmp_path, Path)
