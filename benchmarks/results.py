"""Records of rows, written so that an interrupted run leaves a whole file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.session import Measured, Row

Record = dict[str, Any]


def record(row: Row, measured: Measured, quick: bool = False) -> Record:
    """Return a row's entry in the JSON file; at toy size nothing is said about the target.

    Raises:
        ValueError: The ratio is not a finite positive number.
    """
    if not (math.isfinite(measured.ratio) and measured.ratio > 0):
        raise ValueError(f"ratio {measured.ratio} is not a finite positive number")
    return {
        "ratio": measured.ratio,
        "target": row.target,
        "met": None if quick else row.met(measured.ratio),
        "ours_s": measured.ours_s,
        "baseline_s": measured.baseline_s,
        "floor_s": measured.floor_s,
        "better": row.better,
        "what": row.what,
        **measured.extra,
    }


def without_result(row: Row, key: str, reason: str) -> Record:
    """Return the entry of a row that failed (``key`` "error") or is "unavailable"."""
    empty = dict.fromkeys(("ratio", "target", "met", "ours_s", "baseline_s", "floor_s"))
    missed = False if key == "error" and row.target is not None else None
    entry = {"target": row.target, "met": missed, "better": row.better, "what": row.what}
    return empty | entry | {key: reason}


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON to a temporary file and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def environment_path(path: Path) -> Path:
    """Where the environment of a results file goes: next to it."""
    return path.with_name(f"{path.stem}.environment.json")


def line(name: str, entry: Record) -> str:
    """Return one line of the printed table."""
    if entry["ratio"] is None:
        key = "error" if "error" in entry else "unavailable"
        return f"{name:40s} {key}: {entry[key]}"
    sign = "<=" if entry["better"] == "lower" else ">="
    target = "" if entry["target"] is None else f"{sign} {entry['target']:.3g}"
    verdict = {True: "met", False: "MISSED", None: ""}[entry["met"]]
    times = "  ".join(
        f"{label} {_seconds(entry[key])}"
        for label, key in (("ours", "ours_s"), ("baseline", "baseline_s"), ("floor", "floor_s"))
        if entry[key] is not None
    )
    return f"{name:40s} {entry['ratio']:9.4g}  {target:8s} {verdict:6s}  {times}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} us"
