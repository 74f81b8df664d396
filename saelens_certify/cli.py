"""The command line: ``saelens-certify demo | run | verify | info``.

Exit codes: 0 done (``run``, ``demo``: whatever the verdict; with ``--require_nonvacuous`` only if the
certificate is non-vacuous; ``verify``: everything matches), 1 vacuous although required, 2 wrong input or
arguments, 3 damaged, edited or foreign evidence, 4 any other failure, 130 interrupted (run again to resume).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from saelens_certify.build_info import build_info
from saelens_certify.certificate import Certificate
from saelens_certify.certification import certify, sequences_for
from saelens_certify.config import CertifyConfig
from saelens_certify.data import load_documents, split
from saelens_certify.errors import CertifyError, EvidenceError
from saelens_certify.evidence import CERTIFICATE
from saelens_certify.models import DEMO, load_model
from saelens_certify.report import (
    certificate_figure,
    check_picture,
    print_certificate,
    write_picture,
    write_report,
)
from saelens_certify.saes.loading import load_sae
from saelens_certify.verification import verify
from saelens_certify.version import __version__

EXIT_DONE, EXIT_VACUOUS, EXIT_INPUT, EXIT_EVIDENCE, EXIT_FAILURE = 0, 1, 2, 3, 4
EXIT_INTERRUPTED = 130


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
        return options.command(options, console)
    except EvidenceError as error:
        errors.print(f"evidence: {error}", style="red", markup=False, highlight=False)
        return EXIT_EVIDENCE
    except CertifyError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        return EXIT_INPUT
    except KeyboardInterrupt:
        errors.print("interrupted; the same command resumes the run", style="yellow")
        return EXIT_INTERRUPTED
    except Exception:
        # A crash must not look like a verdict to whoever reads the exit code.
        traceback.print_exc()
        errors.print("this failure was not foreseen; evidence measured so far is kept", style="red")
        return EXIT_FAILURE


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
    _add_settings(demo, {"permutations": 1, "random_decoder": True})
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="certify an SAE on a model and documents")
    run.add_argument(
        "--model", required=True, help=f"hub name, local Hugging Face folder, or '{DEMO}'"
    )
    run.add_argument("--sae", required=True, help="'release/sae_id' or a folder with cfg.json")
    run.add_argument(
        "--data",
        help="documents, divided by content hash into calibration and evaluation: hub dataset, "
        ".txt, .jsonl, .parquet, folder of texts, or token file (.npy, .safetensors)",
    )
    run.add_argument("--calibration", help="calibration documents, in place of --data")
    run.add_argument("--evaluation", help="evaluation documents, in place of --data")
    run.add_argument(
        "--calibration_share", type=float, default=0.5, help="share of --data used for calibration"
    )
    run.add_argument("--limit", type=int, help="read at most this many sequences of each source")
    run.add_argument("--split", help="split of a hub dataset, e.g. 'validation'")
    run.add_argument("--revision", help="revision of a hub dataset")
    run.add_argument("--text_column", default="text", help="column that holds the text")
    run.add_argument(
        "--model_class",
        default="TransformerBridge",
        choices=("TransformerBridge", "HookedTransformer"),
        help="TransformerLens class",
    )
    run.add_argument("--device", default="cpu", help="torch device of the model")
    run.add_argument("--llm_dtype", default="float32", help="dtype of the model's parameters")
    run.add_argument(
        "--output", type=Path, required=True, help="run's folder; resumed if it exists"
    )
    _add_settings(run, {})
    run.set_defaults(command=_run)

    check = commands.add_parser("verify", help="recompute a certificate and compare every hash")
    check.add_argument("folder", type=Path, help="run's folder")
    check.set_defaults(command=_verify)

    info = commands.add_parser("info", help="what was built and what is active")
    info.set_defaults(command=_info)
    return parser


def _add_settings(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Add one option for every field of `CertifyConfig`, under its own name."""
    help_texts = _field_help()
    group = parser.add_argument_group("settings of the certificate")
    for field in dataclasses.fields(CertifyConfig):
        default = defaults.get(field.name, field.default)
        keywords: dict[str, Any] = {"default": default, "help": help_texts[field.name]}
        if isinstance(field.default, bool):
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            # Settings that default to None are numbers that depend on the machine.
            kind = int if field.default is None else type(field.default)
            keywords |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(f"--{field.name}", **keywords)
    parser.add_argument(
        "--picture", type=Path, help="also save the figure as .png, .svg or .pdf (extra 'pictures')"
    )
    parser.add_argument(
        "--require_nonvacuous",
        action="store_true",
        help="exit with 1 if the certificate is vacuous",
    )


