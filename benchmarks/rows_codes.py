"""K3, K4 and K5: pools, gather decoding, many permutations at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.faces import check, compare_face, few
from benchmarks.inputs import SaeInputs, generator
from benchmarks.memory import footprint
from benchmarks.rooflines import Work, product_16bit
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES, Shape
from saelens_certify import ops
from saelens_certify.ops import SparseCodes

PERMUTATIONS = 10
_EXTRA_BYTES = 64 << 20
_DENSE_CUDA = {"G2": 0.35, "GE": 1.2, "LL": 0.25}


def code_rows(device: str) -> list[Row]:
    """Rows of pools and decoders for a device type."""
    return [row for shape in SHAPES for row in _rows_of(shape, device)]


def _rows_of(shape: Shape, device: str) -> list[Row]:
    cuda = device == "cuda"
    dense = _DENSE_CUDA.get(shape.name) if cuda else 0.05
    return [
        Row(
            f"K3.count.{shape.name}",
            "pool_count_ / (bincount and add)",
            lambda s: _count(s, shape),
        ),
        Row(
            f"K3.outside.{shape.name}",
            "count_outside / (gather of the mask and sum)",
            lambda s: _outside(s, shape),
        ),
        Row(
            f"K4.dense.{shape.name}",
            "decode / dense decode: " + ("bfloat16" if cuda else "float32") + " product of a dense "
            "tokens x features matrix that is given",
            lambda s: _dense(s, shape),
            dense,
        ),
        Row(
            f"K4.embedding_bag.{shape.name}",
            "decode with error statistics / (embedding_bag, then the same statistics in torch)",
            lambda s: _embedding_bag(s, shape),
        ),
        Row(
            f"K4.bandwidth.{shape.name}",
            "bytes gathered per second by decode with statistics / measured read bandwidth "
            "(above 1: rows are found in caches)",
            lambda s: _bandwidth(s, shape),
            0.7 if cuda else None,
            "higher",
        ),
        Row(
            f"K5.errors.{shape.name}",
            f"errors of {PERMUTATIONS} permutations at once / one decode with statistics",
            lambda s: _permuted(s, shape),
            10.5 if cuda else None,
        ),
        Row(
            f"K5.memory.{shape.name}",
            f"memory of the errors of {PERMUTATIONS} permutations / (64 MiB + outputs)",
            lambda s: _permuted_memory(s, shape),
            1.0 if cuda else None,
        ),
    ]


def _count(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    mine, theirs = (
        torch.zeros(i.shape.m, dtype=torch.int64, device=i.device) for _ in range(2)
    )  # fmt: skip

    def count(codes: SparseCodes) -> None:
        ops.pool_count_(mine, codes)

    def baseline(codes: SparseCodes) -> None:
        theirs.add_(torch.bincount(codes.indices.flatten(), minlength=i.shape.m))

    count(i.codes[0])
    baseline(i.codes[0])
    check("counts", mine, theirs, 0.0)
    work = Work(n_bytes=4.0 * i.codes[0].indices.numel())
    return compare_face(session, i.codes, count, i.codes.call(baseline), work=[work])


def _outside(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    bits = ops.pool_bits(i.pool_mask)

    def outside(codes: SparseCodes) -> Tensor:
        return ops.count_outside(codes, bits)

    def baseline(codes: SparseCodes) -> Tensor:
        return (~i.pool_mask[codes.indices]).sum(dim=1)

    check("counts", outside(i.codes[0]), baseline(i.codes[0]), 0.0)
    work = Work(n_bytes=4.0 * i.codes[0].indices.numel())
    return compare_face(session, i.codes, outside, i.codes.call(baseline), work=[work])


def _dense(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    narrow = session.device == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    weight, dense = i.weight.to(dtype), i.codes[0].to_dense(i.shape.m).to(dtype)

    def decode(codes: SparseCodes) -> Tensor:
        return ops.decode(codes, i.weight, i.decoder_bias)[0]

    def baseline(_: object) -> Tensor:
        if narrow:
            return product_16bit(dense, weight) + i.decoder_bias
        return torch.addmm(i.decoder_bias, dense, weight)

    check("reconstructions", decode(i.codes[0]), baseline(None), 2e-2 if narrow else 1e-5)
    part = slice(few(i.tokens.decode))
    return compare_face(
        session,
        i.codes,
        decode,
        baseline,
        {
            "torch_form": i.codes.call(
                lambda c: ops.decode(c[part], i.weight, i.decoder_bias, impl="torch")
            )
        },
        work=[_gather(i)],
        memory=True,
        extra={"tokens": i.tokens.decode, "torch_form_tokens": part.stop},
    )


def _embedding_bag(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)

    def decode(codes: SparseCodes) -> tuple[Tensor, Tensor | None]:
        return ops.decode(codes, i.weight, i.decoder_bias, i.target)

    def baseline(codes: SparseCodes) -> tuple[Tensor, Tensor]:
        x_hat = functional.embedding_bag(
            codes.indices, i.weight, per_sample_weights=codes.values, mode="sum"
        )
        x_hat += i.decoder_bias
        x = i.target
        sums = [(x - x_hat).square(), x.square(), x_hat.square(), x * x_hat, x]
        return x_hat, torch.stack([part.sum(dim=1) for part in sums], dim=1)

    mine, theirs = decode(i.codes[0]), baseline(i.codes[0])
    check("reconstructions", mine[0], theirs[0], 1e-5)
    assert mine[1] is not None
    check("statistics", mine[1], theirs[1], 1e-4)
    work = [_gather(i, with_target=True)]
    return compare_face(session, i.codes, decode, i.codes.call(baseline), work=work)


def _bandwidth(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    work = _gather(i, with_target=True)
    floor = session.ceilings.floor([work])
    measured = compare_face(
        session,
        i.codes,
        lambda codes: ops.decode(codes, i.weight, i.decoder_bias, i.target),
        i.codes.call(lambda codes: ops.decode(codes, i.weight, i.decoder_bias)),
        work=[work],
    )
    assert measured.ours_s is not None
    extra = {
        "bytes_per_s": work.n_bytes / measured.ours_s,
        "without_statistics_s": measured.baseline_s,
        "note": "baseline_s and floor_s are the bytes at the measured read bandwidth",
    }
    return Measured(
        floor / measured.ours_s, measured.ours_s, floor, floor, {**measured.extra, **extra}
    )


def _permutations(i: SaeInputs) -> Tensor:
    source = generator(i.device, 8)
    return torch.stack(
        [
            torch.randperm(i.shape.m, generator=source, device=i.device, dtype=torch.int32)
            for _ in range(PERMUTATIONS)
        ]
    )


def _permuted(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    permutations = _permutations(i)

    def errors(codes: SparseCodes) -> Tensor:
        return ops.decode_permuted_stats(codes, i.weight, permutations, i.target, i.decoder_bias)

    def once(codes: SparseCodes) -> Tensor:
        stats = ops.decode(codes, i.weight, i.decoder_bias, i.target)[1]
        assert stats is not None
        return stats

    first = errors(i.codes[0])[0]
    check("statistics", first, once(i.codes[0].map_indices(permutations[0])), 0.0)
    # A row of the target is read in place of the row that a decode writes.
    work = Work(n_bytes=PERMUTATIONS * _gather(i).n_bytes)
    baseline = i.codes.call(once)
    if session.device == "cuda":
        baseline = i.codes.replayed(once) or baseline
    return compare_face(session, i.codes, errors, baseline, work=[work], memory=True)


def _permuted_memory(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    permutations = _permutations(i)
    taken = footprint(
        lambda: ops.decode_permuted_stats(
            i.codes[0], i.weight, permutations, i.target, i.decoder_bias
        ),
        session.device,
    )
    return Measured(
        taken.against(_EXTRA_BYTES),
        extra={
            "peak_extra_bytes": taken.extra,
            "reconstructions_bytes": 4 * PERMUTATIONS * i.tokens.decode * i.shape.d,
        },
    )


def _gather(i: SaeInputs, with_target: bool = False) -> Work:
    """Every active feature's row once per token, none found in a cache; the output written."""
    n, d, k = i.tokens.decode, i.shape.d, i.shape.k
    return Work(n_bytes=4.0 * n * d * (k + 1 + with_target) + 8.0 * n * k)
