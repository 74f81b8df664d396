"""Runs that stop when they are decided, sequences that repeat each other, and several runs at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import (
    Certificate,
    CertifyConfig,
    CertifyError,
    EvidenceError,
    Sequences,
    bounds,
    certify,
    compare,
    demo,
    verify,
)
from saelens_certify.cli import EXIT_DONE, EXIT_INPUT, main
from saelens_certify.evidence import (
    CALIBRATION,
    CERTIFICATE,
    EVIDENCE,
    MANIFEST,
    RunFolder,
    load_calibration,
)
from saelens_certify.integrations.sae_bench import check_certificate
from saelens_certify.report import certificate_figure
from saelens_certify.report.terms import bound_label

N = 90
QUIET = CertifyConfig(progress=False)


@pytest.fixture(scope="module")
def documents() -> dict[str, Sequences]:
    return {
        "calibration": demo.load_sequences("calibration", 32).take(80),
        "evaluation": demo.load_sequences("evaluation", 32).take(N),
    }


@pytest.fixture(scope="module")
def whole(documents) -> Certificate:
    return certify(demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents, config=QUIET)


@pytest.fixture(scope="module")
def stopped(documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    certify(
        demo.load_model(),
        demo.load_sae(demo.DEFAULT_SAE),
        **documents,
        config=QUIET,
        until=7.1,
        output=folder,
    )
    return folder


def test_a_run_stops_at_the_first_look_that_decides_it(stopped, whole) -> None:
    certificate = Certificate.load(stopped)
    n = certificate.evidence.num_rows
    assert 0 < n < N
    assert certificate.stop is not None
    assert certificate.stop.reason == "target"
    assert certificate.stop.n <= n
    assert certificate.headline.value <= certificate.stop.value <= 7.1
    # What was measured is the beginning of what a whole run measures, bit for bit.
    for name in ("sequence", "loss_base", "loss_sae", "violation", "rarest"):
        assert certificate.evidence.column(name).to_pylist() == (
            whole.evidence.column(name).slice(0, n).to_pylist()
        )
    when, values = whole.sequence("sharp_betting", np.arange(1, n + 1))
    assert values[certificate.stop.n - 1] <= 7.1 < values[certificate.stop.n - 2]
    assert when[-1] == n
    # The part before the last had not decided it.
    parts = sorted((stopped / EVIDENCE).glob("*.parquet"))
    before = n - pq.read_metadata(parts[-1]).num_rows
    assert before < certificate.stop.n


def test_only_time_uniform_bounds_are_issued(stopped, whole) -> None:
    certificate = Certificate.load(stopped)
    assert set(bounds.SHARP) | {"sharp_occam_tau"} == set(certificate.bounds)
    assert {"u_sae", "direct_base"} <= set(whole.bounds)
    for bound in certificate.bounds.values():
        assert not any("fixed before looking at their" in text for text in bound.assumptions)
        assert any("Time-uniform" in text for text in bound.assumptions)
    assert "u_sae" not in certificate.to_metrics()["faithfulness_certificate"]
    assert certificate.stop is not None
    n = certificate.evidence.num_rows
    assert certificate.verdict().endswith(f"Decided after {certificate.stop.n} of {n} sequences.")
    check_certificate(json.loads((stopped / CERTIFICATE).read_text()))


def test_a_stopped_run_verifies_resumes_and_is_not_a_damaged_one(
    stopped, documents, tmp_path
) -> None:
    assert verify(stopped).n_sequences == Certificate.load(stopped).evidence.num_rows
    again = verify(
        stopped,
        model=demo.load_model(),
        sae=demo.load_sae(demo.DEFAULT_SAE),
        evaluation=documents["evaluation"],
    )
    assert again.n_remeasured > 0
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / CERTIFICATE).unlink()
    parts = sorted((folder / EVIDENCE).glob("*.parquet"))
    parts[-1].unlink()
    certify(
        demo.load_model(),
        demo.load_sae(demo.DEFAULT_SAE),
        **documents,
        config=QUIET,
        until=7.1,
        output=folder,
    )
    for file in (CERTIFICATE, *(f"{EVIDENCE}/{part.name}" for part in parts)):
        if file != CERTIFICATE:
            assert (folder / file).read_bytes() == (stopped / file).read_bytes()
    # One part fewer, and the rule is not met: the run is incomplete, and says so.
    sorted((folder / EVIDENCE).glob("*.parquet"))[-1].unlink()
    with pytest.raises(EvidenceError, match="announces 90"):
        Certificate.load(folder)


def test_a_run_that_is_never_decided_says_so(documents) -> None:
    certificate = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents, config=QUIET, until=1.5
    )
    assert certificate.evidence.num_rows == N
    assert certificate.stop is None
    assert "Not decided after all 90 sequences" in certificate.verdict()


def test_futile_and_measured() -> None:
    """A random model does not reach the baseline: with confidence, no number of sequences will do."""
    evaluation = make_tokens(400, seed=2)
    arguments: dict[str, Any] = {
        "calibration": make_tokens(30, seed=1), "evaluation": evaluation,
        "config": CertifyConfig(seq_len=SEQ_LEN, progress=False, tau=5),
    }  # fmt: skip
    certificate = certify(hooked_transformer(), make_sae(), until="decided", **arguments)
    assert certificate.stop is not None
    assert certificate.stop.reason == "futile"
    assert certificate.evidence.num_rows < 400
    assert not certificate.nonvacuous
    assert "with ever more sequences sharp_betting tends to" in certificate.verdict()


@pytest.mark.parametrize("until", ["now", 0, -2.0, True])
def test_impossible_rules_are_refused_before_any_work(until) -> None:
    with pytest.raises(CertifyError, match="until must be"):
        certify(None, None, calibration=None, evaluation=None, until=until)


def test_rarest_says_which_pools_are_violated() -> None:
    arguments: dict[str, Any] = {
        "calibration": make_tokens(6, seed=1),
        "evaluation": make_tokens(60, seed=2),
    }
    found = {
        tau: certify(
            hooked_transformer(), make_sae(), **arguments,
            config=CertifyConfig(seq_len=SEQ_LEN, progress=False, tau=tau),
        )
        for tau in (1, 2, 8)
    }  # fmt: skip
    rarest = found[1].column("rarest")
    for tau, certificate in found.items():
        np.testing.assert_array_equal(certificate.column("violation"), rarest < tau)
    assert (rarest < 8).mean() > 0
    # The best threshold is that of a run of its own, at its share of delta.
    sizes = bounds.doubling_thresholds(found[1].calibration.counts.numpy(), 1)
    best = bounds.best_threshold(
        found[1].losses, rarest, sizes, dict_size=found[1].dict_size, delta=0.05
    )
    assert found[1].bounds["sharp_occam_tau"].value == best.bound.value
    one = found[8].bounds_at(0.05 / len(sizes))["sharp_occam"].value
    assert best.bound.value <= one + 1e-9


def repeated(n: int, copies: int) -> torch.Tensor:
    """Each of n sequences and near copies of it: the last token differs."""
    tokens = make_tokens(n, seed=5).repeat_interleave(copies, dim=0)
    tokens[:, -1] = (tokens[:, -1] + torch.arange(len(tokens)) % copies) % 90 + 5
    return tokens


def test_near_duplicates_count_once() -> None:
    model, sae, n, copies = hooked_transformer(), make_sae(), 40, 3
    arguments: dict[str, Any] = {
        "calibration": make_tokens(30, seed=1),
        "evaluation": repeated(n, copies),
    }
    config = CertifyConfig(seq_len=SEQ_LEN, progress=False)
    with pytest.warns(UserWarning, match="repeat each other"):
        certificate = certify(model, sae, **arguments, config=config)
    assert certificate.evidence.num_rows == n * copies
    assert certificate.measured.n_sequences == n
    for bound in certificate.bounds.values():
        assert any(f"form {n} clusters" in text for text in bound.assumptions)
    ignored = certify(
        model, sae, **arguments, config=dataclasses.replace(config, dependence="ignore")
    )
    assert ignored.measured.n_sequences == n * copies
    assert ignored.bounds["u_sae"].value < certificate.bounds["u_sae"].value
    assert any("were not looked for" in text for text in ignored.bounds["u_sae"].assumptions)
    with pytest.raises(CertifyError, match="not independent draws"):
        certify(model, sae, **arguments, config=dataclasses.replace(config, dependence="refuse"))


def test_clusters_survive_disk_and_any_size_of_parts(tmp_path) -> None:
    model, sae = hooked_transformer(), make_sae()
    arguments: dict[str, Any] = {
        "calibration": make_tokens(30, seed=1),
        "evaluation": repeated(20, 3),
    }
    found = []
    for size in (1, 7, 512):
        config = CertifyConfig(seq_len=SEQ_LEN, progress=False, part_sequences=size)
        with pytest.warns(UserWarning, match="repeat each other"):
            certificate = certify(
                model, sae, **arguments, config=config, output=tmp_path / str(size)
            )
        assert verify(tmp_path / str(size)).certificate.bounds == certificate.bounds
        for part in (tmp_path / str(size) / EVIDENCE).glob("*.parquet"):
            names = pq.read_table(part).column("cluster").to_pylist()
            assert all(names.count(name) == 3 for name in names)
        found.append({name: bound.value for name, bound in certificate.bounds.items()})
    assert found[0] == found[1] == found[2]


def test_simultaneous_certificates_share_delta(whole, documents) -> None:
    certificate = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
        config=dataclasses.replace(QUIET, simultaneous=5),
    )  # fmt: skip
    for name, bound in certificate.bounds.items():
        assert bound.value == whole.bounds_at(0.01)[name].value
        assert bound.value >= whole.bounds[name].value
        assert bound.confidence == 0.95
        assert any("One of 5 certificates" in text for text in bound.assumptions)
    assert "all 5 certificates" in certificate.verdict()


def test_compare_holds_for_all_at_once(whole, documents, tmp_path, capsys) -> None:
    other = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
        config=dataclasses.replace(QUIET, tau=3),
    )  # fmt: skip
    found = compare({"a": whole, "b": other})
    assert found.best == min(found.members, key=lambda name: found.members[name].bound.value)
    for name, certificate in (("a", whole), ("b", other)):
        member = found.members[name]
        assert member.bound == certificate.bounds_at(0.05, 2)["sharp_betting"]
        assert member.nonvacuous == (member.p_value <= 0.05)
        assert member.p_value < 1e-6
    whole.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "2 certificates at 95% confidence together" in printed
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == EXIT_INPUT
    assert main(["compare", str(tmp_path / "a"), "--bound", "excess_sae"]) == EXIT_INPUT


def test_compare_refuses_what_it_cannot_compare(whole) -> None:
    with pytest.raises(CertifyError, match="by name"):
        compare({})
    with pytest.raises(CertifyError, match="by name"):
        compare([whole])  # pyright: ignore[reportArgumentType]
    with pytest.raises(CertifyError, match="sharp_betting"):
        compare({"a": whole}, bound="u_sae")
    with pytest.raises(CertifyError, match="delta"):
        compare({"a": whole}, delta=1.5)


def test_sequences_are_valid_at_all_times_and_tighten(whole) -> None:
    when, values = whole.sequence("sharp_direct_base")
    assert when[-1] == N
    assert (np.diff(values) <= 0).all()
    assert values[-1] >= whole.bounds["sharp_direct_base"].value
    with pytest.raises(CertifyError, match="choose one of"):
        whole.sequence("nothing")
    with pytest.raises(CertifyError, match="times"):
        whole.sequence(times=[5, 4])


def forged(source: Path, target: Path, table: pa.Table) -> Path:
    """A folder with other evidence under the same manifest, sealed over it."""
    target.mkdir()
    for name in (MANIFEST, CALIBRATION):
        shutil.copy(source / name, target / name)
    folder = RunFolder(target)
    folder.write_part(0, table)
    Certificate(folder.manifest(), load_calibration(target / CALIBRATION), table).seal(folder)
    return target


def test_chosen_rows_do_not_verify(stopped, whole, documents, tmp_path) -> None:
    """The easiest sequences in place of the first ones."""
    n = Certificate.load(stopped).evidence.num_rows
    easy = np.sort(np.argsort(whole.column("loss_base"))[:n])
    folder = forged(stopped, tmp_path / "easy", whole.evidence.take(easy))
    with pytest.raises(EvidenceError, match="not that of the certified documents in their order"):
        verify(
            folder,
            model=demo.load_model(),
            sae=demo.load_sae(demo.DEFAULT_SAE),
            evaluation=documents["evaluation"],
        )


def edited(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, type=table.schema.field(name).type))


def test_edited_clusters_and_violations_are_found(tmp_path) -> None:
    model, sae, evaluation = hooked_transformer(), make_sae(), repeated(20, 3)
    arguments: dict[str, Any] = {"calibration": make_tokens(6, seed=1), "evaluation": evaluation}
    config = CertifyConfig(seq_len=SEQ_LEN, progress=False, tau=3)
    with pytest.warns(UserWarning, match="repeat each other"):
        certificate = certify(model, sae, **arguments, config=config, output=tmp_path / "run")
    table = certificate.evidence
    again: dict[str, Any] = {"model": model, "sae": sae, "evaluation": evaluation}
    assert verify(tmp_path / "run", **again).n_remeasured

    alone = edited(table, "cluster", [None] * len(table))
    with pytest.raises(EvidenceError, match="cluster"):
        verify(forged(tmp_path / "run", tmp_path / "alone", alone))
    without = table.drop_columns(["cluster"])
    with pytest.raises(EvidenceError, match="cluster"):
        verify(forged(tmp_path / "run", tmp_path / "without", without))
    cut = table.slice(0, len(table) - 1)
    with pytest.raises(EvidenceError, match="announces"):
        verify(forged(tmp_path / "run", tmp_path / "cut", cut))

    assert certificate.column("violation").any()
    tame = edited(table, "violation", [False] * len(table))
    tame = edited(tame, "loss_pool", table.column("loss_sae").to_pylist())
    with pytest.raises(EvidenceError, match="contradict each other"):
        verify(forged(tmp_path / "run", tmp_path / "tame", tame))
    consistent = edited(tame, "rarest", [1e6] * len(table))
    with pytest.raises(EvidenceError, match="measured again differs"):
        verify(forged(tmp_path / "run", tmp_path / "consistent", consistent), **again)


def test_a_family_is_not_left_by_comparing_its_best(documents) -> None:
    member = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
        config=dataclasses.replace(QUIET, simultaneous=10),
    )  # fmt: skip
    found = compare({"best": member})
    assert found.family == 10
    assert found.members["best"].bound == member.bounds["sharp_betting"]


def test_settings_that_no_bound_can_have_are_refused_at_once() -> None:
    for wrong in (
        {"simultaneous": 10**400}, {"simultaneous": 10**20}, {"simultaneous": 0},
        {"alpha": 1e-300}, {"delta": 5e-324, "simultaneous": 3}, {"until_bound": "u_sae"},
    ):  # fmt: skip
        with pytest.raises(CertifyError):
            CertifyConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_controls_without_a_test_are_told_about(documents) -> None:
    with pytest.warns(UserWarning, match="no shuffle test"):
        certify(
            demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
            config=dataclasses.replace(QUIET, permutations=1), until="nonvacuous",
        )  # fmt: skip


def test_everything_follows_the_bound_of_the_verdict(documents) -> None:
    certificate = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
        config=dataclasses.replace(QUIET, until_bound="sharp_measured", tau=30), until=9.0,
    )  # fmt: skip
    assert certificate.headline.name == "sharp_measured"
    _, values = certificate.sequence()
    assert values[-1] == certificate.headline.value
    plan = certificate.plan()
    assert (plan.bound, plan.target) == ("sharp_measured", 9.0)
    found = compare({"only": certificate})
    assert found.members["only"].bound.name == "sharp_measured"
    figure: Any = certificate_figure(certificate)
    assert any(bound_label("sharp_measured") in (trace.y or ()) for trace in figure.data)


def test_certificates_of_different_losses_are_not_compared(whole, documents) -> None:
    other = certify(
        demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **documents,
        config=dataclasses.replace(QUIET, alpha=0.9),
    )  # fmt: skip
    with pytest.raises(CertifyError, match="alpha"):
        compare({"a": whole, "b": other})
    fewer = {**documents, "evaluation": documents["evaluation"].take(40)}
    other = certify(demo.load_model(), demo.load_sae(demo.DEFAULT_SAE), **fewer, config=QUIET)
    with pytest.warns(UserWarning, match="documents"):
        compare({"a": whole, "b": other})
    with pytest.raises(CertifyError, match="by name"):
        compare({"a": "folder"})  # pyright: ignore[reportArgumentType]


def test_copies_of_calibration_are_told_about() -> None:
    calibration = make_tokens(30, seed=1)
    copies = calibration[:20].clone()
    copies[:, 4] = (copies[:, 4] + 1) % 90 + 5
    evaluation = torch.cat([copies, make_tokens(20, seed=2)])
    with pytest.warns(UserWarning, match="near duplicates of calibration"):
        certificate = certify(
            hooked_transformer(), make_sae(), calibration=calibration, evaluation=evaluation,
            config=CertifyConfig(seq_len=SEQ_LEN, progress=False),
        )  # fmt: skip
    bound = certificate.headline
    assert any("near duplicates of calibration" in text for text in bound.assumptions)
    assert repr(certificate) == f"<Certificate: {certificate.verdict()}>"
