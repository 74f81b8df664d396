"""Token and pair statistics in plain torch, float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of one float64 temporary; about ten are alive. Elsewhere than on a CPU small calls cost more.
_CHUNK_BYTES_CPU = 1 << 22
_CHUNK_BYTES_OTHER = 1 << 25


def _row_chunk(logits: Tensor, d_vocab: int) -> int:
    on_cpu = logits.device.type == "cpu"
    return max(1, (_CHUNK_BYTES_CPU if on_cpu else _CHUNK_BYTES_OTHER) // (8 * d_vocab))


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Logits in float64, soft-capped unless the cap is 0: then -inf becomes -softcap."""
    wide = logits.double()
    return wide if softcap == 0 else softcap * torch.tanh(wide / softcap)


def _log_softmax(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exp in float64; masked (-inf) columns stay -inf."""
    wide = capped(logits, softcap)
    lse = wide.logsumexp(1)
    # A full -inf row has no distribution: its log-sum-exp is -inf, reported as NaN.
    lse = torch.where(torch.isfinite(lse), lse, torch.nan)
    return wide - lse.unsqueeze(1), lse


def first_argmax(logits: Tensor) -> Tensor:
    """Lowest column of the largest logit, int32; a softcap does not change the order."""
    # torch.argmax leaves ties open; the first column that equals the maximum does not.
    columns = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    at_top = logits == logits.amax(1, keepdim=True)
    return torch.where(at_top, columns, logits.shape[1]).amin(1)


def smoothed_bits(gold: Tensor, alpha: float, d_vocab: int) -> Tensor:
    """Smoothed loss of gold log-probabilities."""
    return -torch.log2((1 - alpha) * gold.exp() + alpha / d_vocab)


def token_stats(
    logits: Tensor, targets: Tensor, alpha: float, softcap: float, d_vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smoothed loss (bits), log-sum-exp, gold log-probability (nats), most likely token."""
    n_tokens = logits.shape[0]
    bits, lse, gold = (
        torch.empty(n_tokens, dtype=torch.float64, device=logits.device) for _ in range(3)
    )
    argmax = torch.empty(n_tokens, dtype=torch.int32, device=logits.device)
    step = _row_chunk(logits, d_vocab)
    for start in range(0, n_tokens, step):
        rows = slice(start, start + step)
        part = logits[rows, :d_vocab]
        logprobs, lse[rows] = _log_softmax(part, softcap)
        gold[rows] = logprobs.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        bits[rows] = smoothed_bits(gold[rows], alpha, d_vocab)
        argmax[rows] = first_argmax(part)
    return bits, lse, gold, argmax


def gap_bits(gold_base: Tensor, gold: Tensor) -> Tensor:
    """Absolute gap of log-probabilities."""
    # Equal infinities (a masked gold token) are no gap.
    return torch.where(gold_base == gold, 0.0, (gold_base - gold).abs()) / math.log(2)


def pair_stats(
    base_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    softcap: float,
    d_vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both losses (bits), KL(base || other) (bits), agreement, gap of gold log-probabilities."""
    n_tokens = logits.shape[0]
    bits_base, bits, kl, gap = (
        torch.empty(n_tokens, dtype=torch.float64, device=logits.device) for _ in range(4)
    )
    agree = torch.empty(n_tokens, dtype=torch.bool, device=logits.device)
    step = _row_chunk(logits, d_vocab)
    for start in range(0, n_tokens, step):
        rows = slice(start, start + step)
        base_part, part = base_logits[rows, :d_vocab], logits[rows, :d_vocab]
        (base_logprobs, _), (logprobs, _) = (
            _log_softmax(base_part, softcap),
            _log_softmax(part, softcap),
        )
        at = targets[rows].unsqueeze(1)
        gold_base = base_logprobs.gather(1, at).squeeze(1)
        gold = logprobs.gather(1, at).squeeze(1)
        bits_base[rows] = smoothed_bits(gold_base, alpha, d_vocab)
        bits[rows] = smoothed_bits(gold, alpha, d_vocab)
        terms = base_logprobs.exp() * (base_logprobs - logprobs)
        # What only the other model masks makes the divergence infinite, however small its weight.
        terms = torch.where(logprobs == -torch.inf, torch.inf, terms)
        terms = torch.where(base_logprobs == -torch.inf, 0.0, terms)
        # Rounding may put the divergence of equal predictions just below zero.
        kl[rows] = (terms.sum(1) / math.log(2)).clamp(min=0)
        agree[rows] = first_argmax(base_part) == first_argmax(part)
        gap[rows] = gap_bits(gold_base, gold)
    return bits_base, bits, kl, agree, gap
