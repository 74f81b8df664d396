from __future__ import annotations

import os
import subprocess
import sys

import ops_oracle as oracle
import pytest
import torch

from saelens_certify import ops
from saelens_certify.errors import CertifyError
from saelens_certify.ops._library import library, use_native
from saelens_certify.ops.margin import gemm_error, weight_norms

NATIVE = oracle.IMPLS[:-1]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def samples():
    """One or more argument lists for every compiled operator."""
    x, W, bias, scale, theta, pool = oracle.random_encoder(1, 6, 40, 100)
    bits = ops.pool_bits(pool)
    error = gemm_error(40, torch.device("cpu"))
    codes = ops.threshold_encode(x, W, bias, impl="torch")
    parts = (codes.values, codes.indices, codes.counts)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    norms = weight_norms(W)
    screen = ops.prepare_screen(W, "bfloat16")
    screened = (screen.norms, screen.weight, screen.error)
    error16 = gemm_error(40, torch.device("cpu"), torch.bfloat16)
    orders = torch.rand(3, 100, generator=torch.Generator().manual_seed(0)).argsort(1).int()
    return {
        "topk_encode": [
            (x, W, bias, scale, theta, bias, *screened, bits, 7, error16, 0, 0),
            (x, W.bfloat16(), bias, None, None, None, norms, None, None, None, 100, error, 4, 33),
        ],
        "threshold_encode": [
            (x, W, bias, scale, theta, bias, *screened, 20, error16, 0, 0),
            (x, W.half(), bias, None, None, None, norms, None, None, 1, error, 4, 33),
        ],
        "restrict": [(codes.values, codes.indices, bits)],
        "pool_count_": [(torch.zeros(100, dtype=torch.int64), codes.indices)],
        "count_outside": [(codes.indices, bits)],
        "decode": [(*parts, W, None), (*parts, W.bfloat16(), torch.randn(40))],
        "decode_stats": [(*parts, W, None, x)],
        "decode_permuted": [(*parts, W, None, orders), (*parts, W.half(), torch.randn(40), orders)],
        "decode_permuted_stats": [(*parts, W, None, orders, x)],
        "token_stats": [
            (logits, targets, 0.1, 0.0, 47),
            (logits.bfloat16(), targets, 0.1, 3.0, 50),
        ],
        "pair_stats": [
            (logits, logits + 1, targets, 0.1, 0.0, 50),
            (logits.half(), logits.half(), targets, 0.1, 3.0, 47),
        ],
        "head_stats": [
            (x, W.t(), None, targets, 0.1, 0.0, 99, 0),
            (x.bfloat16(), W.bfloat16().t(), bias, targets, 0.1, 3.0, 100, 33),
        ],
        "head_pair_stats": [(x, torch.cat([x, x + 1]), W.t(), bias, targets, 0.1, 3.0, 99, 7)],
    }


