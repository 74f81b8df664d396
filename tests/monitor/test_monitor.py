"""The face: hooks change nothing, failures stay out, threads agree, restarts go on, mistakes are named."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from engine.builders import SEQ_LEN, make_sae, make_tokens, of_class

from monitor.world import EVALUATION, certified, model_of, monitor, subject
from saelens_certify import CertifyError
from saelens_certify.monitor import Monitor, sampling
from saelens_certify.monitor.tally import History, Sums


def n_hooks(model) -> int:
    return sum(
        len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values()
    )


@pytest.mark.parametrize("kind", ["topk", "transcoder", "temporal", "hook_z"])
@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_nothing_is_changed(kind, model_class) -> None:
    model, mon = monitor(kind, model_class)
    sae = subject(kind)
    before = dict(vars(sae)), {k: v.clone() for k, v in sae.state_dict().items()}
    plain = model(EVALUATION[:8])
    with mon.attached(model):
        watched = model(EVALUATION[:8])
        assert n_hooks(model) > 0
    assert torch.equal(plain, watched)
    assert n_hooks(model) == 0
    assert vars(sae).keys() == before[0].keys()
    assert all(vars(sae)[k] is v for k, v in before[0].items())
    assert all(torch.equal(v, before[1][k]) for k, v in sae.state_dict().items())


def test_gradients_flow_as_without_a_monitor() -> None:
    model, mon = monitor()
    with mon.attached(model):
        loss = model(EVALUATION[:2], return_type="loss")
    loss.backward()
    gradient = model.blocks[0].mlp.W_in.grad.clone()
    model.zero_grad()
    model(EVALUATION[:2], return_type="loss").backward()
    assert torch.equal(gradient, model.blocks[0].mlp.W_in.grad)
    model.zero_grad()


def test_hooks_of_others_stay() -> None:
    model, mon = monitor()
    seen = []
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: seen.append(x.shape))  # noqa: ARG005
    try:
        with mon.attached(model):
            model(EVALUATION[:2])
        model(EVALUATION[:2])
        assert len(seen) == 2
    finally:
        model.reset_hooks()


@pytest.mark.parametrize("kind", ["topk", "transcoder"])
def test_a_failing_observation_stays_out_of_the_forward(kind, monkeypatch) -> None:
    model, mon = monitor(kind, on_error="record")
    plain = model(EVALUATION[:4])
    with monkeypatch.context() as patch, mon.attached(model):
        patch.setattr(type(mon._observer), "measure", lambda *_: 1 / 0)
        assert torch.equal(model(EVALUATION[:4]), plain)
        patch.setattr(type(mon._observer), "select", lambda *_: 1 / 0)
        assert torch.equal(model(EVALUATION[:4]), plain)
    with mon.attached(model):
        model(EVALUATION[:4])
    report = mon.report()
    assert report.totals.errors == 2
    assert report.totals.tested.sequences == 4
    assert "2 observations failed, the last with ZeroDivisionError" in str(report)


def test_errors_are_raised_on_request() -> None:
    model, mon = monitor(on_error="raise")
    message = r"shape \(3, 12\), the forward is of \(4, 12\)"
    with (
        mon.attached(model),
        mon.request(EVALUATION[:3]),
        pytest.raises(CertifyError, match=message),
    ):
        model(EVALUATION[:4])
    assert mon.report().totals.errors == 1
    assert n_hooks(model) == 0


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_a_forward_that_dies_between_the_hooks_leaves_no_trace(interrupt) -> None:
    model, mon = monitor("transcoder")
    (_, note), (out, compare) = mon.hooks(model)

    def die(activation, hook):  # noqa: ARG001
        raise interrupt

    with mon.attached(model):
        with pytest.raises(interrupt):
            model.run_with_hooks(EVALUATION[:4], fwd_hooks=[("blocks.1.mlp.hook_pre", die)])
        assert mon.report().totals.requests == 0
        model(EVALUATION[4:9])
    totals = mon.report().totals
    assert (totals.requests, totals.tested.sequences, totals.errors) == (1, 5, 0)
    # What was captured of the dead forward is gone after the block.
    assert "pending" not in vars(mon._local)
    with pytest.raises(CertifyError, match="did not fire before"):
        compare(torch.zeros(1, SEQ_LEN, 32), hook=None)
    assert note is not compare
    assert out.endswith("mlp_out")


def test_interrupts_pass_through(monkeypatch) -> None:
    model, mon = monitor(on_error="record")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(mon._observer), "measure", stop)
    with pytest.raises(KeyboardInterrupt), mon.attached(model):
        model(EVALUATION[:2])
    assert n_hooks(model) == 0


@pytest.mark.parametrize("kind", ["topk", "transcoder", "temporal"])
def test_threads_share_a_monitor(kind) -> None:
    model, mon = monitor(kind, share=1.0, run_length=1000)
    parts = EVALUATION.split(5)
    failures = []

    def serve(offset: int) -> None:
        try:
            for i in range(len(parts)):
                tokens = parts[(i + offset) % len(parts)]
                with torch.inference_mode(), mon.request(tokens):
                    model(tokens)
        except BaseException as error:
            failures.append(error)

    with mon.attached(model):
        threads = [threading.Thread(target=serve, args=(3 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    totals = mon.report().totals
    certificate = certified(kind)
    assert totals.errors == totals.without_bos == 0
    assert totals.requests == 4 * len(parts)
    assert totals.tested.sequences == mon.report().state.test.n == 4 * len(EVALUATION)
    assert totals.tested.violating == 4 * certificate.column("violation").sum()
    numbers = [request.number for request in mon.report().state.recent]
    assert sorted(numbers) == list(range(4 * len(parts)))
    assert totals.tested.error == pytest.approx(4 * certificate.column("mse_no_first").sum())


@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_generation_is_one_request(model_class) -> None:
    model, mon = monitor("topk", model_class)
    tokens = make_tokens(1, seed=5)
    with mon.attached(model):
        model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
        with mon.request(tokens):
            model.generate(
                tokens, max_new_tokens=4, do_sample=False, use_past_kv_cache=False, verbose=False
            )
        with mon.request(continuation=True):
            model(tokens)
    totals = mon.report().totals
    assert totals.requests == totals.tested.sequences == 2
    assert totals.continuations == 3 + 3 + 1
    assert "continuations" in str(mon.report())


def test_requests_nest() -> None:
    model, mon = monitor()
    with mon.attached(model), mon.request():
        with mon.request():
            model(EVALUATION[:2])
        model(EVALUATION[:3])
        model(EVALUATION[:5])
    assert mon.report().totals.sequences == 5
    assert mon.report().totals.continuations == 1


def test_alarm_is_announced_once(caplog) -> None:
    told = []
    model, mon = monitor(false_alarm=0.01, on_alarm=told.append)
    _, function = mon.hooks(model)[0]
    broken = torch.full((50, SEQ_LEN, 32), float("nan"))
    for _ in range(4):
        function(broken, hook=None)
    assert told == [mon.alarm]
    assert str(mon.report()).startswith("ALARM after")
    mon.reset()
    assert mon.alarm is None
    assert str(mon.report()).startswith("No alarm in 0 tested")
    function(broken, hook=None)
    function(broken, hook=None)
    assert len(told) == 2
    _, loud = monitor(false_alarm=0.01)
    for _ in range(2):
        loud.hooks()[0][1](broken, hook=None)
    assert "the stream has left what was certified" in caplog.text


def test_a_failing_alarm_handler_is_an_error_like_others() -> None:
    model, mon = monitor(false_alarm=0.5, on_error="record", on_alarm=lambda _: 1 / 0)
    for _ in range(2):
        mon.hooks()[0][1](torch.full((50, SEQ_LEN, 32), float("nan")), hook=None)
    assert mon.alarm is not None
    assert mon.report().totals.errors == 1


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


@pytest.mark.parametrize("kind", ["topk", "hook_z", "temporal"])
@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "SAETransformerBridge"])
@pytest.mark.parametrize("error_term", [True, False])
def test_an_sae_attached_there_shows_the_activation(kind, model_class, error_term) -> None:
    mon, bare = (monitor(kind, model_class.replace("SAE", ""))[1] for _ in range(2))
    # A model of its own: on a SAETransformerBridge the hook stays dead when the SAE is gone.
    model = of_class.__wrapped__(model_class)
    with bare.attached(model):
        model(EVALUATION)
    model.add_sae(subject(kind), use_error_term=error_term)
    try:
        spliced = model(EVALUATION[:3])
        with mon.attached(model):
            model(EVALUATION)
            assert torch.equal(model(EVALUATION[:3]), spliced)
        model.run_with_hooks(EVALUATION[:2], fwd_hooks=mon.hooks(model))
    finally:
        model.reset_saes()
    mine, other = mon.report().totals, bare.report().totals
    assert mine.requests == 3
    assert mon.report().state.recent[0].tested == other.tested
    assert other.tested.sequences == len(EVALUATION)


def test_an_attached_transcoder_is_refused() -> None:
    model, mon = monitor("transcoder", "HookedSAETransformer")
    model.add_sae(subject("transcoder"))
    try:
        with pytest.raises(CertifyError, match=r"call model.reset_saes\(\)"):
            mon.hooks(model)
    finally:
        model.reset_saes()


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
