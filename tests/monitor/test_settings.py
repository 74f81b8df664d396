"""State on disk, mistakes that are named, the sample, the history and the picture."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from engine.builders import SEQ_LEN, make_sae, make_tokens

from monitor.world import EVALUATION, certified, model_of, monitor, subject
from saelens_certify import CertifyError
from saelens_certify.monitor import Monitor, sampling
from saelens_certify.monitor.tally import History, Sums


def test_a_restarted_service_goes_on(tmp_path) -> None:
    options = {"share": 0.5, "seed": 3, "run_length": 50, "false_alarm": 0.1}
    model, whole = monitor(**options)
    _, first = monitor(**options)
    parts = make_tokens(120, seed=8).split(8)
    with whole.attached(model):
        for part in parts:
            model(part)
    with first.attached(model):
        for part in parts[:6]:
            model(part)
    first.save(tmp_path / "state.json")
    json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)
    _, second = monitor(**options)
    second.restore(tmp_path / "state.json")
    assert str(second.report()) == str(first.report())
    with second.attached(model):
        for part in parts[6:]:
            model(part)
    ours, theirs = second.report(), whole.report()
    assert ours.totals == theirs.totals
    assert ours.state.recent == theirs.state.recent
    assert ours.log10_e == theirs.log10_e
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no monitor state at"),
        ("[1", "is no monitor state"),
        ("{}", "is no monitor state"),
        ('{"format": 99, "identity": {}, "settings": {}}', "has format 99"),
        ('{"format": 1, "identity": {}, "settings": {}}', "of another certificate"),
    ],
)
def test_damaged_states_are_refused(tmp_path, content, message) -> None:
    _, mon = monitor()
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(CertifyError, match=message):
        mon.restore(tmp_path / "state.json")


def test_states_of_other_settings_are_refused(tmp_path) -> None:
    monitor()[1].save(tmp_path / "state.json")
    with pytest.raises(CertifyError, match="false_alarm = 1e-09, the monitor has 0.5"):
        monitor(false_alarm=0.5)[1].restore(tmp_path / "state.json")
    values = json.loads((tmp_path / "state.json").read_text())
    del values["state"]["totals"]
    (tmp_path / "state.json").write_text(json.dumps(values))
    with pytest.raises(CertifyError, match="is damaged"):
        monitor()[1].restore(tmp_path / "state.json")


def test_a_certificate_folder_will_do(tmp_path) -> None:
    certified().save(tmp_path / "run")
    model, mon = monitor(certificate=tmp_path / "run")
    with mon.attached(model):
        model(EVALUATION[:2])
    assert mon.report().totals.tested.sequences == 2


def test_another_sae_is_refused() -> None:
    with pytest.raises(CertifyError, match="not the certified SAE: its parameters hash to"):
        Monitor(certified(), subject("topk", d_sae=128))
    same_weights = make_sae("topk", "blocks.2.hook_resid_post")
    with pytest.raises(CertifyError, match="reads at blocks.2"):
        Monitor(certified(), same_weights)
    other_k = make_sae("topk", k=9)
    with pytest.raises(CertifyError, match="other settings"):
        Monitor(certified(), other_k)


def test_a_model_without_the_hook_is_refused() -> None:
    mon = monitor()[1]
    model = model_of("HookedTransformer")
    hook = model.hook_dict.pop("blocks.1.hook_resid_post")
    try:
        with pytest.raises(CertifyError, match="has no hook 'blocks.1.hook_resid_post'"):
            mon.hooks(model)
        with pytest.raises(CertifyError, match="has no hook"), mon.attached(model):
            pass
    finally:
        model.hook_dict["blocks.1.hook_resid_post"] = hook


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"false_alarm": 0}, "false_alarm must lie strictly between 0 and 1, got 0"),
        ({"false_alarm": "5%"}, "false_alarm"),
        ({"run_length": 1}, "run_length must be a number above 1"),
        ({"share": 0}, r"share must lie in \(0, 1\]"),
        ({"share": float("nan")}, "share"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"window": 0}, "window must be at least 1"),
        ({"on_error": "ignore"}, "on_error must be 'record' or 'raise', got 'ignore'"),
        ({"on_alarm": "page"}, "on_alarm must be a function or None, got 'page'"),
        ({"model": "gpt2"}, "str has no hooks; pass a TransformerLens model"),
    ],
)
def test_wrong_settings_are_named(option, message) -> None:
    with pytest.raises(CertifyError, match=message):
        Monitor(certified(), subject(), **option)


def test_wrong_shapes_are_named() -> None:
    mon = monitor()[1]
    with pytest.raises(CertifyError, match=r"tokens has shape \(12,\)"), mon.request(EVALUATION[0]):
        pass
    with (
        pytest.raises(CertifyError, match="their attention_mask"),
        mon.request(EVALUATION, EVALUATION[:2]),
    ):
        pass
    with pytest.raises(CertifyError, match="has width 16, the SAE expects 32"):
        mon.hooks()[0][1](torch.zeros(2, SEQ_LEN, 16), hook=None)


def test_other_kinds_of_arguments_are_named() -> None:
    with pytest.raises(CertifyError, match="give the folder of a run, not NoneType"):
        Monitor(cast(Any, None), subject())
    mon = monitor()[1]
    for model, kind in ((None, "NoneType"), ("gpt2", "str")):
        with pytest.raises(CertifyError, match=f"{kind} has no hooks; pass"), mon.attached(model):
            pass
    with pytest.raises(CertifyError, match="str has no hooks; pass"):
        mon.hooks("gpt2")
    odd: list[Any] = [[[1, 2], [3]], "text", {"input_ids": EVALUATION}]
    for tokens in odd:
        with (
            pytest.raises(CertifyError, match="tokens of the request must be"),
            mon.request(tokens),
        ):
            pass


def test_rows_of_ids_will_do() -> None:
    model, mon = monitor()
    _, same = monitor()
    mask = [[1] * (SEQ_LEN - 2) + [0] * 2] * 3
    with mon.attached(model), mon.request(EVALUATION[:3].tolist(), mask):
        model(EVALUATION[:3])
    with same.attached(model), same.request(EVALUATION[:3], torch.tensor(mask)):
        model(EVALUATION[:3])
    assert mon.report().totals == same.report().totals
    assert mon.report().totals.tokens == 3 * (SEQ_LEN - 2)


def test_the_folder_of_a_state_is_made(tmp_path) -> None:
    mon = monitor()[1]
    mon.save(tmp_path / "new" / "folder" / "state.json")
    mon.restore(tmp_path / "new" / "folder" / "state.json")
    for wrong in (tmp_path, tmp_path / "new" / "folder" / "state.json" / "inside.json"):
        with pytest.raises(CertifyError, match="cannot be written to"):
            mon.save(wrong)
        with pytest.raises(CertifyError, match="cannot be read|is no monitor state"):
            mon.restore(wrong)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["state.json"]


def test_default_share_comes_from_sizes() -> None:
    manifest = {
        "model": {"d_model": 768, "d_vocab": 50257, "n_parameters": 163_049_041},
        "sae": {"d_in": 768, "d_sae": 24576},
    }
    share = sampling.default_share(manifest)
    assert share == pytest.approx(0.025 * (163_049_041 - 768 * 50257) / (768 * 24576))
    assert sampling.default_share(manifest, 2) == pytest.approx(share / 2)
    manifest["sae"]["d_sae"] = 64
    assert sampling.default_share(manifest) == 1.0


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_samples_are_random_and_of_the_right_size(share) -> None:
    rows = sampling.chosen(0, 0, 100_000, share)
    assert len(rows) == pytest.approx(100_000 * share, rel=0.05)
    other = sampling.chosen(1, 0, 100_000, share)
    both = np.intersect1d(rows, other)
    assert len(both) == pytest.approx(100_000 * share**2, rel=0.1, abs=10)
    later = sampling.chosen(0, 40, 99_960, share)
    np.testing.assert_array_equal(later + 40, rows[rows >= 40])
    # Neighbours are independent: no period that a periodic stream could hide in.
    pairs = np.intersect1d(rows, rows + 1)
    assert len(pairs) == pytest.approx(100_000 * share**2, rel=0.1, abs=10)


def test_history_stays_short_and_complete() -> None:
    history = History()
    for i in range(5000):
        one = Sums(sequences=2, tokens=24, values=(1.0, 0.0, 0.5))
        history = history.plus(one, 2 * (i + 1), float(i % 100))
        history = history.plus(Sums(), 2 * (i + 1), 1e9)
        assert len(history.spans) <= 512
    assert sum((span.tested for span in history.spans), Sums()).sequences == 10_000
    assert [span.end for span in history.spans][-1] == 10_000
    lengths = [span.tested.sequences for span in history.spans[:-1]]
    assert max(lengths) <= 2 * min(lengths)  # evenly coarse, not finer in the latest past
    assert max(span.log_e for span in history.spans) == 99


def test_the_picture_shows_what_was_seen() -> None:
    model, mon = monitor(false_alarm=0.01)
    with mon.attached(model):
        model(EVALUATION)
        mon.hooks()[0][1](torch.full((50, SEQ_LEN, 32), float("nan")), hook=None)
    figure = mon.report().figure()
    traces = figure.to_dict()["data"]
    violations, _, error, e_value = (trace["y"] for trace in traces)
    assert violations[0] == pytest.approx(certified().column("violation").mean())
    assert violations[1] == error[1] == 1
    assert e_value[-1] == pytest.approx(mon.report().log10_e)
    assert mon.alarm is not None
    shapes = figure.to_dict()["layout"]["shapes"]
    assert any(shape["x0"] == shape["x1"] == mon.alarm.tested for shape in shapes)
