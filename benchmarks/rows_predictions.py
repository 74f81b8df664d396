"""K6 and K7: statistics of predictions, from logits and from residuals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.faces import check, compare_face
from benchmarks.inputs import HeadInputs
from benchmarks.rooflines import Work, product_16bit
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES, Shape
from saelens_certify import ops
from saelens_certify.ops import PairStats, TokenStats

ALPHA = 0.5
_HEAD_CUDA = {"G2": 1.45, "GE": 1.25, "LL": 1.2}


def prediction_rows(device: str) -> list[Row]:
    """Rows of the statistics for a device type."""
    return [row for shape in SHAPES for row in _rows_of(shape, device)]


def _rows_of(shape: Shape, device: str) -> list[Row]:
    cuda = device == "cuda"
    chain, head = (0.2 if cuda else 0.5), _HEAD_CUDA.get(shape.name) if cuda else None
    return [
        Row(
            f"K6.token.{shape.name}",
            "token_stats / (log_softmax, gather, smoothed log2, logsumexp, argmax)",
            lambda s: _token(s, shape),
            chain,
        ),
        Row(
            f"K6.pair.{shape.name}",
            "pair_stats / (two log_softmax, two gathers, KL, two argmax)",
            lambda s: _pair(s, shape),
            chain,
        ),
        Row(
            f"K6.bandwidth.{shape.name}",
            "bytes of logits per second read by token_stats / measured read bandwidth",
            lambda s: _bandwidth(s, shape),
            0.8 if cuda else None,
            "higher",
        ),
        Row(
            f"K7.head.{shape.name}",
            "head_stats / the head's matrix product alone",
            lambda s: _head(s, shape),
            head,
        ),
        Row(
            f"K7.pair.{shape.name}",
            "head_pair_stats / the head's matrix product for both residuals alone",
            lambda s: _head_pair(s, shape),
        ),
    ]


def token_chain(logits: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Statistics of ``token_stats`` as a user of torch would write them.

    Returns:
        Smoothed loss in bits, log-sum-exp, gold log-probability, argmax.
    """
    log_p = logits.log_softmax(dim=-1)
    gold = log_p.gather(1, targets[:, None])[:, 0]
    bits = -torch.log2((1 - alpha) * gold.exp() + alpha / logits.shape[1])
    gold_logit = logits.gather(1, targets[:, None])[:, 0]
    return bits, gold_logit - gold, gold, logits.argmax(dim=-1)


