"""What the monitor measures is what the certificate's evidence says, on every kind of SAE and model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.builders import BOS, SEQ_LEN, make_tokens

from monitor.world import EVALUATION, HOOKS, certified, model_of, monitor, subject
from saelens_certify.monitor import Monitor
from saelens_certify.monitor.reference import STATISTICS

KINDS = ("topk", "jumprelu", "abstopk", "gated", "matching_pursuit", "temporal", *HOOKS)


def feed(model, mon, tokens, batch=7) -> None:
    with mon.attached(model):
        for part in tokens.split(batch):
            model(part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_evaluation_sequences_give_the_evidence_back(kind, model_class) -> None:
    certificate = certified(kind, model_class)
    model, mon = monitor(kind, model_class)
    feed(model, mon, EVALUATION)
    totals = mon.report().totals
    assert totals.tested.sequences == totals.sequences == len(EVALUATION)
    assert totals.requests == 9
    assert totals.tested.violating == certificate.column("violation").sum()
    assert totals.tested.tokens == EVALUATION.numel()
    tested = totals.tested
    assert tested.l0 == pytest.approx(certificate.column("l0").mean())
    assert 1 - tested.relative_error == pytest.approx(
        certificate.explained_variance(first=False), abs=1e-6
    )
    reference = mon.report().state.test.reference
    means = [tested.mean(name) for name in STATISTICS]
    np.testing.assert_allclose(means, reference.means, atol=1e-6)


def test_some_but_not_all_sequences_violate_here() -> None:
    """Otherwise the comparison above would show little."""
    share = certified("topk").column("violation").mean()
    assert 0 < share < 1


def test_one_class_certified_another_monitored() -> None:
    certificate = certified("topk", "HookedTransformer")
    with pytest.warns(UserWarning, match="parameters are not those that were certified"):
        mon = Monitor(certificate, subject(), model=model_of("TransformerBridge"), share=1.0)
    feed(model_of("TransformerBridge"), mon, EVALUATION)
    report = mon.report()
    assert report.totals.tested.violating == certificate.column("violation").sum()
    assert "may be about the model" in str(report)


@pytest.mark.parametrize("positions", ["all", "no_bos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(positions, side) -> None:
    """Activations of padded rows are those of bare ones here: put together by hand."""
    certificate = certified("topk", positions=positions)
    model, mon = monitor(certificate=certificate)
    hook, function = mon.hooks(model)[0]
    _, cache = model.run_with_cache(EVALUATION, names_filter=hook)
    activation = cache[hook]
    pad = torch.full((len(EVALUATION), 5, activation.shape[-1]), float("nan"))
    pad_tokens, real = torch.full((len(EVALUATION), 5), 1), torch.ones_like(EVALUATION)
    parts = [(pad, pad_tokens, torch.zeros_like(pad_tokens)), (activation, EVALUATION, real)]
    padded, tokens, mask = (
        torch.cat(pair if side == "left" else pair[::-1], dim=1)
        for pair in zip(*parts, strict=True)
    )
    with mon.request(tokens, mask):
        function(padded, hook=None)
    totals = mon.report().totals
    assert totals.tested.broken == totals.without_bos == 0
    assert totals.tokens == EVALUATION.numel()
    assert totals.tested.violating == certificate.column("violation").sum()
    assert 1 - totals.tested.relative_error == pytest.approx(
        certificate.explained_variance(first=False), abs=1e-6
    )


def test_sequences_of_unknown_special_tokens_are_counted() -> None:
    """What was certified leaves special tokens out; without token ids that cannot be done."""
    certificate = certified("topk", positions="no_bos")
    model, mon = monitor(certificate=certificate)
    with mon.attached(model):
        with mon.request(EVALUATION[:3]):
            model(EVALUATION[:3])
        assert mon.report().totals.unread == 0
        assert "without their tokens" not in str(mon.report())
        model(EVALUATION[:5])
        model(EVALUATION[:2, :-1])  # too short to be tested
    assert mon.report().totals.unread == mon.report().to_dict()["unread"] == 5
    assert "5 tested sequences came without their tokens" in str(mon.report())
    model, mon = monitor()  # every position is coded, special or not
    with mon.attached(model):
        model(EVALUATION[:5])
    assert mon.report().totals.unread == 0


def test_special_tokens_are_left_out_where_ids_are_given() -> None:
    certificate = certified("topk", positions="no_bos")
    model, mon = monitor(certificate=certificate)
    tokens = EVALUATION.clone()
    tokens[:, 5] = 1  # the tokenizer's EOS
    assert 1 in certificate.manifest["identity"]["special_ids"]
    with mon.attached(model), mon.request(tokens):
        model(tokens)
    assert mon.report().totals.tested.tokens == len(tokens) * (SEQ_LEN - 2)
    with mon.attached(model):
        model(tokens)
    assert mon.report().totals.tested.tokens == len(tokens) * (2 * SEQ_LEN - 3)


def test_short_and_late_tokens_are_told_apart() -> None:
    model, mon = monitor()
    feed(model, mon, make_tokens(10, seed=5, length=SEQ_LEN + 4))
    feed(model, mon, make_tokens(10, seed=6, length=SEQ_LEN - 3))
    report = mon.report()
    assert report.totals.tested.sequences == report.totals.short.sequences == 10
    assert report.totals.late_tokens == 40
    assert report.totals.short.tokens == 10 * (SEQ_LEN - 3)
    assert report.state.test.n == 10
    assert "10 measured sequences of fewer than 12 tokens" in str(report)
    assert "40 tokens after the first 12" in str(report)


def test_late_tokens_do_not_change_what_is_tested() -> None:
    model, mon = monitor()
    longer = torch.cat([EVALUATION, make_tokens(len(EVALUATION), seed=9)], dim=1)
    feed(model, mon, longer)
    assert mon.report().totals.tested.violating == certified().column("violation").sum()


def test_sequences_without_bos_are_counted() -> None:
    model, mon = monitor()
    tokens = EVALUATION[:6].clone()
    tokens[:4, 0] = 7
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    tokens[0, 1] = BOS
    with mon.attached(model):
        with mon.request(tokens):
            model(tokens)
        with mon.request(tokens, mask):
            model(tokens)
    assert mon.report().totals.without_bos == 4 + 3


@pytest.mark.parametrize("kind", ["topk", "transcoder", "temporal"])
def test_broken_activations_are_counted_and_tested_as_the_worst(kind) -> None:
    model, mon = monitor(kind)
    hooks = mon.hooks(model)

    def break_some(activation, hook):  # noqa: ARG001
        activation = activation.clone()
        activation[1, 3] = float("inf")
        activation[2, :, 0] = float("nan")
        return activation

    fwd_hooks = [(hooks[0][0], break_some), *hooks]
    model.run_with_hooks(EVALUATION[:5], fwd_hooks=fwd_hooks)
    report = mon.report()
    assert (report.totals.tested.broken, report.totals.tested.sequences) == (2, 5)
    assert report.totals.tested.tokens == 3 * SEQ_LEN
    assert report.totals.tested.values[2] >= 2
    assert np.isfinite(list(report.to_dict().values())).all()
    assert "2 sequences with NaN or infinite activations" in str(report)


def test_a_batch_that_is_broken_throughout() -> None:
    model, mon = monitor(false_alarm=0.01)
    hook, function = mon.hooks(model)[0]
    for _ in range(20):
        function(torch.full((4, SEQ_LEN, 32), float("nan")), hook=None)
    report = mon.report()
    assert report.totals.tested.broken == report.totals.tested.sequences == 80
    assert report.totals.errors == 0
    assert report.alarm is not None


def test_outside_tokens_are_counted_by_token() -> None:
    certificate = certified()
    model, mon = monitor()
    feed(model, mon, EVALUATION)
    tested = mon.report().totals.tested
    assert tested.violating <= tested.outside_tokens <= tested.tokens
    assert tested.outside_tokens <= round(certificate.column("outside").sum() * SEQ_LEN)


def test_a_shifted_stream_raises_the_alarm() -> None:
    model, mon = monitor(false_alarm=0.01)
    feed(model, mon, make_tokens(300, seed=11), batch=20)
    assert mon.alarm is None, mon.report()
    hooks = mon.hooks(model)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def shifted(activation, hook):  # noqa: ARG001
        return activation + 10 * shift

    for part in make_tokens(300, seed=12).split(20):
        model.run_with_hooks(part, fwd_hooks=[(hooks[0][0], shifted), *hooks])
    assert mon.alarm is not None, mon.report()
    assert 300 < mon.alarm.tested < 600
    assert mon.alarm.request == (mon.alarm.tested - 1) // 20


def test_half_precision_activations_are_measured() -> None:
    model, mon = monitor()
    hook, function = mon.hooks(model)[0]
    _, cache = model.run_with_cache(EVALUATION, names_filter=hook)
    function(cache[hook].to(torch.bfloat16), hook=None)
    tested = mon.report().totals.tested
    assert tested.sequences == len(EVALUATION)
    assert abs(tested.violating - certified().column("violation").sum()) <= 6


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_share_of_sequences_is_measured_whatever_the_batch(batch) -> None:
    model, mon = monitor(share=0.3, seed=4)
    tokens = make_tokens(400, seed=3)
    feed(model, mon, tokens, batch=batch)
    report = mon.report()
    assert report.totals.sequences == 400
    # The sample depends on a sequence's number only.
    assert report.totals.tested.sequences == 121
    assert report.state.test.n == 121
