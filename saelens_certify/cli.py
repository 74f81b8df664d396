"""The command line: certificates, experiments, and what to do with finished runs.

Exit codes: 0 done (``run``, ``demo``: whatever the verdict; with ``--require_nonvacuous`` only if the
certificate is non-vacuous; ``verify``: everything matches), 1 vacuous although required, 2 wrong input or
arguments, 3 damaged, edited or foreign evidence, 4 any other failure, 130 interrupted (run again to resume).
Of several SAEs the largest code counts; one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from saelens_certify.build_info import build_info
from saelens_certify.certificate import Certificate
from saelens_certify.certification import certify
from saelens_certify.cli_exit import (
    EXIT_DONE,
    EXIT_EVIDENCE,
    EXIT_FAILURE,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_VACUOUS,
    guarded,
)
from saelens_certify.cli_experiments import add_experiments
from saelens_certify.cli_run import Target, add_run_arguments, load_inputs
from saelens_certify.cli_settings import add_settings, config_of
from saelens_certify.comparison import compare
from saelens_certify.errors import CertifyError
from saelens_certify.evidence import CERTIFICATE
from saelens_certify.report import (
    certificate_figure,
    check_picture,
    print_certificate,
    print_comparison,
    print_plan,
    write_picture,
    write_report,
)
from saelens_certify.verification import verify
from saelens_certify.version import __version__

__all__ = [
    "EXIT_DONE",
    "EXIT_EVIDENCE",
    "EXIT_FAILURE",
    "EXIT_INPUT",
    "EXIT_INTERRUPTED",
    "EXIT_VACUOUS",
    "main",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        return guarded(lambda: options.command(options, console), errors)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command resumes the run", style="yellow")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saelens-certify",
        description="Faithfulness certificates for sparse autoencoders.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="certify a bundled SAE on the bundled model")
    demo.add_argument("--sae", default=None, help="one of the bundled SAEs (default: a late layer)")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="run's folder")
    add_settings(demo, {"permutations": 1, "random_decoders": 1})
    _add_result_options(demo)
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="certify SAEs on a model and documents")
    add_run_arguments(run)
    add_settings(run, {})
    _add_result_options(run)
    run.set_defaults(command=_run)

    several = commands.add_parser(
        "compare", help="bounds of several finished runs that hold together, and the best of them"
    )
    several.add_argument(
        "folders", type=Path, nargs="+", help="runs' folders: all that were looked at"
    )
    several.add_argument("--delta", type=float, help="failure probability of the whole")
    several.add_argument("--bound", help="which sharp bound (default: that of the first verdict)")
    several.set_defaults(command=_compare)

    planned = commands.add_parser(
        "plan", help="how many sequences a bound needs, with a finished run as the pilot"
    )
    planned.add_argument("folder", type=Path, help="the pilot's folder")
    planned.add_argument("--bound", help="which bound (default: that of the verdict)")
    planned.add_argument(
        "--target", type=float, help="bits per token (default: that of the run, or below log2 V)"
    )
    planned.add_argument(
        "--margin", type=float, help="bits above what was measured, in place of --target"
    )
    planned.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    planned.set_defaults(command=_plan)

    add_experiments(commands)

    check = commands.add_parser("verify", help="recompute a certificate and compare every hash")
    check.add_argument("folder", type=Path, help="run's folder, or the certificate.json in it")
    check.set_defaults(command=_verify)

    schema = commands.add_parser("schema", help="print the JSON schema of certificate.json")
    schema.set_defaults(command=_schema)

    info = commands.add_parser("info", help="what was built and what is active")
    info.set_defaults(command=_info)
    return parser


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--picture", type=Path, help="also save the figure as .png, .svg or .pdf (extra 'pictures')"
    )
    parser.add_argument(
        "--require_nonvacuous",
        action="store_true",
        help="exit with 1 if the certificate is vacuous",
    )


def _check_output(options: argparse.Namespace) -> None:
    """Look at what the end of the run will need."""
    if options.picture is not None:
        check_picture(options.picture)
    for folder in (options.output, *options.output.parents):
        if folder.exists():
            if not folder.is_dir():
                raise CertifyError(f"output {str(options.output)!r}: {str(folder)!r} is a file")
            break


def _demo(options: argparse.Namespace, console: Console) -> int:
    from saelens_certify import demo

    config = config_of(options)
    _check_output(options)
    name = options.sae or demo.DEFAULT_SAE
    certificate = certify(
        demo.load_model(),
        demo.load_sae(name),
        calibration=demo.load_sequences("calibration", config.seq_len),
        evaluation=demo.load_sequences("evaluation", config.seq_len),
        config=config,
        output=options.output,
    )
    return _finish(certificate, options, console, options.output)


def _run(options: argparse.Namespace, console: Console) -> int:
    config = config_of(options)
    _check_output(options)
    one = "--picture is for one SAE; each run has its figure in report.html"
    inputs = load_inputs(options, config, one if options.picture is not None else None)
    done: dict[str, Certificate] = {}

    def certified(target: Target) -> int:
        certificate = done[str(target.output)] = certify(
            inputs.model,
            inputs.open(target, options),
            calibration=inputs.calibration,
            evaluation=inputs.evaluation,
            config=config,
            output=target.output,
        )
        return _finish(certificate, options, console, target.output)

    if len(inputs.targets) == 1:
        return certified(inputs.targets[0])
    code = _each(inputs.targets, certified, console)
    if len(done) > 1:
        print_comparison(compare(done), console)
    return code


def _each(targets: list[Target], certified: Callable[[Target], int], console: Console) -> int:
    """Certify several SAEs; one that fails does not stop the others."""
    errors = Console(stderr=True)
    codes: dict[str, int] = {}
    for target in targets:
        name = str(target.source)
        console.rule(escape(f"{name} ({len(codes) + 1} of {len(targets)})"))
        codes[name] = guarded(functools.partial(certified, target), errors)
    failed = {name: code for name, code in codes.items() if code > EXIT_VACUOUS}
    console.print(f"{len(codes) - len(failed)} of {len(codes)} SAEs have a certificate")
    for name, code in failed.items():
        errors.print(
            f"failed: {name} (exit code {code})",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return max(codes.values())


def _finish(
    certificate: Certificate, options: argparse.Namespace, console: Console, output: Path
) -> int:
    print_certificate(certificate, console)
    page = write_report(certificate, output / "report.html")
    if options.picture is not None:
        write_picture(certificate_figure(certificate), options.picture)
    for what, path in (("certificate", output / CERTIFICATE), ("report", page)):
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
    if options.require_nonvacuous and not certificate.nonvacuous:
        return EXIT_VACUOUS
    return EXIT_DONE


def _compare(options: argparse.Namespace, console: Console) -> int:
    certificates = {str(folder): Certificate.load(folder) for folder in options.folders}
    if len(certificates) < len(options.folders):
        raise CertifyError("compare got the same folder twice; name each run once")
    print_comparison(compare(certificates, delta=options.delta, bound=options.bound), console)
    return EXIT_DONE


def _plan(options: argparse.Namespace, console: Console) -> int:
    certificate = Certificate.load(options.folder)
    goals = {"target": options.target, "margin": options.margin}
    plan = certificate.plan(options.bound, **goals, seed=options.seed)
    print_plan(plan, certificate.unit, console)
    return EXIT_DONE


def _verify(options: argparse.Namespace, console: Console) -> int:
    result = verify(options.folder)
    print_certificate(result.certificate, console)
    console.print(
        f"verified: {result.n_files} files match their hashes, every number follows from "
        f"{result.n_sequences:,} rows of evidence"
    )
    return EXIT_DONE


def _schema(options: argparse.Namespace, console: Console) -> int:  # noqa: ARG001 - a command's signature
    from saelens_certify.integrations.sae_bench import certificate_schema

    print(json.dumps(certificate_schema(), indent=2))
    return EXIT_DONE


def _info(options: argparse.Namespace, console: Console) -> int:  # noqa: ARG001 - a command's signature
    console.print_json(json.dumps(build_info()))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
