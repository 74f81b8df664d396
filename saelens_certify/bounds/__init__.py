"""Upper confidence bounds on a language model's expected loss, from measured numbers alone.

Pure arithmetic and statistics on NumPy arrays: this folder knows neither torch nor models. One idea a file:

- ``loss``: range of the smoothed loss, uniform baseline. ``complexity``: number of pools.
- ``published``, ``preprint``: the certificates. ``planner``: sequences needed, floor.
- ``means``: per-sequence evidence to measured terms. ``clusters``: sequences that are not independent.
  ``statements``: bounds as typed statements.
- ``joint``: the variable whose mean bounds the risk of M. ``sharp``: the bounds that test it, ``significance``
  p-values, ``stopping`` when a run is decided, ``thresholds`` the pool's threshold chosen after looking.
- ``hoeffding``: the inequality behind all of the above. ``profile``: a bound as a function of N. ``growth``: all
  bounds as functions of N from the evidence of one run, and the first N at which they say something.
- ``betting``, ``concentration``, ``sequences``: upper confidence bounds of any bounded mean, for one number
  of samples or for all at once. ``wealth``: the mechanism of betting. ``samples``, ``times``: what they take.
- ``baselines``: the unigram model's risk, and whether it is beaten. ``kept``: the share of information kept.
  ``shuffle``: the SAE against random copies. ``pilot``, ``resampling``: how many sequences, from a pilot.
- ``exact``, ``rounding``, ``checks``, ``quantities``: arithmetic rounded upwards, input checks.

Upper confidence bounds share the signature (samples, low, high, delta).
Formulas, proofs and assumptions: docs/statistics.md.
"""

from saelens_certify.bounds.baselines import Risk, beats_baseline, risk_interval, risk_limit
from saelens_certify.bounds.betting import betting_sequence, betting_upper
from saelens_certify.bounds.clusters import cluster_means, cluster_order
from saelens_certify.bounds.complexity import log_binom
from saelens_certify.bounds.concentration import bernstein_upper, hoeffding_upper
from saelens_certify.bounds.growth import (
    Crossing,
    Growth,
    first_any_time,
    first_below,
    first_fixed,
    sharp_floor,
    sharp_growth,
)
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.kept import Kept, information_kept
from saelens_certify.bounds.loss import loss_cap, loss_range, uniform_baseline
from saelens_certify.bounds.means import Measured, mean_up
from saelens_certify.bounds.pilot import Plan, plan, plan_mean, plan_published
from saelens_certify.bounds.planner import asymptotic_floor, sequences_needed
from saelens_certify.bounds.preprint import preprint
from saelens_certify.bounds.published import published, published_terms
from saelens_certify.bounds.sequences import bernstein_sequence, hoeffding_sequence
from saelens_certify.bounds.sharp import SHARP, sharp_sequence, sharp_value
from saelens_certify.bounds.shuffle import ShuffleTest, permutation_p_value, shuffle_test
from saelens_certify.bounds.significance import betting_p_value, holm
from saelens_certify.bounds.statements import (
    Bound,
    certificates,
    sharp_certificates,
    with_assumptions,
)
from saelens_certify.bounds.stopping import Stop, first_stop, floor_sequence
from saelens_certify.bounds.thresholds import best_threshold, doubling_thresholds
from saelens_certify.bounds.times import log_times

__all__ = [
    "SHARP",
    "Bound",
    "Crossing",
    "Growth",
    "Kept",
    "Losses",
    "Measured",
    "Plan",
    "Risk",
    "ShuffleTest",
    "Stop",
    "asymptotic_floor",
    "beats_baseline",
    "bernstein_sequence",
    "bernstein_upper",
    "best_threshold",
    "betting_p_value",
    "betting_sequence",
    "betting_upper",
    "certificates",
    "cluster_means",
    "cluster_order",
    "doubling_thresholds",
    "first_any_time",
    "first_below",
    "first_fixed",
    "first_stop",
    "floor_sequence",
    "hoeffding_sequence",
    "hoeffding_upper",
    "holm",
    "information_kept",
    "log_binom",
    "log_times",
    "loss_cap",
    "loss_range",
    "mean_up",
    "permutation_p_value",
    "plan",
    "plan_mean",
    "plan_published",
    "preprint",
    "published",
    "published_terms",
    "risk_interval",
    "risk_limit",
    "sequences_needed",
    "sharp_certificates",
    "sharp_floor",
    "sharp_growth",
    "sharp_sequence",
    "sharp_value",
    "shuffle_test",
    "uniform_baseline",
    "with_assumptions",
]
