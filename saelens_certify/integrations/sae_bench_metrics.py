"""Title and description of every number in a certificate."""

from __future__ import annotations

SHOWN = frozenset(
    {
        "sharp_betting",
        "u_sae",
        "u_sae_occam",
        "baseline_uniform",
        "baseline_unigram",
        "gap",
        "eta",
        "l0",
    }
)
"""The numbers that a user interface shows first."""

OPTIONAL = frozenset({"u_sae", "u_sae_occam", "direct_base", "direct_pool", "preprint"}) | {
    f"kept_{proxy}_{baseline}{end}"
    for proxy in ("sae", "pool")
    for baseline in ("unigram", "uniform")
    for end in ("", "_lower", "_upper")
}
"""The numbers that a run which could stop early does not have, and shares of an advantage that may not exist."""

_BITS = "bits per token"

_COPIES = {
    "permuted": ("features shuffled", "copies in which features are shuffled"),
    "matched": (
        "features shuffled within frequency",
        "copies in which features are shuffled within deciles of activation frequency",
    ),
    "random_decoder": ("random decoders", "random decoders with the same norms"),
    "random_unit_decoder": ("random unit decoders", "random decoders whose rows have norm 1"),
}

SHUFFLE_METRICS: dict[str, tuple[str, str]] = {
    f"shuffle_{name.format(kind)}": (f"{title}, {short}", text.format(copies=copies))
    for kind, (short, copies) in _COPIES.items()
    for name, title, text in (
        (
            "p_value_{}",
            "Shuffle test",
            "Exact p-value (1 + b) / (1 + R): b of R {copies} have a gap at most that of the SAE.",
        ),
        (
            "effect_{}",
            "Shuffle effect",
            f"Mean gap of {{copies}} minus that of the SAE, {_BITS}.",
        ),
        (
            "effect_{}_lower",
            "Shuffle effect, lower limit",
            f"Lower confidence limit of the mean gap of {{copies}} minus that of the SAE, {_BITS}.",
        ),
        (
            "effect_{}_upper",
            "Shuffle effect, upper limit",
            f"Upper confidence limit of the mean gap of {{copies}} minus that of the SAE, {_BITS}.",
        ),
        (
            "share_{}",
            "Shuffle effect, share",
            "Effect divided by the larger of the mean gap of {copies} and the gap of the SAE.",
        ),
    )
}
"""Numbers of the shuffle tests, where controls of that kind were measured."""

