"""Distribution shift: one pool, shifted documents, and what the rows of the result say."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import (
    BOS,
    D_VOCAB,
    SEQ_LEN,
    gpt2_bridge,
    hooked_transformer,
    make_sae,
    make_tokens,
)

from saelens_certify import Certificate, CertifyConfig, CertifyError, certify, verify
from saelens_certify.certification import read_sides
from saelens_certify.data.corruption import corrupted
from saelens_certify.experiments.result import Row
from saelens_certify.experiments.shift import (
    BOUNDS,
    TERMS,
    UNCHANGED,
    distribution_shift,
    rate_name,
    shift_experiment,
    shift_rows,
)
from saelens_certify.experiments.shift_findings import shift_findings
from saelens_certify.report.experiments.shift import shift_figure
from saelens_certify.study import folder_name

CONFIG = CertifyConfig(seq_len=SEQ_LEN, coding="topk:6", tau=4, seed=3, progress=False)
RATES = (1.0, 0.0, 0.25)
CALIBRATION = make_tokens(40, seed=1)
OTHER = make_tokens(25, seed=9)


def evaluation() -> torch.Tensor:
    """60 sequences, of which two are near duplicates of others."""
    tokens = make_tokens(60, seed=2)
    tokens[1], tokens[3] = tokens[0], tokens[2]
    tokens[1, -1] = (tokens[0, -1] + 1) % 50 + 2
    tokens[3, 1] = (tokens[2, 1] + 1) % 50 + 2
    return tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("shift")
    result = distribution_shift(
        hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=evaluation(),
        rates=RATES, others={"other text": OTHER}, config=CONFIG, output=output,
    )  # fmt: skip
    return result, output


@pytest.fixture(scope="module")
def rows(world) -> dict[str, Row]:
    return {str(row["name"]): row for row in world[0].rows}


def alone(name: str) -> Certificate:
    model, sae = hooked_transformer(), make_sae()
    _, plain = read_sides(model, CALIBRATION, evaluation(), CONFIG)
    documents: Any = {UNCHANGED: plain, "other text": OTHER}.get(name)
    if documents is None:
        rate = float(name.split("=")[1])
        # A single run cannot know which documents repeated each other before they were corrupted.
        clusters = dict(zip(plain.hashes, independent_names(plain), strict=True))
        documents = corrupted(plain, rate, seed=3, d_vocab=D_VOCAB, keep=(BOS,))
        names = tuple(clusters[own] for own in plain.hashes)
        documents = type(plain)(documents.tokens, names, documents.hashes, documents.source)
    return certify(model, sae, calibration=CALIBRATION, evaluation=documents, config=CONFIG)


def independent_names(plain) -> list[str]:
    """Clusters by comparing all pairs of 3-gram sets."""
    sets = [
        {tuple(row[i : i + 3]) for i in range(len(row) - 2)} for row in plain.tokens[:, 1:].tolist()
    ]
    names = [f"c{i}" for i in range(len(sets))]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if len(a & b) / len(a | b) >= 0.5:
                names[i] = names[j]
    return names


def test_conditions_come_in_order_and_share_keys(world, rows):
    result, _ = world
    assert list(rows) == [UNCHANGED, "rate=0.25", "rate=1", "other text"]
    assert [row["rate"] for row in result.rows] == [0.0, 0.25, 1.0, None]
    assert len({tuple(row) for row in result.rows}) == 1
    assert set(result.certificates) == set(rows)


@pytest.mark.parametrize("name", [UNCHANGED, "rate=0.25", "rate=1", "other text"])
def test_each_row_is_what_a_run_by_itself_says(rows, name):
    found, expected = rows[name], alone(name)
    measured = expected.measured
    assert found["n_sequences"] == measured.n_sequences == (25 if name == "other text" else 58)
    for key in ("risk_base", "risk_sae", "risk_pool", "gap", "eta"):
        assert abs(number(found, key) - getattr(measured, key)) < 1e-5
    for key in BOUNDS:
        assert abs(number(found, key) - expected.bounds[key].value) < 1e-5
        uniform = math.log2(D_VOCAB)
        assert found[f"nonvacuous_{key}"] == (number(found, key) < uniform)
    for key in ("kl", "top1_agreement", "l0", "outside"):
        assert abs(number(found, key) - expected.mean(key)) < 1e-5
    assert abs(number(found, "unigram") - expected.baselines["unigram"]) < 1e-5
    assert found["pool_size"] == expected.pool.size
    share = number(found, "outside") / number(found, "l0")
    assert abs(number(found, "outside_share") - share) < 1e-12


def test_the_terms_of_a_bound_add_up_to_it(rows):
    for row in rows.values():
        for bound, terms in TERMS.items():
            total = math.fsum(number(row, f"{bound}_{term}") for term in terms)
            assert abs(total - number(row, bound)) < 1e-9


def test_a_unigram_model_of_the_calibration_documents_gets_worse_with_the_rate(rows):
    worse = [number(rows[name], "unigram") for name in (UNCHANGED, "rate=0.25", "rate=1")]
    assert worse[0] + 0.1 < worse[1] < worse[2] - 0.3


def test_corrupted_documents_keep_their_clusters(world):
    result, _ = world
    of = {name: each.evidence.to_pydict() for name, each in result.certificates.items()}
    assert len(set(of["rate=1"]["sequence"]) & set(of[UNCHANGED]["sequence"])) == 0
    # Clusters are those of the documents as they are, at every rate.
    for name in (UNCHANGED, "rate=0.25", "rate=1"):
        assert sorted(of[name]["cluster_size"])[-5:] == [1, 2, 2, 2, 2]
    assert of["other text"]["cluster_size"] == [1] * 25
    selection = result.certificates["rate=0.25"].manifest["data"]["evaluation"]["source"][
        "selection"
    ]
    assert any("rate=0.25 seed=3" in note for note in selection)


def test_bos_of_a_tokenizer_is_neither_replaced_nor_put_in():
    seen = []

    def keep(sequences, rate, *, seed, d_vocab, keep):
        seen.append(keep)
        return corrupted(sequences, rate, seed=seed, d_vocab=d_vocab, keep=keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelens_certify.experiments.shift.corrupted", keep)
        distribution_shift(
            gpt2_bridge(), make_sae(), calibration=CALIBRATION, evaluation=make_tokens(5, seed=2),
            rates=[1.0], config=CONFIG,
        )  # fmt: skip
    assert seen == [(0, 1)]  # BOS; EOS and pad


def test_files_and_runs_are_written(world):
    result, output = world
    for name in result.certificates:
        verify(output / folder_name(name))
    with (output / "distribution_shift.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["name"] for line in table] == [row["name"] for row in result.rows]
    saved = json.loads((output / "distribution_shift.json").read_text())
    assert saved["findings"] == list(result.findings)
    loaded = {n: Certificate.load(output / folder_name(n)) for n in result.certificates}
    assert shift_experiment(loaded).rows == result.rows


def test_the_figure_shows_the_rows(world):
    result, _ = world
    traces: Any = result.figure.data
    bars = [trace for trace in traces if trace.type == "bar"]
    heights = np.sum([trace.y for trace in bars], axis=0)
    np.testing.assert_allclose(heights, [row["u_sae"] for row in result.rows], atol=1e-9)
    (sharp,) = [trace for trace in traces if trace.name == "sharp (betting)"]
    assert list(sharp.x) == [0.0, 0.25, 1.0]
    assert list(sharp.y) == [row["sharp_betting"] for row in result.rows[:3]]
    only: Any = shift_figure(
        [row for row in result.rows if row["name"] in (UNCHANGED, "other text")]
    )
    assert "sharp (betting)" not in [trace.name for trace in only.data]


def number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)


def made_up(rate: float | None, name: str = "x", **changes: Any) -> Row:
    row: Row = {"name": name, "rate": rate, "confidence": 0.95, "simultaneous": 1, "eta": 0.0}
    row |= {"risk_base": 5.0, "uniform": 10.0, "unigram": 8.0}
    row |= {bound: 7.0 for bound in BOUNDS}
    row |= {f"{bound}_{term}": 1.0 for bound, terms in TERMS.items() for term in terms}
    row |= changes
    row |= {f"nonvacuous_{b}": None if row[b] is None else number(row, b) < 10.0 for b in BOUNDS}
    return row


def said(*given: Row) -> str:
    return " ".join(shift_findings(given))


def test_findings_name_the_first_vacuous_rate():
    text = said(
        made_up(0.0), made_up(0.1, u_sae=9.9), made_up(0.5, u_sae=10.0), made_up(1.0, u_sae=12.0)
    )
    assert "U_SAE is first vacuous at corruption rate 0.5; the rate looked at before, 0.1," in text
    assert "sharp (betting) stays non-vacuous at every corruption rate up to 1." in text
    assert "again" not in text
    text = said(made_up(0.0), made_up(0.1, u_sae=11.0), made_up(0.5))
    assert "U_SAE is first vacuous at corruption rate 0.1" in text
    assert "non-vacuous again at a higher rate" in text
    assert "U_SAE is vacuous already" in said(made_up(0.0, u_sae=11.0), made_up(0.5, u_sae=12.0))


def test_findings_say_whether_the_paper_is_reproduced():
    over = dict.fromkeys(BOUNDS, 12.0)
    assert "as the paper found" in said(made_up(0.0), made_up(1.0, **over))
    assert "against the paper's finding" in said(made_up(0.0), made_up(1.0))
    text = said(made_up(0.0), made_up(1.0, u_sae=12.0, u_sae_occam=12.0))
    assert "U_SAE, U_SAE+Occam is vacuous, as the paper found; sharp (betting)" in text
    # Half of the tokens are no random text: the claim is not about that.
    assert "paper" not in said(made_up(0.0), made_up(0.5, **over))


def test_findings_do_not_blame_the_sae_for_the_model():
    over = dict.fromkeys(BOUNDS, 12.0)
    assert "nothing against the SAE" in said(made_up(0.0), made_up(1.0, risk_base=10.0, **over))
    assert "nothing against the SAE" not in said(made_up(0.0), made_up(1.0, risk_base=9.9, **over))


def test_findings_name_the_term_that_grows():
    far = made_up(1.0, u_sae=13.0, u_sae_mismatch=6.0, u_sae_gap=2.0, eta=0.5)
    text = said(made_up(0.0), far)
    assert "U_SAE changes by +6.00 bits" in text
    assert "pool mismatch (Δ·η) +5.00, concentration +0.00)" in text
    assert "grows most is: pool mismatch (Δ·η)" in text
    assert "0.0 % of sequences violate the pool on the documents as they are, 50.0 % here" in text
    other = made_up(None, "code", u_sae=9.0, u_sae_gap=0.5)
    text = said(made_up(0.0), other)
    assert "Data 'code': U_SAE changes by +2.00 bits" in text
    assert "concentration +2.50); no measured term grows" in text
    assert "none vacuous" in text
    assert "first vacuous" not in text
    # A run without published bounds is told by the sharp one.
    late = made_up(1.0, u_sae=None, u_sae_occam=None, sharp_betting=8.0, sharp_betting_gap=2.0)
    start = made_up(0.0, u_sae=None, u_sae_occam=None)
    assert "sharp (betting) changes by +1.00 bits" in said(start, late)


def test_names_of_rates_are_exact():
    assert [rate_name(rate) for rate in (1, 0.05, 0.1 + 0.2)] == [
        "rate=1", "rate=0.05", "rate=0.30000000000000004",
    ]  # fmt: skip


def run(**changes: Any):
    arguments: dict[str, Any] = {
        "calibration": CALIBRATION, "evaluation": make_tokens(5, seed=2), "rates": [0.5], "config": CONFIG,
    }  # fmt: skip
    return distribution_shift(hooked_transformer(), make_sae(), **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [1.5]}, r"rate=1\.5"),
        ({"others": [OTHER]}, "by name"),
        ({"others": {"": OTHER}}, "a word for it"),
        ({"others": {UNCHANGED: OTHER}}, "rename it"),
        ({"others": {"rate=0.5": OTHER}}, "rename it"),
        ({"others": {"twice": CALIBRATION[:3]}}, r"others\['twice'\]: .*share 3 sequences"),
        ({"others": {"short": OTHER[:, :4]}}, r"others\['short'\]"),
        ({"evaluation": CALIBRATION}, "share 40 sequences"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes, message, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("work was started")

    monkeypatch.setattr("saelens_certify.experiments.shift.certify_many", never)
    with pytest.raises(CertifyError, match=message):
        run(**changes)


def test_corrupted_documents_that_meet_calibration_are_refused(monkeypatch):
    def collide(sequences, *_args, **_kwargs):
        return type(sequences).from_tokens(
            CALIBRATION[:5], sequences.document_ids, sequences.source
        )

    monkeypatch.setattr("saelens_certify.experiments.shift.corrupted", collide)
    with pytest.raises(CertifyError, match=r"rate=0\.5: .*share 5 sequences"):
        run()


def test_repeating_documents_are_refused_if_asked():
    config = CertifyConfig(seq_len=SEQ_LEN, dependence="refuse", progress=False)
    with pytest.raises(CertifyError, match="not independent draws"):
        run(evaluation=evaluation(), config=config)


def test_an_experiment_needs_the_unchanged_documents_and_one_pool(world):
    result, _ = world
    rated = {name: each for name, each in result.certificates.items() if name != UNCHANGED}
    with pytest.raises(CertifyError, match="needs a certificate named 'unchanged'"):
        shift_experiment(rated)
    wider = certify(
        hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=OTHER,
        config=CertifyConfig(seq_len=SEQ_LEN, coding="topk:6", tau=1, progress=False),
    )  # fmt: skip
    with pytest.raises(CertifyError, match="'wider' has another pool"):
        shift_rows({**result.certificates, "wider": wider})
