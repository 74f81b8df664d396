"""What a command is about: which model, which SAEs, and which documents."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.config_check import check_configs
from saelens_certify.data import Sequences, load_documents, split
from saelens_certify.errors import CertifyError
from saelens_certify.models import DEMO, load_model
from saelens_certify.preparation import sequences_for
from saelens_certify.saes.checkpoint import check_dtype
from saelens_certify.saes.configurations import read_source
from saelens_certify.saes.loading import LoadedSAE, open_sae
from saelens_certify.saes.processing import common_arguments
from saelens_certify.saes.sources import SAESpec, matching, parse_spec, sae_folder, sae_folders


@dataclass(frozen=True)
class Target:
    """One SAE to be certified.

    Attributes:
        source: The SAE.
        output: Folder of its run.
    """

    source: Path | SAESpec
    output: Path


@dataclass(frozen=True)
class Inputs:
    """What the arguments of a command name.

    Attributes:
        model: The model.
        targets: The SAEs.
        calibration: Calibration sequences.
        evaluation: Evaluation sequences.
    """

    model: Any
    targets: list[Target]
    calibration: Sequences
    evaluation: Sequences

    def open(self, target: Target, options: argparse.Namespace) -> LoadedSAE:
        """Open one of the SAEs."""
        return open_sae(target.source, options.device, options.sae_dtype)


def add_run_arguments(run: argparse.ArgumentParser) -> None:
    """Add the arguments that name model, SAEs and documents, without the settings of the certificate."""
    run.add_argument(
        "--model",
        required=True,
        help=f"hub name, local Hugging Face folder, or '{DEMO}': then bundled SAEs and documents are the default",
    )
    run.add_argument(
        "--sae",
        help="'release/sae_id', 'owner/repository/folder', a folder with cfg.json, or a folder of such "
        "folders, each of which is certified into its own folder of --output",
    )
    run.add_argument(
        "--sae_regex_pattern",
        help="in place of --sae: certify every registered SAE whose release matches as a whole, each "
        "into its own folder of --output; all configurations are checked first",
    )
    run.add_argument(
        "--sae_block_pattern", help="with --sae_regex_pattern: what its id must match as a whole"
    )
    run.add_argument(
        "--sae_dtype", help="dtype to load SAEs in (default: that of their checkpoints)"
    )
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
    run.add_argument("--device", default="cpu", help="torch device of the model and the SAEs")
    run.add_argument("--llm_dtype", default="float32", help="dtype of the model's parameters")
    run.add_argument(
        "--output", type=Path, required=True, help="run's folder; resumed if it exists"
    )


def load_inputs(
    options: argparse.Namespace, config: CertifyConfig, only_one: str | None = None
) -> Inputs:
    """Load what the options name.

    What can be wrong is looked at before the model is loaded, and before any SAE's weights are.

    Args:
        options: Options of `add_run_arguments`.
        config: Settings.
        only_one: Why there may be one SAE only; None: any number.

    Raises:
        CertifyError: If something is missing or does not fit.
    """
    _fill_in_demo(options, only_one is not None)
    targets = chosen_saes(options)
    if only_one is not None and len(targets) > 1:
        raise CertifyError(f"{only_one} ({len(targets)} are named: {targets[0].source}, …)")
    check_documents(options)
    saes = [target.source for target in targets]
    check_configs(saes, None, config)
    model = load_model(
        options.model,
        model_class=options.model_class,
        device=options.device,
        dtype=options.llm_dtype,
        arguments=common_arguments({str(source): read_source(source)[0] for source in saes}),
    )
    check_configs(saes, model)
    return Inputs(model, targets, **read_documents(options, model, config))


def _fill_in_demo(options: argparse.Namespace, one: bool) -> None:
    """The bundled model comes with SAEs and documents."""
    if options.model != DEMO:
        return
    from saelens_certify import demo

    if options.sae is None and options.sae_regex_pattern is None:
        folder = demo.ASSETS / "saes"
        options.sae = str(folder / demo.DEFAULT_SAE if one else folder)


def _bundled_documents(options: argparse.Namespace) -> bool:
    """Whether the bundled model is to be measured on the bundled documents."""
    named = (options.data, options.calibration, options.evaluation)
    return options.model == DEMO and not any(named)


def chosen_saes(options: argparse.Namespace) -> list[Target]:
    """Return the SAEs that the command names.

    Raises:
        CertifyError: If it names none, or in two ways.
    """
    if options.sae_dtype is not None:
        check_dtype(options.sae_dtype)
    patterns = (options.sae_regex_pattern, options.sae_block_pattern)
    if (options.sae is None) == (None in patterns) or (options.sae and any(patterns)):
        raise CertifyError("give either --sae, or both --sae_regex_pattern and --sae_block_pattern")
    output = options.output
    if options.sae is None:
        return [Target(spec, output / spec.release / spec.sae_id) for spec in matching(*patterns)]
    root = Path(options.sae)
    if not root.is_dir():
        return [Target(parse_spec(options.sae), output)]
    folders = sae_folders(root)
    if len(folders) < 2:
        return [Target(sae_folder(folders[0] if folders else root), output)]
    return [Target(folder, output / folder.relative_to(root)) for folder in folders]


def check_documents(options: argparse.Namespace) -> None:
    """Check that the documents are named in one way and can be opened.

    Raises:
        CertifyError: If not.
    """
    if _bundled_documents(options):
        return
    sides = (options.calibration, options.evaluation)
    if (options.data is None) == (None in sides) or (options.data is not None and any(sides)):
        raise CertifyError("give either --data, or both --calibration and --evaluation")
    if not 0 < options.calibration_share < 1:
        raise CertifyError(
            f"--calibration_share must lie between 0 and 1, got {options.calibration_share}"
        )
    for source in (options.data, *sides):
        if source is not None:
            load_documents(source, **_where(options))


def read_documents(
    options: argparse.Namespace, model: Any, config: CertifyConfig
) -> dict[str, Sequences]:
    """Cut the documents to sequences.

    Returns:
        Sequences of ``"calibration"`` and ``"evaluation"``.
    """
    if _bundled_documents(options):
        from saelens_certify import demo

        sides = {
            "calibration": demo.load_sequences("calibration", config.seq_len),
            "evaluation": demo.load_sequences("evaluation", config.seq_len),
        }
        few = options.limit
        return {
            name: side if few is None else side.canonical.take(min(few, len(side)))
            for name, side in sides.items()
        }
    read: dict[str, Any] = {**_where(options), "limit": options.limit}
    if options.data is not None:
        share = options.calibration_share
        sequences = sequences_for(model, options.data, config, **read)
        return split(sequences, [share, 1 - share], seed=config.seed)
    return {
        name: sequences_for(model, getattr(options, name), config, **read)
        for name in ("calibration", "evaluation")
    }


def _where(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "split": options.split,
        "revision": options.revision,
        "text_column": options.text_column,
    }
