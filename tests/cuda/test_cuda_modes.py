"""What users may allow torch to do with products changes no code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops import ops_oracle as oracle

from saelens_certify import ops
from saelens_certify.ops.margin import float32_accumulation, gemm_error, weight_norms

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def float16_sums() -> Iterator[None]:
    before = MATMUL.allow_fp16_accumulation
    MATMUL.allow_fp16_accumulation = True
    yield
    MATMUL.allow_fp16_accumulation = before


@pytest.mark.usefixtures("float16_sums")
def test_float16_products_are_added_up_in_float32():
    with float32_accumulation(torch.float16):
        assert not MATMUL.allow_fp16_accumulation
    assert MATMUL.allow_fp16_accumulation
    with pytest.raises(ValueError, match="inside"), float32_accumulation(torch.float16):
        raise ValueError("inside")
    assert MATMUL.allow_fp16_accumulation
    for dtype in (torch.bfloat16, torch.float32):
        with float32_accumulation(dtype):
            assert MATMUL.allow_fp16_accumulation
    MATMUL.allow_fp16_accumulation = False
    with float32_accumulation(torch.float16):
        assert not MATMUL.allow_fp16_accumulation
    assert not MATMUL.allow_fp16_accumulation


@pytest.mark.usefixtures("float16_sums")
def test_every_face_that_multiplies_asks_for_it(monkeypatch):
    seen: dict[str, bool] = {}

    class Recorder:
        def __getattr__(self, name: str):
            def operator(*_: object) -> tuple[torch.Tensor, ...]:
                seen[name] = bool(MATMUL.allow_fp16_accumulation)
                if "encode" in name:
                    return torch.zeros(2, 3), torch.zeros(2, 3).int(), torch.zeros(2).int()
                return tuple(torch.zeros(2) for _ in range(5 if "pair" in name else 4))

            return operator

    x, W, bias = torch.ones(2, 4), torch.ones(9, 4), torch.zeros(9)
    screen = ops.Screen(weight_norms(W), W.half(), torch.zeros(9))
    targets = torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(torch.ops, "saelens_certify", Recorder())
    ops.topk_encode(x, W, bias, k=3, screen=screen, impl="native")
    ops.threshold_encode(x, W, bias, screen=screen, impl="native")
    ops.head_stats(x.half(), W.half().t(), targets, 0.1, impl="native")
    ops.head_pair_stats(x.half(), x.half(), W.half().t(), targets, 0.1, impl="native")
    names = ("topk_encode", "threshold_encode", "head_stats", "head_pair_stats")
    assert seen == dict.fromkeys(names, False)
    assert MATMUL.allow_fp16_accumulation


@pytest.mark.usefixtures("float16_sums")
def test_codes_are_the_same_where_float16_sums_are_allowed(backend):
    x, W, bias, *_ = oracle.random_encoder(3, 20, 96, 700)
    # Sums far beyond what float16 can hold.
    x, W = x.abs(), 1e5 * W.abs()
    x_there, W_there, bias_there = backend.to(x, W, bias)
    screen = ops.prepare_screen(W_there)
    codes, _ = ops.topk_encode(x_there, W_there, bias_there, k=9, screen=screen, impl="native")
    wanted, _ = ops.topk_encode(x, W, bias, k=9, impl="torch")
    assert oracle.rows(codes.to("cpu")) == oracle.rows(wanted)
    every = ops.threshold_encode(x_there, W_there, bias_there, screen=screen, impl="native")
    assert oracle.rows(every.to("cpu")) == oracle.rows(
        ops.threshold_encode(x, W, bias, impl="torch")
    )


def test_tf32_widens_the_margin_of_a_gpu():
    cuda = torch.device("cuda")
    full, before = gemm_error(768, cuda), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert gemm_error(768, cuda) > 2.0**-10 > full
        assert gemm_error(768, cuda, torch.float16) < 2.0**-11
    finally:
        torch.set_float32_matmul_precision(before)
