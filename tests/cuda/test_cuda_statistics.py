"""Statistics of predictions: emulated (or real) CUDA against float64 and the CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import ops_oracle as oracle

CPU = torch.ops.saelens_certify
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = 1 / np.log(2)


def capped(row: torch.Tensor, softcap: float) -> np.ndarray:
    numbers = row.double().numpy()
    return softcap * np.tanh(numbers / softcap) if softcap else numbers


def check_token(stats, logits, targets, alpha, softcap, size, tolerance=1e-5):
    bits, lse, logprob, argmax = (part.cpu() for part in stats)
    assert (bits.dtype, argmax.dtype) == (torch.float64, torch.int32)
    for t, gold in enumerate(targets.tolist()):
        q, total = oracle.log_softmax(capped(logits[t, :size], softcap))
        assert abs(float(bits[t]) - oracle.bits(q[gold], alpha, size)) <= tolerance
        assert abs(float(lse[t]) - total) <= tolerance / 2 + 1e-7 * abs(total)
        assert int(argmax[t]) == int(logits[t, :size].float().argmax())
        if np.isfinite(q[gold]):
            assert abs(float(logprob[t]) - q[gold]) <= tolerance / 2 + 1e-7 * abs(q[gold])
        else:
            assert float(logprob[t]) == q[gold]


def check_pair(stats, base, other, targets, alpha, softcap, size):
    bits_base, bits, divergence, agree, gap = (part.cpu() for part in stats)
    for t, gold in enumerate(targets.tolist()):
        p, _ = oracle.log_softmax(capped(base[t, :size], softcap))
        q, _ = oracle.log_softmax(capped(other[t, :size], softcap))
        assert abs(float(bits_base[t]) - oracle.bits(p[gold], alpha, size)) <= 1e-5
        assert abs(float(bits[t]) - oracle.bits(q[gold], alpha, size)) <= 1e-5
        tops = [row[t, :size].float().argmax() for row in (base, other)]
        assert bool(agree[t]) == bool(tops[0] == tops[1])
        with np.errstate(invalid="ignore", over="ignore"):
            terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))
        if ((q == -np.inf) & (p > -np.inf)).any():
            assert np.isinf(float(divergence[t]))
        else:
            wanted = max(terms.sum() * BITS, 0.0)
            assert abs(float(divergence[t]) - wanted) <= 1e-6 + 1e-5 * wanted
            assert float(divergence[t]) >= 0
        if np.isfinite(p[gold]) and np.isfinite(q[gold]):
            wanted = abs(p[gold] - q[gold]) * BITS
            assert abs(float(gap[t]) - wanted) <= 1e-5 + 1e-6 * wanted


def close(got, wanted, tolerance=2e-5):
    """Two operators agree, each within its tolerance of float64: same infinities, same integers."""
    for a, b in zip(got, wanted, strict=True):
        a = a.cpu()
        assert a.dtype == b.dtype
        if a.dtype != torch.float64:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=tolerance, equal_nan=True)


def check(backend, base, other, targets, alpha, softcap, size):
    there = backend.to(base, other, targets)
    stats = backend.ops.token_stats(there[1], there[2], alpha, softcap, size)
    check_token(stats, other, targets, alpha, softcap, size)
    close(stats, CPU.token_stats(other, targets, alpha, softcap, size))
    pair = backend.ops.pair_stats(*there, alpha, softcap, size)
    check_pair(pair, base, other, targets, alpha, softcap, size)
    close(pair, CPU.pair_stats(base, other, targets, alpha, softcap, size))


# 4095 to 4097 and 9000: one segment of columns, a little less or more, and several.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 17, 512, 4095, 4096, 4097, 9000])
def test_statistics_match_float64(backend, dtype, size):
    g = torch.Generator().manual_seed(size)
    base = (3 * torch.randn(5, size + 7, generator=g)).to(dtype)
    base[1] *= 6
    base[2] += 90
    base[3] = 0
    other = (base + torch.randn(5, size + 7, generator=g).to(dtype)).to(dtype)
    targets = torch.randint(0, size, (5,), generator=g)
    other[:, -7:] = float("nan")  # padding must not be read
    base[:, -7:] = float("inf")
    for alpha, softcap in ((0.0, 0.0), (0.1, 30.0)):
        check(backend, base, other, targets, alpha, softcap, size)


def test_a_whole_vocabulary(backend):
    g = torch.Generator().manual_seed(1)
    base, other = 3 * torch.randn(2, 2, 50257, generator=g)
    check(backend, base, other, torch.tensor([50256, 0]), 0.1, 0.0, 50257)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    shift=st.sampled_from([0.0, 100.0, -3000.0]),
    masked=st.sampled_from([0.0, 0.3, 0.95]),
    softcap=st.sampled_from([0.0, 0.5, 30.0, 1e4]),
)
def test_masks_ties_caps_and_extreme_logits(backend, seed, size, spread, shift, masked, softcap):
    g = torch.Generator().manual_seed(seed)
    base = (spread * torch.randn(4, size, generator=g)).round() + shift
    other = base + 0.5 * torch.randn(4, size, generator=g)
    mask = torch.rand(4, size, generator=g) < masked
    mask[:, seed % size] = False
    base[mask] = -torch.inf
    other[:2][mask[:2]] = -torch.inf
    check(backend, base, other, torch.full((4,), seed % size), 0.1, softcap, size)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_whole_segments_of_masked_tokens(backend, softcap):
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 3, 13000, generator=g)
    base[:, :4096], other[:, :9000] = -torch.inf, -torch.inf
    targets = torch.full((3,), 12000)
    check(backend, base, other, targets, 0.1, softcap, 13000)
    check(backend, other, base, targets, 0.1, softcap, 13000)


@pytest.mark.parametrize("slope", [1e-3, 1.0])
def test_ascending_and_descending_rows(backend, slope):
    # The largest logit so far changes as often as it can, and never.
    ramp = slope * torch.arange(9000.0)
    base = torch.stack([ramp, ramp.flip(0), ramp % 7])
    check(backend, base, base.roll(1, 0), torch.tensor([8999, 3, 4000]), 0.1, 0.0, 9000)
    check(backend, base, base.flip(1), torch.tensor([8999, 3, 4000]), 0.1, 40.0, 9000)


def test_ties_go_to_the_lowest_token_and_equal_rows_agree(backend):
    logits = torch.zeros(4, 9000)
    logits[0, [4095, 4096, 8000]] = 3.0
    logits[1, [8999, 17]] = 1.0
    logits[3] = -0.0
    logits[3, 4096:] = 0.0  # not larger than -0.0
    there, targets = backend.to(logits, torch.zeros(4).long())
    stats = backend.ops.token_stats(there, targets, 0.1, 0.0, 9000)
    assert stats[3].tolist() == [4095, 17, 0, 0]
    pair = backend.ops.pair_stats(there, there, targets, 0.1, 0.0, 9000)
    assert float(pair[2].abs().max()) < 1e-7
    assert bool(pair[3].all())
    assert not bool(pair[4].any())


def test_results_do_not_depend_on_batch_alignment_or_order(backend, monkeypatch):
    # Rows of 4099 numbers start at every alignment; each must give the bits it gives alone.
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 9, 4099, generator=g)
    targets = torch.randint(0, 4099, (9,), generator=g)
    for dtype in DTYPES:
        p, q, gold = backend.to(base.to(dtype), other.to(dtype), targets)
        whole = backend.ops.pair_stats(p, q, gold, 0.1, 0.0, 4099)
        for row in range(9):
            monkeypatch.setenv("SAELENS_CERTIFY_SHIM_SEED", str(row))
            rows = slice(row, row + 1)
            parts = (p[rows].clone(), q[rows].clone(), gold[rows].clone())
            alone = backend.ops.pair_stats(*parts, 0.1, 0.0, 4099)
            assert [float(part[row]) for part in whole] == [float(part[0]) for part in alone]


def test_bad_predictions_give_nan(backend):
    logits, targets = torch.randn(4, 5000), torch.zeros(4).long()
    fine = torch.tensor([False, False, True, False])
    for column in (0, 4999):
        for bad in (float("nan"), float("inf")):
            broken = logits.clone()
            broken[2, column] = bad
            there = backend.to(broken, logits, targets)
            stats = backend.ops.token_stats(there[0], there[2], 0.1, 0.0, 5000)
            assert torch.equal(stats[0].isnan().cpu(), fine)
            assert torch.equal(stats[1].isnan().cpu(), fine)
            pair = backend.ops.pair_stats(*there, 0.1, 0.0, 5000)
            assert torch.equal(pair[0].isnan().cpu(), fine)
            assert not bool(pair[1].isnan().any())
            capped_stats = backend.ops.token_stats(there[0], there[2], 0.1, 30.0, 5000)
            close(capped_stats, CPU.token_stats(broken, targets, 0.1, 30.0, 5000))
    logits[2] = -torch.inf
    there = backend.to(logits, targets)
    assert torch.equal(backend.ops.token_stats(*there, 0.1, 0.0, 5000)[1].isnan().cpu(), fine)
    # The Python faces refuse such targets; the kernel itself must not read there.
    for outside in (-1, 5000, 1 << 40):
        there = backend.to(torch.zeros(1, 5000), torch.tensor([outside]))
        assert bool(backend.ops.token_stats(*there, 0.1, 0.0, 5000)[0].isnan().all())


def test_no_tokens(backend):
    there = backend.to(torch.zeros(0, 50), torch.zeros(0).long(), torch.zeros(50, 30))
    assert [part.shape for part in backend.ops.token_stats(*there[:2], 0.1, 0.0, 50)] == [(0,)] * 4
    pair = backend.ops.pair_stats(there[0], there[0], there[1], 0.1, 2.0, 50)
    assert [part.shape for part in pair] == [(0,)] * 5
    head = backend.ops.head_stats(there[0], there[2], None, there[1], 0.1, 0.0, 30, 0)
    assert [part.shape for part in head] == [(0,)] * 4


# --- heads --------------------------------------------------------------------------------------


def random_head(seed, tokens, d_model, size, dtype, tied):
    """Residuals, weights of either stride and a bias; padded columns that must not be read."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, d_model, generator=g).to(dtype)
    other = (base + 0.3 * torch.randn(tokens, d_model, generator=g)).to(dtype)
    weight = (torch.randn(d_model, size + 5, generator=g) * 3 / d_model**0.5).to(dtype)
    weight[:, size:] = float("nan")
    if tied:
        weight = weight.T.contiguous().T
    bias = torch.randn(size + 5, generator=g)
    return base, other, weight, bias, torch.randint(0, size, (tokens,), generator=g)