METRICS: dict[str, tuple[str, str]] = {
    "sharp_betting": (
        "Sharp bound",
        f"Upper bound on the model's expected smoothed loss by way of the SAE, {_BITS}: one betting test of "
        "proxy risk, gap and mismatch together. The headline.",
    ),
    "sharp_bernstein": (
        "Sharp bound (Bernstein)",
        f"The same by the empirical Bernstein inequality, {_BITS}.",
    ),
    "sharp_occam": (
        "Sharp bound for all pools",
        f"The same by betting for all pools of this size at once, {_BITS}.",
    ),
    "sharp_occam_tau": (
        "Sharp bound for all pools, best threshold",
        f"The smallest of these over several pool thresholds, the choice paid for, {_BITS}.",
    ),
    "sharp_measured": (
        "Sharp bound with measured mismatch",
        f"The same by betting, with |loss(S∘M) - loss(h_G)| in place of the charge for violations, {_BITS}.",
    ),
    "sharp_direct_base": (
        "Sharp direct bound on M",
        f"Upper bound on the model's expected smoothed loss without any SAE, by betting, {_BITS}.",
    ),
    "sharp_direct_sae": (
        "Sharp direct bound on S∘M",
        f"Upper bound on the expected smoothed loss with the SAE spliced in, by betting, {_BITS}.",
    ),
    "sharp_direct_pool": (
        "Sharp direct bound on h_G",
        f"Upper bound on the expected smoothed loss of the pool-restricted proxy, by betting, {_BITS}.",
    ),
    "sharp_unigram": (
        "Sharp bound against the unigram model",
        f"Upper bound on the model's risk by way of the SAE minus that of the unigram model, {_BITS}; "
        "negative: the unigram model is beaten with confidence.",
    ),
    "excess_sae": (
        "Faithfulness gap",
        f"Upper bound on R(S∘M) - R(M), what splicing in the SAE loses, {_BITS}.",
    ),
    "excess_pool": (
        "Faithfulness gap of h_G",
        f"Upper bound on R(h_G) - R(M), what the pool-restricted proxy loses, {_BITS}.",
    ),
    **{
        f"excess_{proxy}_two_sided{end}": (
            f"Faithfulness gap of {name}, two-sided, {side}",
            f"{side.capitalize()} end of the interval for R({name}) - R(M), {_BITS}.",
        )
        for proxy, name in (("sae", "S∘M"), ("pool", "h_G"))
        for end, side in (("", "upper"), ("_lower", "lower"))
    },
    "u_sae": (
        "U_SAE",
        f"Upper bound on the model's expected smoothed loss by way of the SAE, {_BITS}; the pool of "
        "features is fixed by calibration documents.",
    ),
    "u_sae_occam": (
        "U_SAE+Occam",
        f"The same for all pools of this size at once, {_BITS}; the published headline.",
    ),
    "direct_base": (
        "Direct bound on M",
        f"Upper bound on the model's expected smoothed loss without any SAE, {_BITS}.",
    ),
    "direct_pool": (
        "Direct bound on h_G",
        f"Upper bound on the expected smoothed loss of the pool-restricted proxy, {_BITS}.",
    ),
    "preprint": ("Preprint bound", f"Arithmetic of the first arXiv version, {_BITS}."),
    "risk_base": ("Risk of M", f"Mean smoothed loss of the model, {_BITS}."),
    "risk_sae": ("Risk of the proxy", f"Mean smoothed loss with the SAE spliced in, {_BITS}."),
    "risk_pool": (
        "Risk of h_G",
        f"Mean smoothed loss with the SAE restricted to features seen in calibration, {_BITS}.",
    ),
    "gap": (
        "Reconstruction gap",
        f"Mean absolute difference of a sequence's loss with and without the SAE, {_BITS}.",
    ),
    "eta": ("Pool mismatch", "Share of sequences that need a feature calibration never saw."),
    "n_sequences": ("Sequences", "Number of evaluation sequences."),
    "vocab_size": ("Vocabulary", "Number of tokens of the model's vocabulary, V."),
    "dict_size": ("Features", "Number of features of the SAE, m."),
    "pool_size": ("Pool", "Number of features in the pool, P."),
    "alpha": ("Alpha", "Smoothing weight of the loss."),
    "delta": ("Delta", "Failure probability of each bound."),
    "loss_range": ("Loss range", f"Largest minus smallest possible loss, {_BITS}."),
    "log_binom": ("Log binomial", "Natural logarithm of the number of pools of this size."),
    "baseline_uniform": ("Uniform guess", f"Loss of a uniform guess, log2 V, {_BITS}."),
    "baseline_unigram": (
        "Unigram model",
        f"Mean smoothed loss of the calibration documents' unigram model, {_BITS}.",
    ),
    **{
        f"baseline_unigram_{side}": (
            f"Unigram model, {side} limit",
            f"{side.capitalize()} confidence limit of the unigram model's risk, {_BITS}.",
        )
        for side in ("lower", "upper")
    },
    **{
        f"kept_{proxy}_{baseline}{end}": (
            f"Information kept by {name}, over {baseline}{which}",
            f"Share of the model's advantage over the {baseline} baseline that {name} keeps{what}.",
        )
        for proxy, name in (("sae", "S∘M"), ("pool", "h_G"))
        for baseline in ("unigram", "uniform")
        for end, which, what in (
            ("", "", ", as measured"),
            ("_lower", ", lower limit", "; lower confidence limit"),
            ("_upper", ", upper limit", "; upper confidence limit"),
        )
    },
    "kl": ("KL divergence", f"Mean KL(M || S∘M), {_BITS}."),
    "top1_agreement": ("Top-1 agreement", "Share of positions with the same likeliest token."),
    "gold_logprob_gap": (
        "Gold log-probability gap",
        f"Mean absolute difference of the target's log2-probability, {_BITS}.",
    ),
    "l0": ("L0", "Mean number of active features per token."),
    "explained_variance": (
        "Explained variance",
        "Share of the activation's variance that the SAE explains, around the calibration mean.",
    ),
    "explained_variance_no_first": (
        "Explained variance without position 0",
        "The same without the first position, an outlier in many models.",
    ),
}
