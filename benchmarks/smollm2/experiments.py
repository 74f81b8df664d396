"""``python -m benchmarks.smollm2.experiments``: every experiment on a real model, and a page of what came out.

SAEs at six layers of SmolLM2-135M (trained if they are not in the cache), then: layer sweep and output fidelity, error
amplification, feature shuffling, sensitivities, distribution shift, a downstream task. Results go to ``--json``, pictures and
page to ``docs/`` on request. Killed and started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.smollm2 import continuations
from benchmarks.smollm2.experiments_page import write_page
from benchmarks.smollm2.fetch import CACHE_DIR
from benchmarks.smollm2.model import load_smollm2
from benchmarks.smollm2.text import sequences
from benchmarks.smollm2.train_saes import LENGTH, PRESETS, trained_saes
from saelens_certify import CertifyConfig
from saelens_certify.experiments import (
    Experiment,
    distribution_shift,
    downstream_tasks,
    error_amplification,
    feature_shuffling,
    layer_sweep,
    output_fidelity,
    sensitivity,
)
from saelens_certify.report.experiments.table import print_experiment

LAYERS = (4, 9, 15, 20, 24, 28)
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS)
ONE = HOOKS[4]
"""The SAE of the experiments on one SAE: a late layer, where the model's error is small."""


@dataclass(frozen=True)
class Size:
    """How many sequences each experiment takes."""

    calibration: int = 1000
    layers: int = 600
    amplification: int = 200
    shuffling: int = 300
    permutations: int = 19
    error_permutations: int = 100
    sensitivity: int = 600
    shift: int = 300
    questions: int = 200


QUICK = Size(60, 40, 24, 24, 2, 8, 40, 24, 12)
"""Seconds instead of minutes: tries everything, shows nothing."""


def run_all(
    size: Size, output: Path, cache_dir: Path | None = None, hooks: tuple[str, ...] = HOOKS
) -> dict[str, tuple[Experiment, float]]:
    """Run every experiment.

    Args:
        size: How many sequences.
        output: Folder of the runs.
        cache_dir: Folder that keeps model, prose and SAEs; ``benchmarks/cache`` by default.
        hooks: Where the SAEs are.

    Returns:
        By name: the experiment, and the seconds it took.
    """
    model = load_smollm2(cache_dir=cache_dir)
    saes = trained_saes("ci", hooks, cache_dir, model)
    one = saes[ONE if ONE in saes else hooks[-1]]
    prose = PRESETS["ci"].prose
    evaluated = max(size.layers, size.sensitivity)
    calibration = sequences(
        "calibration", model.tokenizer, LENGTH, size.calibration, prose, cache_dir
    )
    evaluation = sequences("evaluation", model.tokenizer, LENGTH, evaluated, prose, cache_dir)
    config = CertifyConfig(seq_len=LENGTH, part_sequences=100)
    few = {"calibration": calibration, "config": config}
    coded = CertifyConfig(seq_len=LENGTH, part_sequences=100, coding="topk:32")
    budgets = tuple(size.calibration // share for share in (25, 8, 4, 2))
    code = python_code(model.tokenizer, size.shift)
    works: dict[str, Callable[[Path], Experiment]] = {
        "layer_sweep": lambda folder: layer_sweep(
            model, saes, **few, evaluation=evaluation[: size.layers], output=folder
        ),
        "error_amplification": lambda folder: error_amplification(
            model, saes, **few, evaluation=evaluation[: size.amplification], output=folder
        ),
        "feature_shuffling": lambda folder: feature_shuffling(
            model,
            one,
            **few,
            evaluation=evaluation[: size.shuffling],
            permutations=size.permutations,
            error_permutations=size.error_permutations,
            output=folder,
        ),
        "sensitivity": lambda folder: sensitivity(
            model,
            one,
            calibration=calibration,
            evaluation=evaluation[: size.sensitivity],
            ks=(4, 8, 16),
            budgets=budgets,
            taus=(2, 5, 10, 20),
            alphas=(0.1, 0.25, 0.75),
            lengths=(8, 16),
            config=coded,
            output=folder,
        ),
        "distribution_shift": lambda folder: distribution_shift(
            model,
            one,
            **few,
            evaluation=evaluation[: size.shift],
            rates=(0.0, 0.05, 0.1, 0.25, 0.5, 1.0),
            others={"Python code": code},
            output=folder,
        ),
        "downstream_tasks": lambda folder: downstream_tasks(
            model,
            one,
            **few,
            tasks=[continuations.task(output / "tasks", size.questions)],
            output=folder,
        ),
    }
    found: dict[str, tuple[Experiment, float]] = {}
    for name, work in works.items():
        since = time.perf_counter()
        experiment = work(output / name)
        found[name] = experiment, time.perf_counter() - since
        print_experiment(experiment, Console(width=160))
        if name == "layer_sweep":  # the same certificates say it
            since = time.perf_counter()
            fidelity = output_fidelity(experiment.certificates)
            fidelity.save(output / "output_fidelity")
            found["output_fidelity"] = fidelity, time.perf_counter() - since
    return found


def python_code(tokenizer: Any, n: int, length: int = LENGTH) -> Int[Tensor, "n pos"]:
    """Return the first tokens of functions of Python's standard library: another distribution, on any machine."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: list[list[int]] = []
    skipped = {"site-packages", "test", "tests", "lib2to3"}
    for file in sorted(library.rglob("*.py")):
        if skipped & set(file.relative_to(library).parts):
            continue
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_source_segment(source, node) or ""
                ids = tokenizer(inspect.cleandoc(text)).input_ids[:length]
                if len(ids) == length:
                    rows.append(ids)
                break  # one a file: functions of one file are not independent
        if len(rows) == n:
            break
    return torch.tensor(rows)


def main(argv: list[str] | None = None) -> None:
    """Run all experiments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try everything")
    parser.add_argument("--cache_dir", type=Path, default=CACHE_DIR)
    parser.add_argument("--output", type=Path, help="runs' folder (default: in the cache)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--docs", type=Path, help="folder for page and pictures")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)
    output = options.output or options.cache_dir / "smollm2" / "experiments"
    started, machine = time.perf_counter(), environment()
    found = run_all(QUICK if options.quick else Size(), output, options.cache_dir)
    results = {
        "environment": machine,
        "size": asdict(QUICK if options.quick else Size()),
        "seconds": time.perf_counter() - started,
        "experiments": {
            name: {
                "title": experiment.title,
                "seconds": seconds,
                "findings": list(experiment.findings),
                "rows": json.loads((output / name / f"{experiment.kind}.json").read_text())["rows"],
            }
            for name, (experiment, seconds) in found.items()
        },
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.docs is not None:
        write_page(results, options.docs, {name: each for name, (each, _) in found.items()})
    print(f"done after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
