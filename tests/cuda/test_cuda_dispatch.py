"""What the operators ask of torch's dispatcher: on a GPU each call costs as much as a small tile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from saelens_certify.ops.margin import gemm_error, rounded_up, weight_norms


def calls(run: Callable[[], object]) -> Counter[str]:
    """How often each of torch's operators is called."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return Counter({event.key: event.count for event in recorded.key_averages()})


@pytest.mark.parametrize("screen", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoders_make_no_views_for_every_tile(backend, screen, dtype):
    tokens, d_in, d_sae = 64, 8, 256
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(tokens, d_in, generator=g), torch.randn(d_sae, generator=g)
    W = torch.randn(d_sae, d_in, generator=g).to(dtype)
    rounded = error = None
    if screen is not None:
        rounded = W.to(screen)
        error = rounded_up((W.double() - rounded.double()).square().sum(1).sqrt())
    inputs = backend.to(x, W, bias, None, None, None, weight_norms(W), rounded, error, None)
    bound = gemm_error(d_in, backend.device, screen or torch.float32)
    made = calls(lambda: backend.ops.topk_encode(*inputs, 4, bound, 4, 4))
    chunks, tiles = tokens // 4, d_sae // 4
    assert made["aten::mm"] == chunks * tiles
    views = made["aten::narrow"] + made["aten::view"] + made["aten::transpose"]
    assert views <= 2 * tiles + 8 * chunks


def test_heads_make_no_views_for_every_tile_and_multiply_the_base_once(backend):
    tokens, variants, d_model, d_vocab = 2050, 3, 4, 64
    g = torch.Generator().manual_seed(0)
    base = torch.randn(tokens, d_model, generator=g)
    others = torch.randn(variants * tokens, d_model, generator=g)
    W, targets = torch.randn(d_model, d_vocab, generator=g), torch.arange(tokens) % d_vocab
    inputs = backend.to(base, others, W, None, targets)
    made = calls(lambda: backend.ops.head_pair_stats(*inputs, 0.1, 0.0, d_vocab, 2))
    chunks, tiles = 3, d_vocab // 2
    assert made["aten::mm"] == (1 + variants) * chunks * tiles
    assert made["aten::narrow"] + made["aten::view"] <= tiles + (10 + variants) * chunks
