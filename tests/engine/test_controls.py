"""Controls on tiny models: what is drawn, what is measured with it, and what the shuffle tests make of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.builders import D_SAE, SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import Certificate, CertifyConfig, CertifyError, certify, verify
from saelens_certify.bounds import betting_upper, loss_range
from saelens_certify.controls import CONTROL, control_names, first_of_each_kind
from saelens_certify.frequency import N_GROUPS, frequency_groups, n_movable, permutation_within
from saelens_certify.integrations.model_card import model_card_section
from saelens_certify.integrations.sae_bench import check_certificate
from saelens_certify.proxies import (
    feature_permutation,
    matched_permutation,
    random_decoder,
    variants_of,
)
from saelens_certify.report import certificate_figure
from saelens_certify.report.table import certificate_tables
from saelens_certify.saes import adapt

CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, permutations=4, matched_permutations=3, random_decoders=2, random_unit_decoders=1,
    part_sequences=8, progress=False, seed=5,
)  # fmt: skip
NAMES = [
    *(f"permuted_{r}" for r in range(4)),
    *(f"matched_{r}" for r in range(3)),
    *(f"random_decoder_{r}" for r in range(2)),
    "random_unit_decoder_0",
]
CALIBRATION, EVALUATION = make_tokens(30, seed=1), make_tokens(40, seed=2)


def run(config: CertifyConfig = CONFIG, output: Path | None = None, **more: Any) -> Certificate:
    return certify(
        hooked_transformer(), more.pop("sae", None) or make_sae(), calibration=CALIBRATION,
        evaluation=EVALUATION, config=config, output=output,
    )  # fmt: skip


@functools.cache
def reference() -> Certificate:
    return run()


# What is drawn.


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_groups_are_deciles_of_the_features_that_were_active(counts) -> None:
    groups = frequency_groups(torch.tensor(counts)).tolist()
    active = sorted(count for count in counts if count > 0)
    for count, group in zip(counts, groups, strict=True):
        if count == 0:
            assert group == 0
        else:
            # The first decile whose largest count is at least this one, by the definition of a quantile.
            below = Fraction(sum(other < count for other in active), len(active))
            assert group == int(below * N_GROUPS) + 1
    for a, first in zip(counts, groups, strict=True):
        for b, second in zip(counts, groups, strict=True):
            assert (first <= second) if a <= b else True
            assert (first == second) if a == b else True
    sizes = Counter(groups)
    assert n_movable(torch.tensor(groups)) == sum(sizes[group] > 1 for group in groups)


def test_deciles_are_of_equal_size_where_counts_differ() -> None:
    counts = torch.cat([torch.zeros(17, dtype=torch.int64), torch.arange(1, 201)])
    counts = counts[torch.randperm(217, generator=torch.Generator().manual_seed(0))]
    groups = frequency_groups(counts)
    assert torch.bincount(groups).tolist() == [17, *[20] * 10]
    assert frequency_groups(torch.zeros(5, dtype=torch.int64)).tolist() == [0] * 5
    # Three features: each alone in its decile, nothing can move.
    assert n_movable(frequency_groups(torch.tensor([3, 1, 2]))) == 0


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(-5, 5), st.integers(0, 9))
def test_matched_permutations_keep_every_feature_in_its_decile(counts, seed, index) -> None:
    found = matched_permutation(torch.tensor(counts), seed, index)
    groups = frequency_groups(torch.tensor(counts))
    assert found.dtype == torch.int32
    assert sorted(found.tolist()) == list(range(len(counts)))
    assert torch.equal(groups[found.long()], groups)
    sizes = torch.bincount(groups)
    moved = found != torch.arange(len(counts))
    assert not moved[sizes[groups] == 1].any()


def test_permutations_within_groups_are_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 1, 0, 1, 0, 2])
    drawn = Counter(tuple(permutation_within(groups, generator).tolist()) for _ in range(6000))
    assert len(drawn) == 12
    assert max(abs(n - 500) for n in drawn.values()) < 5 * 500**0.5


def test_draws_differ_by_index_kind_and_seed_and_by_nothing_else() -> None:
    counts = torch.ones(D_SAE, dtype=torch.int64)
    draws = {
        (kind, seed, index): tuple(draw.tolist())
        for seed in (0, 1)
        for index in range(3)
        for kind, draw in (
            ("uniform", feature_permutation(D_SAE, seed, index)),
            ("matched", matched_permutation(counts, seed, index)),
        )
    }
    assert len(set(draws.values())) == len(draws)
    assert draws["matched", 1, 2] == tuple(matched_permutation(counts, 1, 2).tolist())


def test_a_permutation_is_the_same_in_every_version() -> None:
    """Numbers that were published with a seed stay what they are."""
    generator = torch.Generator().manual_seed(10_007 * 4096)
    assert feature_permutation(8, 0, 0).tolist() == torch.randperm(8, generator=generator).tolist()
    rows = random_decoder(adapt(make_sae()), 0).decoder
    assert rows is not None
    expected = torch.randn(
        D_SAE, rows.shape[1], generator=torch.Generator().manual_seed(2 * 10_007 * 4096)
    )
    expected *= (rows.norm(dim=-1) / expected.norm(dim=-1))[:, None]
    torch.testing.assert_close(rows, expected)


def test_random_decoders_have_the_norms_of_the_rows_and_nothing_else_of_them() -> None:
    adapter = adapt(make_sae())
    own = adapter.decoder
    assert own is not None
    drawn = [random_decoder(adapter, 3, index).decoder for index in range(3)]
    for rows in drawn:
        assert rows is not None
        torch.testing.assert_close(rows.norm(dim=-1), own.norm(dim=-1))
        cosines = torch.nn.functional.cosine_similarity(rows, own, dim=-1)
        assert cosines.abs().mean() < 0.25
    assert not torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    unit = random_decoder(adapter, 3, 1, norm="unit").decoder
    assert unit is not None
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(D_SAE))
    again = random_decoder(adapter, 3, 1, keep=False)
    assert again.decoder is not again.decoder
    assert torch.equal(again.decoder, drawn[1])  # type: ignore[arg-type]


def test_decoders_too_large_to_keep_are_drawn_again(monkeypatch) -> None:
    from saelens_certify import proxies

    config = dataclasses.replace(CONFIG, permutations=0, matched_permutations=0)
    adapter = adapt(make_sae())
    kept = variants_of(adapter, config)
    monkeypatch.setattr(proxies, "_KEPT_BYTES", 0)
    drawn = variants_of(adapter, config)
    assert kept[-1].decoder is kept[-1].decoder
    assert drawn[-1].decoder is not drawn[-1].decoder
    for one, other in zip(kept[2:], drawn[2:], strict=True):
        assert one.name == other.name
        assert torch.equal(one.decoder, other.decoder)  # type: ignore[arg-type]
    found = run(config).evidence
    assert found.equals(reference().evidence.select(found.column_names))


def test_matched_permutations_need_frequencies() -> None:
    with pytest.raises(CertifyError, match="matched_permutations = 3 needs the frequencies"):
        variants_of(adapt(make_sae()), CONFIG)


# What is measured.


def test_controls_are_those_asked_for() -> None:
    found = reference()
    assert list(found.controls) == control_names(found) == NAMES
    assert all(CONTROL.fullmatch(name) for name in NAMES)
    for name, control in found.controls.items():
        losses = found.column(f"loss_{name}")
        gap = np.abs(found.column("loss_base") - losses).mean()
        assert control["gap"] == pytest.approx(gap, rel=1e-12)
        assert control["risk"] == pytest.approx(losses.mean(), rel=1e-12)
    assert len({round(control["risk"], 6) for control in found.controls.values()}) == len(NAMES)
    assert first_of_each_kind(NAMES, 1) == [
        "permuted_0", "matched_0", "random_decoder_0", "random_unit_decoder_0",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_and_parts_change_nothing(batch: int) -> None:
    config = dataclasses.replace(CONFIG, batch_tokens=batch * SEQ_LEN, part_sequences=batch + 2)
    found, expected = run(config), reference()
    for name in NAMES:
        np.testing.assert_allclose(
            found.column(f"loss_{name}"), expected.column(f"loss_{name}"), atol=1e-5
        )
    for kind, test in found.shuffle_tests.items():
        other = expected.shuffle_tests[kind]
        assert (test.p_value, test.b) == (other.p_value, other.b)
        for name in ("gap", "control_gap", "effect", "lower", "upper"):
            assert getattr(test, name) == pytest.approx(getattr(other, name), abs=1e-4)


def test_more_controls_leave_the_others_as_they_are() -> None:
    fewer = run(dataclasses.replace(CONFIG, permutations=1, matched_permutations=2))
    for name in ("permuted_0", "matched_0", "matched_1", *NAMES[-3:]):
        np.testing.assert_array_equal(
            fewer.column(f"loss_{name}"), reference().column(f"loss_{name}")
        )


def test_a_run_that_stopped_goes_on_with_the_same_controls(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = run(output=whole)
    run(output=part)
    for name in ("certificate.json", "evidence/part-00003.parquet", "evidence/part-00004.parquet"):
        (part / name).unlink()
    again = run(output=part)
    assert again.evidence.equals(expected.evidence)
    for file in ("calibration.safetensors", "evidence/part-00004.parquet"):
        assert (part / file).read_bytes() == (whole / file).read_bytes()
    assert again.shuffle_tests == expected.shuffle_tests == verify(part).certificate.shuffle_tests
    checked = verify(part, model=hooked_transformer(), sae=make_sae(), evaluation=EVALUATION)
    assert checked.n_remeasured == 32
    with pytest.raises(CertifyError, match="matched_permutations"):
        run(dataclasses.replace(CONFIG, matched_permutations=4), output=part)


def test_random_decoders_are_refused_before_any_work_where_there_are_no_rows(monkeypatch) -> None:
    from saelens_certify import passes, preparation

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("work was done before the check")

    adapter = dataclasses.replace(adapt(make_sae()), decoder=None)
    monkeypatch.setattr(preparation, "adapt", lambda _sae: adapter)
    monkeypatch.setattr(passes, "calibrate", fail)
    with pytest.raises(CertifyError, match="no W_dec of shape.*random_decoders=0"):
        run()


# What the shuffle tests make of it.


def test_shuffle_tests_are_what_the_evidence_says() -> None:
    found = reference()
    base = found.column("loss_base")
    width = float(loss_range(found.vocab_size, CONFIG.alpha))
    kinds = ["permuted", "matched", "random_decoder", "random_unit_decoder"]
    assert list(found.shuffle_tests) == kinds
    for kind, test in found.shuffle_tests.items():
        own = np.abs(base - found.column("loss_sae"))
        others = np.stack(
            [np.abs(base - found.column(f"loss_{n}")) for n in NAMES if n[:-2] == kind]
        )
        b = int((others.mean(axis=1) <= own.mean()).sum())
        assert (test.b, test.n_permutations) == (b, len(others))
        assert test.p_value == pytest.approx((1 + b) / (1 + len(others)))
        assert test.effect == pytest.approx(others.mean() - own.mean(), abs=1e-9)
        upper = betting_upper(others.mean(axis=0) - own, -width, width, CONFIG.delta / 2)
        assert test.upper == pytest.approx(upper, abs=1e-6)
        assert test.confidence == 1 - CONFIG.delta
        assert len(test.assumptions) == 3
    # A roughly reconstructing SAE: shuffling hurts it.
    assert found.shuffle_tests["permuted"].effect > 0
    assert found.shuffle_tests["permuted"].p_value == 1 / 5
    movable = n_movable(frequency_groups(found.calibration.counts))
    assert f"{movable} of the {D_SAE} features can move" in found.shuffle_tests["matched"].null


def test_the_numbers_go_everywhere(tmp_path: Path) -> None:
    found = reference()
    metrics = found.to_metrics()["faithfulness_certificate"]
    for kind, test in found.shuffle_tests.items():
        assert metrics[f"shuffle_p_value_{kind}"] == test.p_value
        assert metrics[f"shuffle_effect_{kind}"] == test.effect
        assert metrics[f"shuffle_effect_{kind}_lower"] == test.lower
        assert metrics[f"shuffle_effect_{kind}_upper"] == test.upper
        assert metrics[f"shuffle_share_{kind}"] == test.share
    values = json.loads(found.save(tmp_path / "run").read_text())
    check_certificate(values)
    entries = values["eval_result_unstructured"]["shuffle_tests"]
    assert entries["matched"]["null"] == found.shuffle_tests["matched"].null
    assert entries["permuted"]["n_permutations"] == 4
    section = model_card_section(values)
    assert "| shuffled within frequency | 3 |" in section
    table = next(t for t in certificate_tables(found) if "Shuffle tests" in str(t.title))
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["4", "3", "2", "1"]
    assert columns[-1] == [
        "alignment", "alignment beyond frequency", "alignment beyond norm", "alignment, or norms",
    ]  # fmt: skip
    curves: Any = certificate_figure(found)
    drawn = [trace.name for trace in curves.data if trace.type == "scatter"]
    assert drawn == [
        "this SAE", "shuffled features (0)", "shuffled within frequency (0)", "random decoder (0)",
        "random unit decoder (0)",
    ]  # fmt: skip


def test_without_controls_there_is_no_test() -> None:
    found = run(CertifyConfig(seq_len=SEQ_LEN, progress=False))
    assert found.controls == found.shuffle_tests == {}
    assert not any("shuffle" in name for name in found.to_metrics()["faithfulness_certificate"])


def test_no_test_where_the_losses_decided_how_many_sequences_there_are() -> None:
    found = run(dataclasses.replace(CONFIG, until="nonvacuous"))
    assert found.controls
    assert found.shuffle_tests == {}
    assert any("no shuffle tests" in str(table.title) for table in certificate_tables(found))
