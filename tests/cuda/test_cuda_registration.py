"""Every CUDA operator once: what the dispatcher knows about it, and calls for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops.margin import gemm_error, rounded_up, weight_norms

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATORS = (
    "topk_encode",
    "threshold_encode",
    "restrict",
    "pool_count_",
    "count_outside",
    "decode",
    "decode_stats",
    "decode_permuted",
    "decode_permuted_stats",
    "token_stats",
    "pair_stats",
    "head_stats",
    "head_pair_stats",
)


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def samples(name: str) -> list[tuple[Any, ...]]:
    """Argument lists on the CPU: odd sizes, every kind of option at least once."""
    tokens, d_in, d_sae, d_vocab = 6, 39, 101, 75
    x, W, bias = normal(0, tokens, d_in), normal(1, d_sae, d_in), normal(2, d_sae)
    half = W.half()
    screen = (half, rounded_up((W.double() - half.double()).square().sum(1).sqrt()))
    scale, theta, gate = normal(3, d_sae).abs(), normal(4, d_sae).abs(), normal(5, d_sae)
    norms, error = weight_norms(W), gemm_error(d_in, torch.device("cpu"))
    bits = ops.pool_bits(normal(6, d_sae) > 0)
    codes = ops.threshold_encode(x, W, bias, impl="torch")
    parts = (codes.values, codes.indices, codes.counts)
    orders = normal(7, 3, d_sae).argsort(1).int()
    logits, targets = normal(8, tokens, d_vocab), torch.arange(tokens)
    head = normal(9, d_in, d_vocab)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "topk_encode": [
            (x, W, bias, scale, theta, None, norms, *screen, bits, 7, error, 0, 0),
            (x, half, bias, None, None, gate, norms, None, None, None, 101, error, 4, 33),
        ],
        "threshold_encode": [
            (x, W, bias, scale, theta, gate, norms, *screen, 20, error, 0, 0),
            (x, W.bfloat16(), bias, None, None, None, norms, None, None, 1, error, 4, 33),
        ],
        "restrict": [(codes.values, codes.indices, bits)],
        "pool_count_": [(torch.zeros(d_sae, dtype=torch.int64), codes.indices)],
        "count_outside": [(codes.indices, bits)],
        "decode": [(*parts, W, None), (*parts, W.bfloat16(), normal(10, d_in))],
        "decode_stats": [(*parts, W, None, x), (*parts, half, normal(10, d_in), x)],
        "decode_permuted": [(*parts, W, normal(10, d_in), orders), (*parts, half, None, orders)],
        "decode_permuted_stats": [(*parts, W, None, orders, x)],
        "token_stats": [
            (logits, targets, 0.1, 0.0, d_vocab - 3),
            (logits.bfloat16(), targets, 0.1, 3.0, d_vocab),
        ],
        "pair_stats": [
            (logits, logits + 1, targets, 0.1, 0.0, d_vocab),
            (logits.half(), logits.half(), targets, 0.1, 3.0, d_vocab - 3),
        ],
        "head_stats": [
            (x, head, None, targets, 0.1, 0.0, d_vocab - 3, 0),
            (x.bfloat16(), head.bfloat16().t().contiguous().t(), None, targets, 0.1, 3.0, 75, 33),
        ],
        "head_pair_stats": [
            (x, x + 1, head, normal(11, d_vocab), targets, 0.1, 3.0, d_vocab, 32),
            (x.half(), x.half(), head.half(), None, targets, 0.1, 0.0, d_vocab, 0),
        ],
    }
    return calls[name]


def on_device(backend, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(backend.device) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_runs_on_its_device(backend, name):
    for arguments in samples(name):
        result = getattr(backend.ops, name)(*on_device(backend, arguments))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        assert all(out.device == backend.device for out in outputs if out is not None)
        # An empty batch is no launch and no error.
        empty = [a[:0] if isinstance(a, Tensor) and a.shape[:1] == (6,) else a for a in arguments]
        getattr(backend.ops, name)(*on_device(backend, tuple(empty)))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend, name):
    for arguments in samples(name):
        operator = getattr(backend.ops, name).default
        torch.library.opcheck(operator, on_device(backend, arguments), test_utils=CHECKS)


def test_what_torch_says_is_passed_on(backend):
    x, W, bias = normal(0, 6, 3), normal(1, 5, 3), normal(2, 5)
    arguments = (x, W, bias, None, None, None, weight_norms(W), None, None, 1 << 46, 1e-6, 0, 0)
    said = "tried to allocate" if torch.__version__ >= (2, 13) else "torch printed the reason"
    with pytest.raises(RuntimeError, match=f"(?i)allocating a tensor failed: .*{said}"):
        backend.ops.threshold_encode(*on_device(backend, arguments))