def _field_help() -> dict[str, str]:
    """Take each setting's description from the docstring of `CertifyConfig`."""
    texts: dict[str, str] = {}
    section = (CertifyConfig.__doc__ or "").split("Attributes:")[1]
    for line in section.splitlines():
        stripped = line.strip()
        name, colon, rest = stripped.partition(": ")
        if colon and name in {f.name for f in dataclasses.fields(CertifyConfig)}:
            texts[name] = rest
        elif stripped and texts:
            last = next(reversed(texts))
            texts[last] += f" {stripped}"
    return {name: text.replace("``", "").replace("%", "%%") for name, text in texts.items()}


def _config(options: argparse.Namespace) -> CertifyConfig:
    return CertifyConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(CertifyConfig)}
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

    config = _config(options)
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
    return _finish(certificate, options, console)


def _run(options: argparse.Namespace, console: Console) -> int:
    config = _config(options)
    _check_output(options)
    given = (
        options.data is not None,
        options.calibration is not None and options.evaluation is not None,
    )
    if sum(given) != 1 or (
        options.data is not None and (options.calibration or options.evaluation)
    ):
        raise CertifyError("give either --data, or both --calibration and --evaluation")
    share = options.calibration_share
    if not 0 < share < 1:
        raise CertifyError(f"--calibration_share must lie between 0 and 1, got {share}")
    # What can be wrong is looked at before the model is loaded.
    where = {
        "split": options.split,
        "revision": options.revision,
        "text_column": options.text_column,
    }
    for source in (options.data, options.calibration, options.evaluation):
        if source is not None:
            load_documents(source, **where)
    sae, sae_id = load_sae(options.sae)
    model = load_model(
        options.model,
        model_class=options.model_class,
        device=options.device,
        dtype=options.llm_dtype,
    )
    read: dict[str, Any] = {**where, "limit": options.limit}
    if options.data is not None:
        sequences = sequences_for(model, options.data, config, **read)
        documents = split(sequences, [share, 1 - share], seed=config.seed)
    else:
        documents = {
            name: sequences_for(model, getattr(options, name), config, **read)
            for name in ("calibration", "evaluation")
        }
    certificate = certify(
        model,
        sae,
        calibration=documents["calibration"],
        evaluation=documents["evaluation"],
        config=config,
        output=options.output,
        sae_id=sae_id,
    )
    return _finish(certificate, options, console)


def _finish(certificate: Certificate, options: argparse.Namespace, console: Console) -> int:
    print_certificate(certificate, console)
    page = write_report(certificate, options.output / "report.html")
    if options.picture is not None:
        write_picture(certificate_figure(certificate), options.picture)
    for what, path in (("certificate", options.output / CERTIFICATE), ("report", page)):
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
    if options.require_nonvacuous and not certificate.nonvacuous:
        return EXIT_VACUOUS
    return EXIT_DONE


def _verify(options: argparse.Namespace, console: Console) -> int:
    result = verify(options.folder)
    print_certificate(result.certificate, console)
    console.print(
        f"verified: {result.n_files} files match their hashes, every number follows from "
        f"{result.n_sequences:,} rows of evidence"
    )
    return EXIT_DONE


def _info(options: argparse.Namespace, console: Console) -> int:  # noqa: ARG001 - a command's signature
    console.print_json(json.dumps(build_info()))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
