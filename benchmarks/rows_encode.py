"""K1 and K2: exact top-k and threshold encoding against dense products with ``torch.topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.faces import check, compare_face, few
from benchmarks.inputs import Ring, SaeInputs
from benchmarks.memory import footprint
from benchmarks.rooflines import Work, product_16bit, with_tf32
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Contender
from saelens_certify import ops
from saelens_certify.ops import Impl, SparseCodes
from saelens_certify.ops.screen import Screen

# A threshold that no score reaches: nothing is rescored, only the screen is left.
_UNREACHABLE = 1e30
# Tiles in which the product alone is tried; it is measured in the fastest of them.
_GEMM_TILES = ((1024, 1024), (1024, 4096), (1024, 8192), (2048, 4096))

_EXACT = {"G2": 0.2, "GE": 0.3, "LL": 0.15}
_EXACT_TF32 = {"G2": 0.25, "GE": 0.7, "LL": 0.45}
_EXTRA_BYTES = 64 << 20


def encode_rows(device: str, native_16bit: bool) -> list[Row]:
    """Rows of the encoders for a device type."""
    rows: list[Row] = []
    for shape in SHAPES:
        rows += _topk_rows(shape, device, native_16bit)
        rows += _threshold_rows(shape)
    return rows


def _topk_rows(shape: Shape, device: str, native_16bit: bool) -> list[Row]:
    cuda = device == "cuda"
    exact = _EXACT.get(shape.name) if cuda else (0.5 if native_16bit else 1.05)
    screen = (1.15 if shape.d >= 2048 else 1.35) if cuda else 1.03
    rows = [
        Row(
            f"K1.exact.{shape.name}",
            "topk_encode / (addmm + relu + topk in float32)",
            lambda s: _exact(s, shape),
            exact,
        ),
        Row(
            f"K1.pooled.{shape.name}",
            "topk_encode, all features and a pool in one pass / (addmm + relu + 2 topk, one masked)",
            lambda s: _pooled(s, shape),
        ),
        Row(
            f"K1.screen.{shape.name}",
            "topk_encode with an unreachable threshold (product and filter, nothing rescored) / "
            "the same product alone",
            lambda s: _screen(s, shape),
            screen,
        ),
        Row(
            f"K1.memory.{shape.name}",
            "memory of topk_encode / (64 MiB + outputs)",
            lambda s: _memory(s, shape),
            1.0 if cuda else None,
        ),
    ]
    if cuda:
        tf32 = Row(
            f"K1.exact_tf32.{shape.name}",
            "topk_encode / (addmm + relu + topk in TF32)",
            lambda s: _exact(s, shape, tf32=True),
            _EXACT_TF32.get(shape.name),
        )
        rows.insert(1, tf32)
    return rows


def _threshold_rows(shape: Shape) -> list[Row]:
    return [
        Row(
            f"K2.relu.{shape.name}",
            "threshold_encode / (addmm + relu), which leaves a dense result",
            lambda s: _threshold(s, shape, "relu"),
        ),
        Row(
            f"K2.jumprelu.{shape.name}",
            "threshold_encode with a threshold per feature / (addmm + relu + mask), dense result",
            lambda s: _threshold(s, shape, "jumprelu"),
        ),
        Row(
            f"K2.gated.{shape.name}",
            "threshold_encode with two affine maps of one product / (mm, gate, magnitude, mask), "
            "dense result",
            lambda s: _threshold(s, shape, "gated"),
        ),
    ]


def _exact(session: Session, shape: Shape, tf32: bool = False) -> Measured:
    i = SaeInputs.of(session, shape)
    k = i.shape.k

    def dense(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(i.bias, x, i.weight.T).relu_().topk(k, dim=1)

    def encode(x: Tensor, screen: Screen = i.screen, impl: Impl = "auto") -> SparseCodes:
        return ops.topk_encode(x, i.weight, i.bias, k=k, screen=screen, impl=impl)[0]

    baseline = i.x.call(dense)
    mine, found = encode(i.x[0]), dense(i.x[0])
    check("the largest features", mine.values, found[0], 1e-4)
    work = [_product(i), _rescoring(i)]
    if tf32:
        return compare_face(session, i.x, encode, with_tf32(baseline), work=work)
    part, wide = few(i.tokens.encode), Screen(i.screen.norms)
    return compare_face(
        session,
        i.x,
        encode,
        baseline,
        {
            "float32_screen": i.x.call(lambda x: encode(x, wide)),
            "torch_form": i.x.call(lambda x: encode(x[:part], impl="torch")),
        },
        work=work,
        extra={"tokens": i.tokens.encode, "torch_form_tokens": part},
    )


def _pooled(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    k, bits = i.shape.k, ops.pool_bits(i.pool_mask)

    def dense(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        features = torch.addmm(i.bias, x, i.weight.T).relu_()
        return features.topk(k, dim=1), features.mul_(i.pool_mask).topk(k, dim=1)

    def encode(x: Tensor) -> tuple[SparseCodes, SparseCodes]:
        everything, members = ops.topk_encode(
            x, i.weight, i.bias, k=k, pool_bits=bits, screen=i.screen
        )
        assert members is not None
        return everything, members

    for mine, theirs in zip(encode(i.x[0]), dense(i.x[0]), strict=True):
        check("the largest features", mine.values, theirs[0], 1e-4)
    work = [_product(i), _rescoring(i)]
    return compare_face(session, i.x, encode, i.x.call(dense), work=work)


def _screen(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    theta = torch.full((i.shape.m,), _UNREACHABLE, device=i.device)
    dtype = i.screen.precision
    weight = i.weight if i.screen.weight is None else i.screen.weight
    narrow = Ring([x.to(dtype) for x in i.x.parts])

    def product(rows: int, columns: int) -> Contender:
        def in_tiles(x: Tensor) -> None:
            for some in x.split(rows):
                for features in weight.split(columns):
                    if dtype == torch.float32:
                        torch.mm(some, features.T)
                    else:
                        product_16bit(some, features.T)

        return narrow.call(in_tiles)

    def encode(x: Tensor) -> SparseCodes:
        return ops.topk_encode(x, i.weight, i.bias, k=i.shape.k, theta=theta, screen=i.screen)[0]

    if int(encode(i.x[0]).counts.sum()):
        raise ValueError("the threshold was to be out of reach, but a feature is active")
    tiles = {f"{rows}x{columns}": product(rows, columns) for rows, columns in _GEMM_TILES}
    tried = session.time(tiles, min_rounds=2, max_rounds=3, budget_s=session.budget_s / 4)
    best = min(tried, key=lambda name: tried[name].median)
    return compare_face(
        session,
        i.x,
        encode,
        tiles[best],
        work=[_product(i)],
        extra={"product": str(dtype).removeprefix("torch."), "product_tile": best},
    )


def _memory(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    taken = footprint(
        lambda: ops.topk_encode(i.x[0], i.weight, i.bias, k=i.shape.k, screen=i.screen)[0],
        session.device,
    )
    dense = 4 * i.tokens.encode * i.shape.m
    return Measured(
        taken.against(_EXTRA_BYTES),
        extra={"peak_extra_bytes": taken.extra, "tokens_x_features_bytes": dense},
    )


def _threshold(session: Session, shape: Shape, kind: str) -> Measured:
    i = SaeInputs.of(session, shape)
    gate = None
    if kind == "gated":
        # The gate decides for about k features; magnitudes pass where it is open.
        bias, gate, theta = i.bias + i.theta, i.bias - i.theta, None
    elif kind == "jumprelu":
        bias, theta = i.bias, torch.full((i.shape.m,), i.theta, device=i.device)
    else:
        bias, theta = i.bias - i.theta, None

    def dense(x: Tensor) -> Tensor:
        if gate is not None:
            product = x @ i.weight.T
            return ((product + gate) > 0) * (product + bias).relu_()
        scores = torch.addmm(bias, x, i.weight.T)
        return scores.relu_() if theta is None else scores.relu() * (scores > theta)

    def encode(x: Tensor, impl: Impl = "auto") -> SparseCodes:
        return ops.threshold_encode(
            x, i.weight, bias, theta=theta, gate_bias=gate, screen=i.screen, impl=impl
        )

    mine, found = encode(i.x[0]), dense(i.x[0])
    # Features at the threshold may fall on either side in float32: the sums say enough.
    check("the sum of active features", mine.values.double().sum(), found.double().sum(), 1e-3)
    part = few(i.tokens.encode)
    return compare_face(
        session,
        i.x,
        encode,
        i.x.call(dense),
        {"torch_form": i.x.call(lambda x: encode(x[:part], impl="torch"))},
        work=[_product(i)],
        extra={
            "tokens": i.tokens.encode,
            "torch_form_tokens": part,
            "active_per_token": float(mine.counts.double().mean()),
        },
    )


def _product(i: SaeInputs) -> Work:
    """The screening product; operands are read once."""
    n, d, m = i.tokens.encode, i.shape.d, i.shape.m
    native = i.session.native_16bit
    width = 2 if native else 4
    return Work(2.0 * n * d * m, width * (m * d + n * d), "16bit" if native else "fp32")


def _rescoring(i: SaeInputs) -> Work:
    """At least the k features that are kept must be scored exactly: k float32 rows a token."""
    return Work(n_bytes=4.0 * i.tokens.encode * i.shape.k * i.shape.d)