def pair_chain(base: Tensor, other: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Statistics of ``pair_stats`` as a user of torch would write them.

    Returns:
        Both smoothed losses and KL in bits, agreement, gap of the gold log2-probabilities.
    """
    log_p, log_q = base.log_softmax(dim=-1), other.log_softmax(dim=-1)
    gold_p, gold_q = (part.gather(1, targets[:, None])[:, 0] for part in (log_p, log_q))
    floor = alpha / base.shape[1]
    bits_p, bits_q = (-torch.log2((1 - alpha) * g.exp() + floor) for g in (gold_p, gold_q))
    nat = torch.log(torch.tensor(2.0))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1) / nat.to(base.device)
    agree = base.argmax(dim=-1) == other.argmax(dim=-1)
    return bits_p, bits_q, kl, agree, (gold_p - gold_q).abs() / nat.to(base.device)


def _token(session: Session, shape: Shape) -> Measured:
    i = HeadInputs.of(session, shape)
    targets = i.targets(i.tokens.logits)

    def stats(pair: tuple[Tensor, Tensor], **options: Any) -> TokenStats:
        return ops.token_stats(pair[0], targets, ALPHA, **options)

    def baseline(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return token_chain(pair[0], targets, ALPHA)

    check("losses", stats(i.logits[0]).bits, baseline(i.logits[0])[0], 1e-5)
    return compare_face(
        session,
        i.logits,
        stats,
        i.logits.call(baseline),
        {"torch_form": i.logits.call(lambda pair: stats(pair, impl="torch"))},
        work=[_read(i)],
        memory=True,
        extra={"tokens": i.tokens.logits, "torch_form_tokens": i.tokens.logits},
    )


def _pair(session: Session, shape: Shape) -> Measured:
    i = HeadInputs.of(session, shape)
    targets = i.targets(i.tokens.logits)

    def stats(pair: tuple[Tensor, Tensor], **options: Any) -> PairStats:
        return ops.pair_stats(*pair, targets, ALPHA, **options)

    def baseline(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return pair_chain(*pair, targets, ALPHA)

    mine, theirs = stats(i.logits[0]), baseline(i.logits[0])
    check("losses", mine.bits, theirs[1], 1e-5)
    check("divergences", mine.kl, theirs[2], 1e-3)
    return compare_face(
        session,
        i.logits,
        stats,
        i.logits.call(baseline),
        {"torch_form": i.logits.call(lambda pair: stats(pair, impl="torch"))},
        work=[_read(i), _read(i)],
        memory=True,
        extra={"tokens": i.tokens.logits, "torch_form_tokens": i.tokens.logits},
    )


def _bandwidth(session: Session, shape: Shape) -> Measured:
    i = HeadInputs.of(session, shape)
    targets = i.targets(i.tokens.logits)
    work = _read(i)
    floor = session.ceilings.floor([work])
    measured = compare_face(
        session,
        i.logits,
        lambda pair: ops.token_stats(pair[0], targets, ALPHA),
        i.logits.call(lambda pair: pair[0].amax(dim=1)),
        work=[work],
    )
    assert measured.ours_s is not None
    extra = {
        "bytes_per_s": work.n_bytes / measured.ours_s,
        "row_maxima_s": measured.baseline_s,
        "note": "baseline_s and floor_s are the bytes at the measured read bandwidth",
    }
    return Measured(
        floor / measured.ours_s, measured.ours_s, floor, floor, {**measured.extra, **extra}
    )


def _head(session: Session, shape: Shape) -> Measured:
    i = HeadInputs.of(session, shape)
    targets = i.targets(i.tokens.head)

    def stats(pair: tuple[Tensor, Tensor], **options: Any) -> TokenStats:
        return ops.head_stats(pair[0], i.head, targets, ALPHA, **options)

    expected = token_chain(_product(pair_of(i)[0], i.head), targets, ALPHA)[0]
    check("losses", stats(pair_of(i)).bits, expected, 1e-4)
    return compare_face(
        session,
        i.residuals,
        stats,
        i.residuals.call(lambda pair: _product(pair[0], i.head)),
        {"torch_form": i.residuals.call(lambda pair: stats(pair, impl="torch"))},
        work=[_multiply(i)],
        memory=True,
        extra={
            "tokens": i.tokens.head,
            "torch_form_tokens": i.tokens.head,
            "tokens_x_vocab_bytes": 4 * i.tokens.head * i.shape.vocab,
        },
    )


def _head_pair(session: Session, shape: Shape) -> Measured:
    i = HeadInputs.of(session, shape)
    targets = i.targets(i.tokens.head)

    def stats(pair: tuple[Tensor, Tensor]) -> PairStats:
        return ops.head_pair_stats(*pair, i.head, targets, ALPHA)

    def both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _product(pair[0], i.head), _product(pair[1], i.head)

    expected = pair_chain(*both(pair_of(i)), targets, ALPHA)
    found = stats(pair_of(i))
    check("losses", found.bits, expected[1], 1e-4)
    check("divergences", found.kl, expected[2], 1e-2)
    del expected
    return compare_face(
        session, i.residuals, stats, i.residuals.call(both), work=[_multiply(i), _multiply(i)]
    )


def pair_of(i: HeadInputs) -> tuple[Tensor, Tensor]:
    """The first pair of residuals."""
    return i.residuals[0]


def _product(residual: Tensor, head: Tensor) -> Tensor:
    """Logits in float32."""
    if residual.dtype == torch.float32:
        return torch.mm(residual, head)
    return product_16bit(residual, head)


def _read(i: HeadInputs) -> Work:
    return Work(n_bytes=4.0 * i.tokens.logits * i.shape.vocab)


def _multiply(i: HeadInputs) -> Work:
    n, d, vocab = i.tokens.head, i.shape.d, i.shape.vocab
    wide = i.dtype == torch.float32
    return Work(
        2.0 * n * d * vocab, i.dtype.itemsize * (n * d + d * vocab), "fp32" if wide else "16bit"
    )
