"""What a first run on a GPU should find out about it: caches, product tiles, ``torch.topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import SaeInputs, generator
from benchmarks.rooflines import Work, product_16bit
from benchmarks.session import Measured, Row, Session
from benchmarks.shapes import SHAPES, Shape

_TILES = ((512, 8192), (1024, 4096), (1024, 8192), (2048, 2048), (2048, 4096), (4096, 2048))
_TOPK_ROWS = 2048


def device_rows() -> list[Row]:
    """Rows that describe the machine; none has a target."""
    rows = [
        Row(
            "device.l2_read",
            "repeated reads of 16 MiB, bytes per second / read bandwidth of memory",
            _l2,
            better="higher",
        )
    ]
    for shape in SHAPES:
        rows += [
            Row(
                f"device.tiles.{shape.name}",
                "16-bit screening product in tiles, best of several / in one piece",
                lambda s, shape=shape: _tiles(s, shape),
            ),
            Row(
                f"device.topk.{shape.name}",
                "bytes per second of torch.topk / read bandwidth of memory",
                lambda s, shape=shape: _topk(s, shape),
                better="higher",
            ),
        ]
    return rows


def _l2(session: Session) -> Measured:
    rates = session.ceilings
    rate = rates.l2_read or rates.read
    return Measured(
        rate / rates.read, extra={"bytes_per_s": rate, "memory_bytes_per_s": rates.read}
    )


def _tiles(session: Session, shape: Shape) -> Measured:
    i = SaeInputs.of(session, shape)
    dtype = torch.float16 if session.device == "cuda" else torch.bfloat16
    weight, x = i.weight.to(dtype), i.x[0].to(dtype)

    def tiled(rows: int, columns: int) -> Tensor | None:
        tile = None
        for some_rows in x.split(rows):
            for features in weight.split(columns):
                tile = product_16bit(some_rows, features.T)
        return tile

    contenders = {
        f"{rows}x{columns}": lambda _, rows=rows, columns=columns: tiled(rows, columns)
        for rows, columns in _TILES
    }
    timings = session.time({"whole": lambda _: product_16bit(x, weight.T), **contenders})
    seconds = {name: timing.median for name, timing in timings.items()}
    whole = seconds.pop("whole")
    best = min(seconds, key=lambda name: seconds[name])
    flops = 2.0 * x.shape[0] * x.shape[1] * weight.shape[0]
    return Measured(
        seconds[best] / whole,
        seconds[best],
        whole,
        session.ceilings.floor([Work(flops, precision="16bit")]),
        {
            "best_tile": best,
            "flops": flops,
            "flops_per_s": {n: flops / s for n, s in seconds.items()},
        },
    )


def _topk(session: Session, shape: Shape) -> Measured:
    sizes = shape.toy() if session.quick else shape
    rows = 64 if session.quick else _TOPK_ROWS
    source = generator(session.device, 9)
    scores = torch.randn(rows, sizes.m, device=session.device, generator=source)
    timing = session.time({"topk": lambda _: scores.topk(sizes.k, dim=1)})["topk"]
    n_bytes = 4.0 * scores.numel()
    floor = session.ceilings.floor([Work(n_bytes=n_bytes)])
    return Measured(
        floor / timing.median,
        timing.median,
        floor,
        floor,
        {
            "bytes": n_bytes,
            "bytes_per_s": n_bytes / timing.median,
            "note": "baseline_s and floor_s are the bytes at the measured read bandwidth",
        },
    )