@pytest.mark.parametrize("impl", NATIVE)
def test_opcheck(impl):
    assert impl == "native"
    for name, calls in samples().items():
        operator = getattr(torch.ops.saelens_certify, name).default
        for arguments in calls:
            torch.library.opcheck(operator, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("impl", NATIVE)
def test_compiled_operators_check_their_arguments(impl):
    assert impl == "native"
    operators = torch.ops.saelens_certify
    calls = {name: list(calls[0]) for name, calls in samples().items()}

    def fails(name: str, position: int, value: object, message: str) -> None:
        arguments = list(calls[name])
        arguments[position] = value
        with pytest.raises(RuntimeError, match=message):
            getattr(operators, name)(*arguments)

    fails("topk_encode", 0, torch.zeros(6, 39), "weight has size 40 in dimension 1, expected 39")
    fails("topk_encode", 0, torch.zeros(40, 6).t(), "x must be contiguous")
    fails("topk_encode", 1, torch.zeros(100, 40, dtype=torch.int64), "weight has type Long")
    fails("topk_encode", 7, None, "screen_weight and screen_error must be given together")
    fails("topk_encode", 7, torch.zeros(100, 40).half(), "screen_weight has type Half")
    fails("topk_encode", 10, 0, "k = 0 must lie between 1 and 100")
    fails("topk_encode", 9, torch.zeros(3, dtype=torch.int32), "pool_bits has size 3")
    fails("threshold_encode", 9, -1, "capacity = -1")
    fails("decode", 1, calls["decode"][1] + 1000, "indices hold")
    fails("decode", 2, calls["decode"][2] + 1000, "counts hold")
    fails("count_outside", 1, torch.zeros(1, dtype=torch.int32), "indices span")
    fails("token_stats", 1, torch.full((6,), 47), "target 47 of row 0")
    fails("decode_permuted", 5, torch.zeros(2, 99, dtype=torch.int32), "permutations has size 99")
    fails("decode_permuted", 5, calls["decode_permuted"][5] + 1, "permutations span 1 to 100")
    fails("decode_permuted_stats", 6, torch.zeros(6, 41), "target has size 41")
    fails("token_stats", 2, 1.5, "alpha = 1.5")
    fails("token_stats", 3, -1.0, "softcap = -1")
    fails("head_stats", 1, torch.zeros(41, 100), "weight has size 41 in dimension 0")
    fails("head_stats", 1, torch.zeros(40, 100).half(), "weight has type Half")
    fails("head_stats", 2, torch.zeros(99), "bias has size 99")
    fails("head_stats", 7, -1, "column_tile = -1")
    fails("head_pair_stats", 1, torch.zeros(6, 40).half(), "residual differs in type")
    fails("head_pair_stats", 1, torch.zeros(5, 40), "residual has 5 rows, expected")
    fails("pair_stats", 1, torch.zeros(6, 50).half(), "logits differ in type")


def test_missing_library_is_said_plainly(monkeypatch):
    with pytest.raises(CertifyError, match="no compiled operators for meta"):
        use_native("native", torch.device("meta"))
    assert not use_native("auto", torch.device("meta"))
    library.cache_clear()
    monkeypatch.setattr("saelens_certify.ops._library.EXTENSION_SUFFIXES", [])
    try:
        with pytest.raises(CertifyError, match="'native' is not possible: this installation has"):
            use_native("native", torch.device("cpu"))
        assert not use_native("auto", torch.device("cpu"))
    finally:
        library.cache_clear()


_ISA = """
import torch
import saelens_certify
from saelens_certify import ops
info = saelens_certify.build_info()
print(info["native"], info["reason"], info["compiled"]["isa_active"])
codes = ops.SparseCodes(torch.ones(1, 1), torch.zeros(1, 1).int(), torch.ones(1).int())
ops.decode(codes, torch.ones(1, 1), impl="torch")
for impl in ("auto", "native"):
    try:
        ops.decode(codes, torch.ones(1, 1), impl=impl)
    except saelens_certify.CertifyError as error:
        print(error)
try:
    torch.ops.saelens_certify.decode(codes.values, codes.indices, codes.counts, torch.ones(1, 1), None)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize("name", ["AVX2", "sclar", "scalar", ""])
def test_a_misspelt_instruction_set_is_an_error(impl, name):
    assert impl == "native"
    run = subprocess.run(
        [sys.executable, "-c", _ISA],
        env={**os.environ, "SAELENS_CERTIFY_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    if name in ("scalar", ""):
        assert run.stdout.startswith("True ")
        assert run.stdout.count("\n") == 1
        assert run.stdout.endswith(" scalar\n") or not name
        return
    told = (
        f"SAELENS_CERTIFY_ISA={name} is unknown: choose scalar, avx2 or avx512, or leave it unset"
    )
    info, *errors = run.stdout.splitlines()
    assert info == f"False {told} none"
    assert errors[:2] == [told, told]
    assert told in errors[2]


_MEMORY = """
import resource, sys, threading, time, torch
from saelens_certify import ops

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def growth(step):
    peak, done = [resident()], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)
    start = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    step()
    done.set()
    thread.join()
    return peak[0] - start

impl, tokens = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
d_in, d_sae, d_vocab = 64, 32768, 50257
g = torch.Generator().manual_seed(0)
x = torch.randn(tokens, d_in, generator=g)
W, bias = torch.randn(d_sae, d_in, generator=g) / 8, torch.full((d_sae,), -2.0)
bits = ops.pool_bits(torch.rand(d_sae, generator=g) < 0.5)
screen = ops.prepare_screen(W)
shared = {"screen": screen, "impl": impl}
ops.topk_encode(x[:2], W, bias, k=32, **shared)  # loads what is loaded once
print(growth(lambda: ops.topk_encode(x, W, bias, k=32, pool_bits=bits, **shared)))
print(growth(lambda: ops.threshold_encode(x, W, bias - 1.5, **shared)))
rows = min(256, tokens)
logits = torch.zeros(rows, d_vocab)
ops.token_stats(logits[:2], torch.zeros(2).long(), 0.1, impl=impl)
def read():
    for _ in range(tokens // rows // 8):
        ops.pair_stats(logits, logits, torch.zeros(rows).long(), 0.1, impl=impl)
print(growth(read))
"""


@pytest.mark.parametrize(
    ("impl", "tokens"), [(i, 8192 if i == "native" else 1024) for i in oracle.IMPLS]
)
def test_no_tokens_by_features_tensor_is_formed(impl, tokens):
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, impl, str(tokens)],
        capture_output=True,
        text=True,
        check=True,
    )
    topk, threshold, pair = (float(line) for line in run.stdout.split())
    if impl == "native":
        dense = tokens * 32768 * 4 / 2**20
        assert max(topk, threshold) < dense / 8
        # The logits are read where they lie.
        assert pair < 8
    else:
        # The plain torch form works in chunks of 256 rows by 4096 features (4 MiB in float32).
        assert max(topk, threshold) < 400
        assert pair < 500
