"""``python -m benchmarks cpu|cuda``: ratios against named baselines, measured in turn in one process."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.environment import environment, load_average
from benchmarks.results import Record, environment_path, line, record, without_result, write_json
from benchmarks.session import Row, Session
from benchmarks.suites import SUITES, UnknownRowError, chosen, rows_of
from saelens_certify.ops._library import architecture_problem, cuda_library


def run(
    rows: Sequence[Row], session: Session, json_path: Path | None = None, progress: bool = True
) -> dict[str, Record]:
    """Measure rows one after another; a row that fails does not stop the others.

    Args:
        rows: What to measure.
        session: Device, size and what rows share.
        json_path: Where results are written, again after every row.
        progress: Whether to show a bar.

    Returns:
        Records by name; those of failed rows have an ``error``.
    """
    records: dict[str, Record] = {}
    about = environment(session.device) | {"quick": session.quick}
    if json_path is not None:
        write_json(environment_path(json_path), about)
    begin = time.perf_counter()
    with tqdm(rows, unit="row", disable=None if progress else True, smoothing=0) as bar:
        for row in bar:
            bar.set_postfix_str(row.name)
            since = time.perf_counter()
            if row.unavailable:
                records[row.name] = without_result(row, "unavailable", row.unavailable)
            else:
                try:
                    records[row.name] = record(row, row.measure(session), session.quick)
                except Exception as error:  # noqa: BLE001 - reported in the row's record
                    reason = f"{type(error).__name__}: {error}"
                    records[row.name] = without_result(row, "error", reason)
                    tqdm.write(traceback.format_exc(), file=sys.stderr)
                records[row.name]["row_s"] = time.perf_counter() - since
            tqdm.write(line(row.name, records[row.name]))
            if json_path is not None:
                write_json(json_path, records)
    about["load_average_end"] = load_average()
    about["seconds"] = time.perf_counter() - begin
    about["ceilings"] = session.ceilings.to_dict()
    if json_path is not None:
        write_json(json_path, records)
        write_json(environment_path(json_path), about)
    return records


def _gpu_problem() -> str:
    """Why the GPU suite would measure nothing of this package, empty if it measures it."""
    if not torch.cuda.is_available():
        return (
            f"cuda: torch {torch.__version__} sees no GPU here; run `python -m benchmarks cpu`, or "
            "this on a machine with a GPU and a CUDA build of torch"
        )
    # Without them every row would divide plain torch by plain torch.
    reason = cuda_library().reason or architecture_problem(torch.cuda.get_device_capability())
    return f"cuda: there are no CUDA operators to measure: {reason}" if reason else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line.

    Returns:
        0 if every row was measured, 1 if one failed, 2 for a wrong call, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("suite", choices=SUITES, help="which machine to measure")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write results here, and the environment next to it (results.json: results.environment.json)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="name or beginning of names"
    )
    parser.add_argument("--quick", action="store_true", help="every row at toy size")
    parser.add_argument("--list", action="store_true", help="show names and targets only")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)
    session = Session(options.suite, options.quick)
    try:
        everything = rows_of(options.suite, session)
        rows = everything if options.list and not options.only else chosen(everything, options.only)
    except UnknownRowError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for row in rows:
            sign = "<=" if row.better == "lower" else ">="
            target = "" if row.target is None else f"{sign} {row.target:.3g}"
            on_request = "(only when named) " if row.on_request else ""
            print(f"{row.name:40s} {target:8s} {on_request}{row.unavailable or row.what}")
        return 0
    problem = _gpu_problem() if options.suite == "cuda" else ""
    if problem:
        print(problem, file=sys.stderr)
        return 2
    if options.json is not None and options.json.is_dir():
        print(f"--json {options.json} is a folder: name a file in it", file=sys.stderr)
        return 2
    try:
        records = run(rows, session, options.json)
    except KeyboardInterrupt:
        kept = "" if options.json is None else f"; finished rows are in {options.json}"
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    failed = [name for name, entry in records.items() if "error" in entry]
    missed = [name for name, entry in records.items() if entry["met"] is False]
    print(f"{len(records)} rows, {len(missed)} below target, {len(failed)} failed")
    for name in failed:
        print(f"failed: {name}: {records[name]['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
