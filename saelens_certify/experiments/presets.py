"""Run a published experiment by name: on its own models, or on others put in their place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelens_certify.certificate import Certificate
from saelens_certify.certification import sequences_for
from saelens_certify.config_check import check_configs
from saelens_certify.data import load_documents, split
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.amplification import error_amplification
from saelens_certify.experiments.bound_curves import bound_curves, bound_curves_experiment
from saelens_certify.experiments.fidelity import output_fidelity
from saelens_certify.experiments.layers import layer_sweep
from saelens_certify.experiments.published import (
    PRESETS,
    ModelSource,
    Preset,
    SAESource,
    find_preset,
)
from saelens_certify.experiments.result import Experiment
from saelens_certify.experiments.sensitivity import sensitivity
from saelens_certify.experiments.shift import distribution_shift
from saelens_certify.experiments.shuffling import feature_shuffling
from saelens_certify.experiments.tasks import downstream_tasks
from saelens_certify.models import DEMO, load_model
from saelens_certify.saes.configurations import read_source
from saelens_certify.saes.loading import LoadedSAE, open_sae
from saelens_certify.saes.processing import common_arguments
from saelens_certify.saes.sources import parse_spec, sae_folder

__all__ = ["PRESETS", "ModelSource", "Preset", "SAESource", "find_preset", "run_preset"]


@dataclass(frozen=True)
class _Ready:
    """A model that was loaded, with its SAEs and documents.

    Attributes:
        source: Where it came from.
        model: The model.
        saes: What `open_sae` returned, by name.
        sides: Keyword arguments of an experiment: the sequences of ``calibration`` and, where it takes any, of
            ``evaluation``.
    """

    source: ModelSource
    model: Any
    saes: dict[str, Any]
    sides: dict[str, Any]


def run_preset(
    name: str | Preset,
    *,
    model: Any = None,
    saes: Mapping[str, Any] | Sequence[Any] | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    calibration_sequences: int | None = None,
    evaluation_sequences: int | None = None,
    questions: int | None = None,
    tasks: Sequence[Any] | None = None,
    include_path: str | Path | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> dict[str, Experiment]:
    """Run a published experiment.

    Args:
        name: Of `PRESETS`, or a preset of one's own.
        model: What takes the place of all its models: a hub name, a folder, ``"demo"``, or a TransformerLens
            model. None: the published ones, one after another.
        saes: Its SAEs, by name or in a list. An experiment about one SAE is run for each of them.
        calibration: Calibration documents, as for `certify`, in place of the published data set; with the bundled
            model the default is the bundled documents.
        evaluation: Evaluation documents, given together with calibration.
        calibration_sequences: Number of calibration sequences in place of the published one; also if there are
            fewer documents.
        evaluation_sequences: The same of evaluation. Numbers that are shares of the documents follow; see
            `Preset.replaced`.
        questions: Number of questions of each task in place of the published one.
        tasks: Tasks in place of the published ones, as for `downstream_tasks`.
        include_path: A folder of further task files.
        device: Torch device of models that are loaded; None: a GPU if there is one.
        output: Folder of the results: one folder below it for each experiment. A run that was killed goes on where
            it stopped.
        **settings: Fields of `CertifyConfig` to set otherwise, such as ``progress`` or ``batch_tokens``.

    Returns:
        Experiments by ``<model>-<experiment>``; if an experiment takes one SAE and there are several,
        ``<model>-<experiment>-<SAE>``. Bound curves of several models are one experiment.

    Raises:
        CertifyError: Before any long work, for an unknown preset, or pieces that do not fit together.
    """
    preset = find_preset(name) if isinstance(name, str) else name
    preset = preset.replaced(
        model=model,
        saes=saes,
        calibration=calibration_sequences,
        evaluation=evaluation_sequences,
        questions=questions,
        tasks=tasks,
        **settings,
    )
    if isinstance(model, str) and model == DEMO and calibration is None and evaluation is None:
        calibration, evaluation = _bundled_documents(preset)
    _check_data(preset, calibration, evaluation)
    # All configurations are looked at before any weights are.
    for source in preset.models:
        check_configs([_bare(each.source) for each in source.saes.values()], None, preset.config)
    folder = None if output is None else Path(output)
    given = None if calibration is None else (calibration, evaluation)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Experiment] = {}
    curves: dict[str, Certificate] = {}
    grid: set[int] = set()
    for source in preset.models:
        ready = _ready(source, preset, given, device)
        sized = preset.replaced(
            calibration=len(ready.sides["calibration"]),
            evaluation=len(ready.sides["evaluation"]) if "evaluation" in ready.sides else None,
        )
        found = _RUN[preset.experiment](sized, ready, folder, include_path)
        for key, experiment in found.items():
            results[f"{source.slug}-{key}"] = experiment
        if preset.experiment == "bound_curves":
            curves |= _labelled(source, found["bound_curves"].certificates)
            grid |= set(sized.grid)
        del ready
        _release()
    if len(preset.models) > 1 and curves:
        joint = bound_curves_experiment(curves, sorted(grid))
        if folder is not None:
            joint.save(folder)
        results = {"bound_curves": joint}
    return results


def _curves(preset: Preset, ready: _Ready, folder: Path | None, _: Any) -> dict[str, Experiment]:
    place = _below(folder, ready, "bound_curves")
    found = bound_curves(
        ready.model, ready.saes, **ready.sides, grid=preset.grid, config=preset.config, output=place
    )
    return {"bound_curves": found}


def _layers(preset: Preset, ready: _Ready, folder: Path | None, _: Any) -> dict[str, Experiment]:
    place = _below(folder, ready, "layer_sweep")
    sweep = layer_sweep(
        ready.model, ready.saes, **ready.sides, grid=preset.grid, config=preset.config, output=place
    )
    if not preset.fidelity:
        return {"layer_sweep": sweep}
    fidelity = output_fidelity({name: sweep.certificates[name] for name in preset.fidelity})
    if folder is not None:
        fidelity.save(folder / f"{ready.source.slug}-output_fidelity")
    return {"layer_sweep": sweep, "output_fidelity": fidelity}


def _amplification(
    preset: Preset, ready: _Ready, folder: Path | None, _: Any
) -> dict[str, Experiment]:
    found = error_amplification(
        ready.model,
        ready.saes,
        **ready.sides,
        horizons=preset.horizons,
        config=preset.config,
        output=_below(folder, ready, "error_amplification"),
    )
    return {"error_amplification": found}


def _shuffling(preset: Preset, ready: _Ready, folder: Path | None, _: Any) -> dict[str, Experiment]:
    return _one_by_one(
        ready,
        folder,
        "feature_shuffling",
        lambda sae, place: feature_shuffling(
            ready.model,
            sae,
            **ready.sides,
            permutations=preset.permutations,
            config=preset.config,
            output=place,
        ),
    )


def _sensitivity(
    preset: Preset, ready: _Ready, folder: Path | None, _: Any
) -> dict[str, Experiment]:
    return _one_by_one(
        ready,
        folder,
        "sensitivity",
        lambda sae, place: sensitivity(
            ready.model,
            sae,
            **ready.sides,
            ks=preset.ks,
            budget_tokens=preset.budget_tokens,
            taus=preset.taus,
            config=preset.config,
            output=place,
        ),
    )


def _shift(preset: Preset, ready: _Ready, folder: Path | None, _: Any) -> dict[str, Experiment]:
    return _one_by_one(
        ready,
        folder,
        "distribution_shift",
        lambda sae, place: distribution_shift(
            ready.model, sae, **ready.sides, rates=preset.rates, config=preset.config, output=place
        ),
    )


def _tasks(
    preset: Preset, ready: _Ready, folder: Path | None, include_path: Any
) -> dict[str, Experiment]:
    return _one_by_one(
        ready,
        folder,
        "downstream_tasks",
        lambda sae, place: downstream_tasks(
            ready.model,
            sae,
            calibration=ready.sides["calibration"],
            tasks=preset.tasks,
            config=preset.config,
            limit=preset.questions,
            include_path=include_path,
            output=place,
        ),
    )


_RUN: dict[str, Callable[[Preset, _Ready, Path | None, Any], dict[str, Experiment]]] = {
    "bound_curves": _curves,
    "layer_sweep": _layers,
    "error_amplification": _amplification,
    "feature_shuffling": _shuffling,
    "sensitivity": _sensitivity,
    "distribution_shift": _shift,
    "downstream_tasks": _tasks,
}


def _one_by_one(
    ready: _Ready,
    folder: Path | None,
    experiment: str,
    run: Callable[[Any, Path | None], Experiment],
) -> dict[str, Experiment]:
    """Run an experiment about one SAE for each of them."""
    found: dict[str, Experiment] = {}
    for name, sae in ready.saes.items():
        key = experiment if len(ready.saes) == 1 else f"{experiment}-{name}"
        found[key] = run(sae, _below(folder, ready, key))
    return found


def _below(folder: Path | None, ready: _Ready, key: str) -> Path | None:
    return None if folder is None else folder / f"{ready.source.slug}-{key}"


def _bundled_documents(preset: Preset) -> list[Any]:
    from saelens_certify import demo

    return [demo.load_sequences(s, preset.config.seq_len) for s in ("calibration", "evaluation")]


def _check_data(preset: Preset, calibration: Any, evaluation: Any) -> None:
    """Check that documents are given for both sides or neither, and that named ones can be opened.

    Raises:
        CertifyError: If not.
    """
    needed = preset.evaluation_sequences > 0
    if calibration is None and evaluation is not None:
        raise CertifyError("evaluation= goes with calibration=: give both, or neither")
    if calibration is not None and evaluation is None and needed:
        raise CertifyError("calibration= goes with evaluation=: give both, or neither")
    for data in (calibration, evaluation):
        if isinstance(data, (str, Path)):
            load_documents(data)


def _ready(source: ModelSource, preset: Preset, given: Any, device: str) -> _Ready:
    """Load a model, its SAEs and its documents."""
    sources = {name: each.source for name, each in source.saes.items()}
    model = source.model
    if isinstance(model, (str, Path)):
        arguments = common_arguments({name: _settings(each) for name, each in sources.items()})
        model = load_model(str(model), device=device, dtype=source.dtype, arguments=arguments)
    check_configs(map(_bare, sources.values()), model)
    config, numbers = preset.config, (preset.calibration_sequences, preset.evaluation_sequences)
    if given is None:
        read = sequences_for(model, preset.dataset, config, split=preset.split, limit=sum(numbers))
        sides = split(read, counts=numbers, seed=config.seed)
    else:
        sides = {
            side: sequences_for(model, data, config, limit=n)
            for side, data, n in zip(("calibration", "evaluation"), given, numbers, strict=True)
            if n
        }
    used = {side: sequences for side, sequences in sides.items() if len(sequences)}
    saes = {name: open_sae(each, device) for name, each in sources.items()}
    return _Ready(source, model, saes, used)


def _settings(source: Any) -> Any:
    """Return the configuration of an SAE, without its weights."""
    if isinstance(source, (str, Path)):
        source = sae_folder(source) if Path(source).is_dir() else parse_spec(str(source))
        return read_source(source)[0]
    return _bare(source).cfg


def _bare(source: Any) -> Any:
    return source.sae if isinstance(source, LoadedSAE) else source


def _labelled(
    source: ModelSource, certificates: Mapping[str, Certificate]
) -> dict[str, Certificate]:
    """Name the certificates of one model beside those of others."""
    if len(certificates) == 1:
        return {source.label: next(iter(certificates.values()))}
    return {f"{source.label}, {name}": one for name, one in certificates.items()}


def _release() -> None:
    """Give the memory of a model back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
