"""SAELens's evaluation command with the certificate in its results.

Arguments and files are those of ``python -m sae_lens.evals``: its own parser and writers run. Two of
its faults are mended from outside, for the time of the command only: SAEs whose metadata has no
``model_from_pretrained_kwargs`` (Gemma Scope) end in a TypeError, and ``--compute_*`` flags are ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import sae_lens.evals

from saelens_certify.cli_settings import add_settings, config_of
from saelens_certify.errors import CertifyError
from saelens_certify.integrations.sae_lens.activations_store import N_CALIBRATION, N_EVALUATION
from saelens_certify.integrations.sae_lens.registration import register
from saelens_certify.integrations.sae_lens.state import replaced

EXIT_DONE, EXIT_INPUT = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run SAELens's evaluation command with certificates.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        0, or 2 if the arguments or the installed SAELens do not fit.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    ours, theirs = parser.parse_known_args(given)
    if ours.help:
        parser.print_help()
        sae_lens.evals.process_args(["--help"])  # prints and exits
    options = sae_lens.evals.process_args(theirs)
    try:
        config = config_of(ours)
        if options.verbose:
            config = dataclasses.replace(config, progress=True)
        registration = register(
            certify_config=config,
            n_calibration_sequences=ours.n_calibration_sequences,
            n_evaluation_sequences=ours.n_evaluation_sequences,
            one_document_per_row=ours.one_document_per_row,
            output=ours.certificates_dir,
            on_refusal="raise" if ours.stop_on_refusal else "record",
        )
        with registration, mended(options):
            sae_lens.evals.run_evals_cli(theirs)
    except CertifyError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_INPUT
    return EXIT_DONE


@contextmanager
def mended(options: argparse.Namespace) -> Iterator[None]:
    """Mend two faults of SAELens's command while it runs.

    Args:
        options: What SAELens's parser made of its arguments.
    """
    with ExitStack() as stack:
        stack.enter_context(replaced(sae_lens.evals, "SAE", _Loader))
        chosen = {
            name for name, value in vars(options).items() if name.startswith("compute_") and value
        }
        if chosen:
            everything = sae_lens.evals.get_eval_everything_config

            def only_chosen(*args: Any, **kwargs: Any) -> Any:
                config = everything(*args, **kwargs)
                names = [field.name for field in dataclasses.fields(config)]
                flags = {name: name in chosen for name in names if name.startswith("compute_")}
                return dataclasses.replace(config, **flags)

            stack.enter_context(replaced(sae_lens.evals, "get_eval_everything_config", only_chosen))
        yield


class _Loader:
    """Stands for ``SAE`` in ``multiple_evals``, which splats the metadata's keyword arguments."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from sae_lens import SAE

        sae = SAE.from_pretrained(*args, **kwargs)
        if sae.cfg.metadata.model_from_pretrained_kwargs is None:
            sae.cfg.metadata.model_from_pretrained_kwargs = {}
        return sae


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m saelens_certify.integrations.sae_lens",
        usage="%(prog)s SAE_REGEX BLOCK_REGEX [options of sae_lens.evals] [options below]",
        description="sae_lens.evals with a faithfulness certificate in every result.",
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("certificate")
    group.add_argument(
        "-h", "--help", action="store_true", help="show both sets of options and exit"
    )
    for side, number in (("calibration", N_CALIBRATION), ("evaluation", N_EVALUATION)):
        group.add_argument(
            f"--n_{side}_sequences",
            type=int,
            default=number,
            metavar="INT",
            help=f"{side} sequences to draw from each store",
        )
    group.add_argument(
        "--one_document_per_row",
        action="store_true",
        help="assert that each row of a pre-tokenised dataset is one document",
    )
    group.add_argument(
        "--certificates_dir",
        help="folder for manifests and evidence, one folder in it for each SAE and set of documents",
    )
    group.add_argument(
        "--stop_on_refusal",
        action="store_true",
        help="end when an SAE cannot be certified, in place of recording the reason",
    )
    # Progress bars come with SAELens's --verbose.
    add_settings(parser, {"progress": False})
    return parser
