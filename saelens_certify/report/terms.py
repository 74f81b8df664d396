"""What the terms and bounds are called in front of people, in one place for table and figure."""

from __future__ import annotations

import re
from collections.abc import Mapping

TERMS = {
    "risk_base": "measured risk of M",
    "risk_pool": "proxy risk (h_G)",
    "risk_sae": "measured risk of S∘M",
    "gap": "reconstruction gap",
    "mismatch": "pool mismatch (Δ·η)",
    "t_eta": "concentration: mismatch",
    "t_proxy": "concentration: proxy risk",
    "t_occ": "sparse complexity",
    "t_eps": "concentration: gap",
    "hoeffding_margin": "concentration",
    "mismatch_measured": "pool mismatch (measured)",
    "t_sharp": "concentration: all at once",
}

BOUNDS = {
    "sharp_betting": "sharp (betting)",
    "sharp_bernstein": "sharp (empirical Bernstein)",
    "sharp_occam": "sharp, all pools",
    "sharp_occam_tau": "sharp, all pools, best τ",
    "sharp_measured": "sharp, mismatch measured",
    "sharp_direct_base": "sharp direct bound on M",
    "sharp_direct_sae": "sharp direct bound on S∘M",
    "sharp_direct_pool": "sharp direct bound on h_G",
    "sharp_unigram": "R(M) − R(unigram) at most",
    "excess_sae": "R(S∘M) − R(M) at most",
    "excess_pool": "R(h_G) − R(M) at most",
    "excess_sae_two_sided": "R(S∘M) − R(M) between",
    "excess_pool_two_sided": "R(h_G) − R(M) between",
    "u_sae": "U_SAE",
    "u_sae_occam": "U_SAE+Occam",
    "direct_base": "direct bound on M",
    "direct_pool": "direct bound on h_G",
    "preprint": "preprint (v1) variant",
}

CONTROLS = {
    "permuted": "shuffled features",
    "matched": "shuffled within frequency",
    "random_decoder": "random decoder",
    "random_unit_decoder": "random unit decoder",
}


def term_label(name: str) -> str:
    """Return a term's name for people."""
    return TERMS.get(name, name)


def bound_label(name: str) -> str:
    """Return a bound's name for people."""
    return BOUNDS.get(name, name)


def control_label(name: str) -> str:
    """Return a control's name for people."""
    kind, _, index = name.rpartition("_")
    return f"{CONTROLS[kind]} ({index})" if kind in CONTROLS else name.replace("_", " ")


def layer_of(hook: str) -> int | None:
    """Return the block in which a hook is: the layer that people speak of; None for one outside all blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    return int(match.group(1)) if match else None


def shortened(label: str, most: int = 20) -> str:
    """Return a label with its middle left out, if it is longer than an axis bears."""
    if len(label) <= most:
        return label
    end = (most - 1) // 2
    return f"{label[: most - 1 - end]}…{label[-end:]}"


def sae_labels(hooks: Mapping[str, str]) -> dict[str, str]:
    """Return what SAEs are called beside each other.

    Args:
        hooks: The output hook of each SAE, by name.

    Returns:
        ``layer 6`` by name, where SAEs are named by their hooks and are at different layers; else the names.
    """
    layers = {layer_of(hook) for hook in hooks.values()}
    named_by_hook = all(name == hook for name, hook in hooks.items())
    if not named_by_hook or None in layers or len(layers) < len(hooks):
        return {name: name for name in hooks}
    return {name: f"layer {layer_of(hook)}" for name, hook in hooks.items()}