def logits_of(residual, weight, bias):
    logits = residual.double() @ weight.double()
    return logits if bias is None else logits + bias.double()


def check_head(backend, head, bias, alpha, softcap, size, tile):
    base, other, weight, _, targets = head
    there = backend.to(base, other, weight, bias, targets)
    stats = backend.ops.head_stats(*there[1:], alpha, softcap, size, tile)
    wanted = logits_of(other, weight, bias)
    # Sums in float32 of other orders may swap the two largest logits where these are that close.
    top = wanted[:, :size].topk(min(2, size)).values
    sure = (top[:, 0] - top[:, -1] > 1e-4) | (size == 1)
    assert bool(sure.all())
    check_token(stats, wanted, targets, alpha, softcap, size, 1e-4)
    close(stats, CPU.head_stats(other, weight, bias, targets, alpha, softcap, size, tile), 1e-4)
    pair = backend.ops.head_pair_stats(*there, alpha, softcap, size, tile)
    assert torch.equal(pair[1].cpu(), stats[0].cpu())
    close(
        pair,
        CPU.head_pair_stats(base, other, weight, bias, targets, alpha, softcap, size, tile),
        1e-4,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "tile"), [(1, 0), (301, 64), (4133, 0), (9000, 5000)])
def test_heads_match_float64(backend, dtype, tied, size, tile):
    head = random_head(size, 4, 24, size, dtype, tied)
    check_head(backend, head, head[3], 0.1, 0.0, size, tile)
    check_head(backend, head, None, 0.0, 15.0, size, tile)


