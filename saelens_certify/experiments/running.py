"""What the experiments on several SAEs have in common: one setting, shared passes, results saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.certification import read_sides
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.naming import named_saes
from saelens_certify.experiments.result import Experiment
from saelens_certify.study import Setting, View, certify_many


def certify_saes(
    model: Any,
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    calibration: Any,
    evaluation: Any,
    config: CertifyConfig,
    output: str | Path | None,
    grid: Sequence[int] | None = None,
) -> dict[str, Certificate]:
    """Certify SAEs of one model under one setting, from one calibration pass and one evaluation pass.

    Args:
        model: As for `certify`.
        saes: SAEs by name; or a list of them, named by their hooks.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        config: Settings of every certificate.
        output: Folder of the runs.
        grid: Numbers of sequences that will be looked at; None: any.

    Returns:
        The certificates, by name.

    Raises:
        CertifyError: Before any long work, for no SAEs, or as `certify` raises.
    """
    opened = named_saes(saes)
    sides = [View(side) for side in read_sides(model, calibration, evaluation, config)]
    if grid is not None and min(grid) > len(sides[1].sequences):
        raise CertifyError(
            f"grid begins at {min(grid)}, and there are {len(sides[1].sequences)} evaluation sequences: give a smaller "
            "number, or more sequences"
        )
    settings = {name: Setting(sae, sides[0], sides[1], config) for name, sae in opened.items()}
    return certify_many(model, settings, output=output)


def saved(experiment: Experiment, output: str | Path | None) -> Experiment:
    """Save an experiment, if there is a folder for it, and return it."""
    if output is not None:
        experiment.save(output)
    return experiment
