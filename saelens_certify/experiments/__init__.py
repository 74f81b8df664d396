"""The experiments of arXiv:2606.18383, each one function: lists of settings over one engine.

Every function takes a model, SAEs and documents as `certify` does and returns an `Experiment`: a table, what it says, a
picture and the certificates behind it.
"""

from saelens_certify.experiments.amplification import error_amplification
from saelens_certify.experiments.bound_curves import bound_curves
from saelens_certify.experiments.fidelity import measure_fidelity, output_fidelity
from saelens_certify.experiments.layers import layer_experiment, layer_sweep
from saelens_certify.experiments.presets import PRESETS, run_preset
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.sensitivity import pool_preview, sensitivity
from saelens_certify.experiments.shift import RATES, distribution_shift
from saelens_certify.experiments.shuffling import feature_shuffling
from saelens_certify.experiments.tasks import PAPER_TASKS, downstream_tasks

__all__ = [
    "PAPER_TASKS",
    "PRESETS",
    "RATES",
    "Experiment",
    "Row",
    "bound_curves",
    "distribution_shift",
    "downstream_tasks",
    "error_amplification",
    "feature_shuffling",
    "layer_experiment",
    "layer_sweep",
    "measure_fidelity",
    "output_fidelity",
    "pool_preview",
    "run_preset",
    "sensitivity",
]
