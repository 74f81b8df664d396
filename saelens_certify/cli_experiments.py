"""The experiments on the command line: one command each, and the published ones by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from saelens_certify.cli_exit import EXIT_DONE
from saelens_certify.cli_run import Inputs, add_run_arguments, load_inputs
from saelens_certify.cli_settings import add_settings, config_of
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments import (
    PAPER_TASKS,
    RATES,
    Experiment,
    distribution_shift,
    downstream_tasks,
    error_amplification,
    feature_shuffling,
    layer_sweep,
    measure_fidelity,
    sensitivity,
)
from saelens_certify.experiments.presets import run_preset
from saelens_certify.experiments.published import PRESETS
from saelens_certify.models import DEMO
from saelens_certify.report.experiments.table import print_experiment

_ONE = "this experiment is about one SAE: name one with --sae"

Command = Callable[[argparse.Namespace, Console], int]


def add_experiments(commands: Any) -> None:
    """Add a command for every experiment.

    Args:
        commands: What ``add_subparsers`` returned.
    """
    _command(
        commands,
        "shuffle",
        _shuffle,
        "the SAE against copies of it with shuffled features and with random decoders",
        {
            "permutations": 19,
            "error_permutations": 100,
            "random_decoders": 1,
            "random_unit_decoders": 1,
        },
    )
    layers = _command(
        commands, "layers", _layers, "certificates of SAEs at many layers, from shared passes"
    )
    layers.add_argument(
        "--grid", type=int, nargs="+", metavar="INT", help="numbers of sequences to look at"
    )
    _command(
        commands,
        "fidelity",
        _fidelity,
        "how far the predictions of the proxies are from the model's",
    )
    _command(
        commands,
        "amplification",
        _amplification,
        "how an SAE's error grows through the blocks that follow",
        {"horizons": (0, 1, 2, 4, 8)},
    )
    vary = _command(
        commands, "sensitivity", _sensitivity, "how the bounds depend on one setting after another"
    )
    vary.add_argument("--ks", type=int, nargs="*", default=(), help="values of K (coding topk:K)")
    vary.add_argument("--budgets", type=int, nargs="*", default=(), help="calibration sequences")
    vary.add_argument("--budget_tokens", type=int, nargs="*", default=(), help="calibration tokens")
    vary.add_argument("--taus", type=int, nargs="*", default=(), help="frequency thresholds")
    vary.add_argument("--alphas", type=float, nargs="*", default=(), help="smoothing weights")
    vary.add_argument("--lengths", type=int, nargs="*", default=(), help="tokens per sequence")
    shift = _command(
        commands, "shift", _shift, "the same pool on corrupted, random and other documents"
    )
    shift.add_argument(
        "--rates", type=float, nargs="*", default=RATES, help="shares of tokens replaced at random"
    )
    shift.add_argument(
        "--other",
        nargs="*",
        default=(),
        metavar="NAME=DOCUMENTS",
        help="further evaluation documents, each by a name of its own",
    )
    tasks = _command(
        commands,
        "tasks",
        _tasks,
        "multiple-choice accuracy of the model and the proxies (extra 'lm-eval')",
    )
    tasks.add_argument(
        "--tasks", nargs="+", default=PAPER_TASKS, help="tasks of lm-evaluation-harness"
    )
    tasks.add_argument(
        "--metric", default="acc", help="'acc' (by log-probability) or 'acc_norm' (per character)"
    )
    tasks.add_argument("--questions", type=int, help="at most so many questions of each task")
    tasks.add_argument("--num_fewshot", type=int, help="solved examples in each prompt")
    tasks.add_argument("--include_path", type=Path, help="folder of further task files")

    published = commands.add_parser(
        "experiment", help="an experiment of the paper with its published settings, by name"
    )
    published.add_argument("--preset", required=True, choices=sorted(PRESETS), help="its name")
    published.add_argument(
        "--model", help=f"in place of the published models: a hub name, a folder, or '{DEMO}'"
    )
    published.add_argument(
        "--sae",
        nargs="+",
        help="SAEs of that model, each as for 'run' (default with the bundled model: its own)",
    )
    published.add_argument(
        "--calibration", help="calibration documents in place of the published ones"
    )
    published.add_argument("--evaluation", help="evaluation documents, together with --calibration")
    published.add_argument("--calibration_sequences", type=int, help="how many to read")
    published.add_argument("--evaluation_sequences", type=int, help="how many to read")
    published.add_argument("--tasks", nargs="+", help="tasks in place of the published ones")
    published.add_argument("--questions", type=int, help="questions of each task")
    published.add_argument("--include_path", type=Path, help="folder of further task files")
    published.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars"
    )
    published.add_argument("--device", help="torch device (default: a GPU if there is one)")
    published.add_argument("--output", type=Path, required=True, help="folder of the results")
    published.set_defaults(command=_published)


def _command(
    commands: Any,
    name: str,
    command: Command,
    says: str,
    defaults: Mapping[str, Any] | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=says, description=says)
    add_run_arguments(parser)
    add_settings(parser, defaults)
    parser.set_defaults(command=command)
    return parser


def _saes(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Open all SAEs, by what tells their names apart."""
    names = [str(target.source) for target in inputs.targets]
    if all(Path(name).is_dir() for name in names):
        names = [Path(name).name for name in names]
    if len(set(names)) < len(names):
        names = [str(target.source) for target in inputs.targets]
    return {
        name: inputs.open(target, options)
        for name, target in zip(names, inputs.targets, strict=True)
    }


