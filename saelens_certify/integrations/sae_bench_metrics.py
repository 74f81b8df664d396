"""Title and description of every number in a certificate."""

from __future__ import annotations

SHOWN = frozenset(
    {"u_sae", "u_sae_occam", "baseline_uniform", "baseline_unigram", "gap", "eta", "l0"}
)
"""The numbers that a user interface shows first."""

_BITS = "bits per token"

METRICS: dict[str, tuple[str, str]] = {
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
