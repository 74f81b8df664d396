"""The face: hooks change nothing, failures stay out, threads agree, restarts go on, mistakes are named."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from engine.builders import SEQ_LEN, make_tokens, of_class

from monitor.world import EVALUATION, certified, monitor, subject
from saelens_certify import CertifyError
from saelens_certify.saes.own import OwnEncoderAdapter


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


def test_saes_with_state_are_not_shared_with_the_user() -> None:
    """Their own encode sets attributes for a moment, and the user's threads may be using them."""
    _, mon = monitor("temporal")
    adapter, sae = mon._observer.adapter, subject("temporal")
    assert isinstance(adapter, OwnEncoderAdapter)
    assert adapter.sae is not sae
    assert adapter.sae.W_dec is sae.W_dec


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
    with mon.attached(model), pytest.raises(interrupt):
        model.run_with_hooks(EVALUATION[:4], fwd_hooks=[("blocks.1.mlp.hook_pre", die)])
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


@pytest.mark.parametrize(("kind", "at_a_time"), [("temporal", 1), ("topk", 2)])
def test_saes_with_state_encode_one_at_a_time(kind, at_a_time) -> None:
    model, mon = monitor(kind)
    adapter = mon._observer.adapter
    method = "dense" if kind == "temporal" else "encode"
    inside, most = [], []
    real, both = getattr(adapter, method), threading.Barrier(at_a_time)

    def watched(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        both.wait(timeout=10)  # at_a_time threads must meet here
        time.sleep(0.02)
        inside.pop()
        return real(*arguments, **options)

    object.__setattr__(adapter, method, watched)
    with mon.attached(model):
        threads = [threading.Thread(target=model, args=(EVALUATION[:2],)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert mon.report().totals.errors == 0
    assert max(most) == at_a_time


def test_tasks_of_one_thread_have_requests_of_their_own() -> None:
    """Each waits inside its request while the other's begins, runs and ends."""
    model, mon = monitor()

    async def serve(tokens) -> None:
        with mon.request(tokens):
            for _ in range(3):  # one request and two continuations
                await asyncio.sleep(0)
                model(tokens)

    async def both() -> None:
        await asyncio.gather(serve(EVALUATION[:2]), serve(EVALUATION[:3]))

    with mon.attached(model):
        asyncio.run(both())
        model(EVALUATION[:4])
    totals = mon.report().totals
    assert (totals.requests, totals.continuations, totals.errors) == (3, 4, 0)
    assert totals.tested.sequences == 2 + 3 + 4


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


def test_a_block_without_a_forward_is_logged(caplog) -> None:
    model, mon = monitor()
    with mon.attached(model):
        model(EVALUATION[:1])
    assert not caplog.records
    with mon.attached(model):
        pass
    assert "saw no forward" in caplog.text


def test_a_second_attachment_to_the_same_model_is_refused() -> None:
    """It would square the evidence, and the false-alarm probability would no longer hold."""
    model, mon = monitor()
    other = monitor()[1]
    with mon.attached(model), other.attached(model):
        with (
            pytest.raises(CertifyError, match="attached to this model already"),
            mon.attached(model),
        ):
            pass
        model(EVALUATION[:3])
    with mon.attached(model):  # one after the other is what restarts do
        model(EVALUATION[:3])
    assert mon.report().totals.sequences == 6
    assert other.report().totals.sequences == 3
    assert n_hooks(model) == 0


@pytest.mark.parametrize("kind", ["topk", "transcoder"])
@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_hooks_that_fire_twice_in_a_forward_count_nothing(kind, model_class) -> None:
    model, mon = monitor(kind, model_class, on_error="record")
    plain = model(EVALUATION[:4])
    with mon.attached(model):
        twice = model.run_with_hooks(EVALUATION[:4], fwd_hooks=mon.hooks(model))
        assert torch.equal(plain, twice)
        model(EVALUATION[:4])
    report = mon.report()
    assert report.totals.requests == 1
    assert report.totals.tested.sequences == 4
    assert "fires 2 times in one forward" in str(report)


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


@pytest.mark.parametrize("on_error", ["record", "raise"])
def test_a_failing_alarm_handler_is_an_error_like_others(on_error, caplog) -> None:
    mon = monitor(false_alarm=0.5, run_length=50, on_error=on_error, on_alarm=lambda _: 1 / 0)[1]
    broken = torch.full((50, SEQ_LEN, 32), float("nan"))
    if on_error == "raise":
        with pytest.raises(ZeroDivisionError):
            mon.hooks()[0][1](broken, hook=None)
    else:
        mon.hooks()[0][1](broken, hook=None)
    kinds = {alarm.kind for alarm in mon.alarms}
    assert kinds == {"left", "recent"}
    assert mon.report().totals.errors == 1
    for kind in kinds:  # each is told, also after the first failure
        assert f"what was certified ({kind})" in caplog.text
    assert str(mon.report()).startswith("ALARM after")


def test_without_a_handler_alarms_are_logged(caplog) -> None:
    mon = monitor(false_alarm=0.5, on_alarm=None)[1]
    mon.hooks()[0][1](torch.full((50, SEQ_LEN, 32), float("nan")), hook=None)
    assert mon.alarm is not None
    assert mon.report().totals.errors == 0
    assert "the stream has left what was certified" in caplog.text


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
