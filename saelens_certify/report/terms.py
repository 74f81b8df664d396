"""What the terms and bounds are called in front of people, in one place for table and figure."""

from __future__ import annotations

TERMS = {
    "risk_base": "measured risk of M",
    "risk_pool": "proxy risk (h_G)",
    "gap": "reconstruction gap",
    "mismatch": "pool mismatch (Δ·η)",
    "t_eta": "concentration: mismatch",
    "t_proxy": "concentration: proxy risk",
    "t_occ": "sparse complexity",
    "t_eps": "concentration: gap",
    "hoeffding_margin": "concentration",
}

BOUNDS = {
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