def _shuffle(options: argparse.Namespace, console: Console) -> int:
    names = (
        "permutations", "error_permutations", "matched_permutations", "random_decoders", "random_unit_decoders",
    )  # fmt: skip
    return _about_one(
        feature_shuffling, options, console, **{n: getattr(options, n) for n in names}
    )


def _layers(options: argparse.Namespace, console: Console) -> int:
    return _about_several(layer_sweep, options, console, grid=options.grid)


def _fidelity(options: argparse.Namespace, console: Console) -> int:
    return _about_several(measure_fidelity, options, console)


def _amplification(options: argparse.Namespace, console: Console) -> int:
    return _about_several(error_amplification, options, console, horizons=options.horizons)


def _about_several(
    experiment: Callable[..., Experiment],
    options: argparse.Namespace,
    console: Console,
    **more: Any,
) -> int:
    """Run an experiment on all SAEs that are named."""
    config = config_of(options)
    inputs = load_inputs(options, config)
    sides = {"calibration": inputs.calibration, "evaluation": inputs.evaluation}
    saes = _saes(inputs, options)
    found = experiment(inputs.model, saes, **sides, **more, config=config, output=options.output)
    return _finish(found, options, console)


def _about_one(
    experiment: Callable[..., Experiment],
    options: argparse.Namespace,
    console: Console,
    **more: Any,
) -> int:
    """Run an experiment on the SAE that is named."""
    config = config_of(options)
    inputs = load_inputs(options, config, _ONE)
    sides = {"calibration": inputs.calibration, "evaluation": inputs.evaluation}
    sae = inputs.open(inputs.targets[0], options)
    found = experiment(inputs.model, sae, **sides, **more, config=config, output=options.output)
    return _finish(found, options, console)


def _sensitivity(options: argparse.Namespace, console: Console) -> int:
    names = ("ks", "budgets", "budget_tokens", "taus", "alphas", "lengths")
    varied = {name: getattr(options, name) for name in names}
    if not any(varied.values()):
        raise CertifyError(f"nothing is varied: give one or more of --{', --'.join(varied)}")
    return _about_one(sensitivity, options, console, **varied)


def _shift(options: argparse.Namespace, console: Console) -> int:
    others = _others(options.other)
    return _about_one(distribution_shift, options, console, rates=options.rates, others=others)


def _others(named: list[str]) -> dict[str, str]:
    """Take ``NAME=DOCUMENTS`` apart.

    Raises:
        CertifyError: If one is not of that form, or a name comes twice.
    """
    others: dict[str, str] = {}
    for each in named:
        name, equals, documents = each.partition("=")
        if not (name and equals and documents):
            raise CertifyError(f"--other {each!r} must be NAME=DOCUMENTS, e.g. code=owner/dataset")
        if name in others:
            raise CertifyError(f"--other names {name!r} twice")
        others[name] = documents
    return others


def _tasks(options: argparse.Namespace, console: Console) -> int:
    config: CertifyConfig = config_of(options)
    inputs = load_inputs(options, config, _ONE)
    experiment = downstream_tasks(
        inputs.model,
        inputs.open(inputs.targets[0], options),
        calibration=inputs.calibration,
        tasks=options.tasks,
        metric=options.metric,
        config=config,
        limit=options.questions,
        num_fewshot=options.num_fewshot,
        include_path=options.include_path,
        output=options.output,
    )
    return _finish(experiment, options, console)


def _published(options: argparse.Namespace, console: Console) -> int:
    found = run_preset(
        options.preset,
        model=options.model,
        saes=options.sae,
        calibration=options.calibration,
        evaluation=options.evaluation,
        calibration_sequences=options.calibration_sequences,
        evaluation_sequences=options.evaluation_sequences,
        questions=options.questions,
        tasks=options.tasks,
        include_path=options.include_path,
        device=options.device,
        output=options.output,
        progress=options.progress,
    )
    for name, experiment in found.items():
        console.rule(escape(name))
        print_experiment(experiment, console)
    console.print(f"results: {options.output}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def _finish(experiment: Experiment, options: argparse.Namespace, console: Console) -> int:
    print_experiment(experiment, console)
    for suffix in ("html", "csv"):
        path = options.output / f"{experiment.kind}.{suffix}"
        console.print(f"{suffix}: {path}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE
