"""Which sequences are measured: a random sample that does not look at their content.

Measuring every token would cost an encoder for each forward. A sample of sequences leaves the test
valid, as long as it is drawn without regard to what the sequences contain; the alarm then comes after as
many *measured* sequences as ever, so later by the inverse of the share.

The default share is computed from counts of multiplications, not from timings: the same certificate
gives the same sample on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saelens_certify.saes import SAEAdapter
from saelens_certify.saes.fused import FusedAdapter

COST = 0.05
"""Share of a forward's time that the monitor may cost by default."""

# Room for an encoder's product that runs at half the model's speed, and for what is not counted:
# decoding, statistics and the hook itself. `benchmarks.monitor_cost` measures what comes of it.
_MARGIN = 0.5

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def default_share(manifest: dict[str, Any], encoder_products: int = 1) -> float:
    """Return the share of sequences to measure so that this costs less than 5 % of a forward.

    Args:
        manifest: The certificate's manifest: sizes of model and SAE.
        encoder_products: Products with the encoder's matrix per token.

    Returns:
        At most 1. A forward multiplies once per token with each parameter that is not an
        embedding. For models with experts, of which few are used, give a share yourself.
    """
    model, sae = manifest["model"], manifest["sae"]
    embedding = model["d_model"] * model["d_vocab"]
    forward = max(model["n_parameters"] - embedding, embedding)
    encode = encoder_products * sae["d_in"] * sae["d_sae"]
    return min(1.0, _MARGIN * COST * forward / encode)


def encoder_products(adapter: SAEAdapter) -> int:
    """Count what encoding a token costs in products with the encoder's matrix.

    Two for AbsTopK, which is encoded once for each sign. SAEs that are encoded by their own code form
    dense activations and sort them: about four, where they are not iterative.
    """
    if not isinstance(adapter, FusedAdapter):
        return 4
    return 2 if adapter.signed else 1


def chosen(seed: int, first: int, n: int, share: float) -> NDArray[np.intp]:
    """Choose each of n sequences with probability ``share``, independently of the others.

    Args:
        seed: Seed of the monitor.
        first: Number of the first sequence, counted over the monitor's life.
        n: Number of sequences.
        share: In (0, 1].

    Returns:
        Places of the chosen ones among the n, ascending. A function of seed and number alone.
    """
    if share >= 1:
        return np.arange(n)
    # SplitMix64 (Steele, Lea & Flood, 2014) as a hash of the sequence's number.
    start = (seed * _MIX_1 + first + 1) * _GOLDEN % 2**64
    z = np.uint64(start) + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    z ^= z >> np.uint64(31)
    return np.flatnonzero(z < np.uint64(int(share * 2**64)))