def test_a_head_of_many_rows(backend):
    # More than one chunk of 1024 rows.
    head = random_head(3, 1030, 8, 5, torch.float32, False)
    check_head(backend, head, head[3], 0.1, 0.0, 5, 3)


@pytest.mark.parametrize(("tokens", "size", "tile"), [(9, 9000, 5000), (1030, 50, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_predictions_against_one_base(backend, tokens, size, tile, dtype):
    base, other, weight, bias, targets = random_head(5, tokens, 8, size, dtype, True)
    others = [other, base, other.flip(0)]
    rest = (weight, bias, targets, 0.1, 15.0, size, tile)
    there = [part if isinstance(part, (int, float)) else backend.to(part)[0] for part in rest]
    p, several, none = backend.to(base, torch.cat(others), other[:0])
    together = backend.ops.head_pair_stats(p, several, *there)
    close(together, CPU.head_pair_stats(base, torch.cat(others), *rest), 1e-4)
    for v, each in enumerate(others):
        alone = backend.ops.head_pair_stats(p, *backend.to(each), *there)
        for column, wanted in zip(together, alone, strict=True):
            assert torch.equal(column[v * tokens : (v + 1) * tokens], wanted)
    assert [part.shape for part in backend.ops.head_pair_stats(p, none, *there)] == [(0,)] * 5


def test_more_than_2_to_the_31_logits(backend):
    # Only the columns of the vocabulary are ever touched: the rest takes no memory.
    logits = torch.empty(9, 1 << 28, dtype=torch.bfloat16, device=backend.device)
    few = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[:, :40] = few.to(backend.device)
    targets = torch.arange(9)
    stats = backend.ops.token_stats(logits, *backend.to(targets), 0.1, 0.0, 40)
    check_token(stats, few, targets, 0.1, 0.0, 40)


def test_head_tiles_change_nothing(backend):
    # Integers: every product and sum is exact, so that only the sums of exponentials could differ.
    g = torch.Generator().manual_seed(2)
    residual = torch.randint(-3, 4, (3, 6), generator=g).float()
    weight = torch.randint(-2, 3, (6, 8192), generator=g).float()
    targets = torch.tensor([0, 4096, 8191])
    there = backend.to(residual, weight, targets)
    logits = there[0] @ there[1]
    wanted = backend.ops.token_stats(logits, there[2], 0.1, 0.0, 8192)
    for tile in (0, 4096, 8192, 100000):
        stats = backend.ops.head_stats(*there[:2], None, there[2], 0.1, 0.0, 8192, tile)
        assert all(torch.equal(a, b) for a, b in zip(stats, wanted, strict=True))
    stats = backend.ops.head_stats(*there[:2], None, there[2], 0.1, 0.0, 8192, 1000)
    close(stats, [part.cpu() for part in wanted], 1e-6)


def test_arguments_are_checked(backend):
    logits, targets, W, b = backend.to(
        torch.zeros(3, 8), torch.zeros(3).long(), torch.zeros(8, 20), torch.zeros(20)
    )
    for arguments, message in (
        ((logits, targets, 1.0, 0.0, 8), "alpha = 1"),
        ((logits, targets, 0.1, -1.0, 8), "softcap = -1"),
        ((logits, targets, 0.1, 0.0, 9), "d_vocab = 9"),
        ((logits, targets, 0.1, 0.0, 0), "d_vocab = 0"),
        ((logits, targets.int(), 0.1, 0.0, 8), "targets has type"),
        ((logits, targets[:2].clone(), 0.1, 0.0, 8), "targets has size"),
        ((logits[:, :5], targets, 0.1, 0.0, 5), "logits must be contiguous"),
        ((logits.double(), targets, 0.1, 0.0, 8), "logits has type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.ops.token_stats(*arguments)
    with pytest.raises(RuntimeError, match="differ in type"):
        backend.ops.pair_stats(logits, logits.half(), targets, 0.1, 0.0, 8)
    for arguments, message in (
        ((logits, W.half(), b, targets), "weight has type"),
        ((logits, W[:5], b, targets), "weight has size"),
        ((logits, W, b[:7].clone(), targets), "bias has size"),
        ((logits, W, b.half(), targets), "bias has type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.ops.head_stats(*arguments, 0.1, 0.0, 20, 0)
    for rows in (0, 3):
        base, other = backend.to(torch.zeros(rows, 8), torch.zeros(4, 8))
        with pytest.raises(RuntimeError, match=f"4 rows, expected a multiple of the {rows}"):
            backend.ops.head_pair_stats(base, other, W, b, targets[:rows], 0.1, 0.0, 20, 0)
    with pytest.raises(RuntimeError, match="column_tile = -1"):
        backend.ops.head_stats(logits, W, b, targets, 0.1, 0.0, 20, -1)


@pytest.mark.parametrize("softcap", [-1.0, 1e-31, 1e31, float("inf"), float("nan")])
def test_both_devices_refuse_the_same_caps(backend, softcap):
    inputs = (torch.zeros(3, 8), torch.zeros(3).long())
    for ops, there in ((backend.ops, backend.to(*inputs)), (CPU, inputs)):
        with pytest.raises(RuntimeError, match="softcap = .* must lie between 1e-30 and 1e30"):
            ops.token_stats(*there, 0.1, softcap, 8)


@pytest.mark.parametrize("name", ["token_stats", "pair_stats", "head_stats", "head_pair_stats"])
def test_registration(backend, name):
    logits, targets, W, b = backend.to(
        torch.randn(3, 8), torch.zeros(3).long(), torch.randn(8, 20), torch.zeros(20)
    )
    arguments = {
        "token_stats": (logits, targets, 0.1, 0.0, 8),
        "pair_stats": (logits, logits + 1, targets, 0.1, 30.0, 8),
        "head_stats": (logits, W, b, targets, 0.1, 0.0, 20, 0),
        "head_pair_stats": (logits, logits + 1, W, None, targets, 0.1, 0.0, 20, 7),
    }[name]
    torch.library.opcheck(getattr(backend.ops, name).default, arguments)
