"""Every CUDA operator once: what the dispatcher knows about it, and calls for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops.margin import gemm_error, rounded_up, weight_norms

CPU = torch.ops.saelens_certify
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


def larger_samples(name: str) -> list[tuple[Any, ...]]:
    """Arguments on the CPU that reach what small ones do not, and are still few launches.

    Buffers of candidates that overflow and are scored, more hits than wait at a time, features in several
    tiles, outlier dimensions, keys and rows beyond shared memory; slots beyond one tile of a decoder;
    several segments of columns.
    """
    cpu = torch.device("cpu")
    flat, ones = torch.full((1400, 8), 0.37), torch.ones(2, 8)
    wide, many = normal(20, 60, 4130), normal(21, 2600, 16)
    spiked, plain = normal(35, 20, 100), normal(36, 700, 100)
    spiked[:, [3, 40]] *= 1000
    pool = ops.pool_bits(torch.arange(1400) >= 1000)

    def encoder(x: Tensor, W: Tensor) -> tuple[Any, ...]:
        half = W.half()
        error = rounded_up((W.double() - half.double()).square().sum(1).sqrt())
        return (x, W, normal(22, len(W)), None, None, None, weight_norms(W), half, error)

    def error(W: Tensor) -> float:
        return gemm_error(W.shape[1], cpu, torch.float16)

    tied = (ones, flat, torch.zeros(1400), *encoder(ones, flat)[3:])
    values, counts = normal(23, 3, 600), torch.tensor([600, 257, 0], dtype=torch.int32)
    used = torch.arange(600) < counts.unsqueeze(1)
    indices = torch.where(used, torch.arange(600).expand(3, 600) * 7 % 90, -1).int()
    codes = (torch.where(used, values, 0.0), indices, counts)
    weight, target = normal(24, 90, 1100), normal(25, 3, 1100)
    orders = normal(26, 2, 90).argsort(1).int()
    bits = ops.pool_bits(normal(27, 90) > 0)
    logits, targets = 3 * normal(28, 3, 9000), torch.tensor([0, 4096, 8998])
    residual, head = normal(29, 3, 24), normal(30, 24, 9000)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "topk_encode": [
            (*tied, pool, 9, error(flat), 0, 0),
            (*tied, None, 9, error(flat), 1, 512),
            (*encoder(normal(31, 2, 16), many), None, 1024, error(many), 0, 1000),
            (*encoder(normal(32, 2, 4130), wide), None, 7, error(wide), 0, 0),
            (*encoder(spiked, plain), None, 15, error(plain), 0, 0),
        ],
        "threshold_encode": [
            (*tied, 600, error(flat), 0, 0),
            (*tied, 1400, error(flat), 1, 512),
            (*encoder(normal(32, 2, 4130), wide), 60, error(wide), 0, 0),
        ],
        "restrict": [(*codes[:2], bits)],
        "pool_count_": [(torch.zeros(90, dtype=torch.int64), indices)],
        "count_outside": [(indices, bits)],
        "decode": [(*codes, weight, None), (*codes, weight.half(), normal(33, 1100))],
        "decode_stats": [(*codes, weight, normal(33, 1100), target)],
        "decode_permuted": [(*codes, weight, None, orders)],
        "decode_permuted_stats": [(*codes, weight.half(), None, orders, target)],
        "token_stats": [
            (logits, targets, 0.1, 30.0, 9000),
            (logits.half(), targets, 0.1, 0.0, 8999),
        ],
        "pair_stats": [(logits, logits + 1, targets, 0.1, 0.0, 9000)],
        "head_stats": [
            (residual, head, normal(34, 9000), targets, 0.1, 0.0, 9000, 0),
            (residual, head, None, targets, 0.1, 3.0, 8999, 5000),
        ],
        "head_pair_stats": [(residual, residual + 1, head, None, targets, 0.1, 0.0, 9000, 0)],
    }
    return calls[name]


# Also what compute-sanitizer watches (benchmarks/gpu_check.sh).
@pytest.mark.parametrize("name", OPERATORS)
def test_larger_shapes_give_what_the_cpu_gives(backend, name):
    for arguments in larger_samples(name):
        on_cpu = list(arguments)
        if name.endswith("_encode"):
            # Float32 products there: the codes are the same for every screen.
            on_cpu[7:9] = None, None
            on_cpu[-3] = gemm_error(arguments[1].shape[1], torch.device("cpu"))
        there = on_device(backend, arguments)
        got, wanted = getattr(backend.ops, name)(*there), getattr(CPU, name)(*on_cpu)
        if name == "pool_count_":
            got, wanted = there[0], on_cpu[0]
        if isinstance(got, Tensor):
            got, wanted = [got], [wanted]
        for a, b in zip(got, wanted, strict=True):
            if name.endswith("_stats") and "decode" not in name:
                torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5)
            else:
                assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend, name):
    for arguments in samples(name):
        operator = getattr(backend.ops, name).default
        torch.library.opcheck(operator, on_device(backend, arguments), test_utils=CHECKS)


def test_what_torch_says_is_passed_on(backend):
    x, W, bias = normal(0, 6, 3), normal(1, 5, 3), normal(2, 5)
    arguments = (x, W, bias, None, None, None, weight_norms(W), None, None, 1 << 61, 1e-6, 0, 0)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    said = "size calculation overflowed" if version >= (2, 13) else "torch printed the reason"
    with pytest.raises(RuntimeError, match=f"allocating a tensor failed: .*{said}"):
        backend.ops.threshold_encode(*on_device(backend, arguments))
