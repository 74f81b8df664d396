"""What `make cuda-check` reads from the compiler's output."""

from __future__ import annotations

import cuda_check

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN15saelens_certify12_GLOBAL__N_16decodeIfEEvPKfl' for 'sm_80'
ptxas info    : Function properties for _ZN15saelens_certify12_GLOBAL__N_16decodeIfEEvPKfl
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 388 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN15saelens_certify12_GLOBAL__N_14wideEv' for 'sm_90'
ptxas info    : Function properties for _ZN15saelens_certify12_GLOBAL__N_14wideEv
    88 bytes stack frame, 44 bytes spill stores, 84 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers
"""


def test_kernels_are_read_from_the_assembler():
    decode, wide = cuda_check.parse("x.cu", PTXAS)
    assert (decode.name, decode.target) == ("decode<float>", "sm_80")
    assert (decode.registers, decode.spilled, decode.stack, decode.shared) == (40, 0, 16, 512)
    assert cuda_check.judge(decode) == []
    assert (wide.name, wide.target, wide.registers, wide.spilled) == ("wide", "sm_90", 128, 128)
    assert cuda_check.judge(wide) == [
        "x.cu: wide on sm_90 spills 128 bytes of registers to memory",
        "x.cu: wide on sm_90 uses 128 registers, budget 64",
    ]


def test_budget_follows_from_the_occupancy(monkeypatch):
    monkeypatch.setattr(cuda_check, "BUDGETS", (("^decode", (128, 16)), ("wide", (64, 4))))
    decode, wide = cuda_check.parse("x.cu", PTXAS)
    assert (decode.budget, wide.budget) == (32, 255)


def test_warnings_that_fail_the_check():
    for line in (
        "x.cu(3): error #20014-D: calling a __host__ function from a __host__ __device__ function",
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    ):
        assert cuda_check.SUSPECT.search(line)
    assert not any(cuda_check.SUSPECT.search(line) for line in PTXAS.splitlines())
