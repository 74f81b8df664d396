"""The published protocol, written plainly with SAELens and TransformerLens calls.

This is what the speed ratios are taken against: whole forwards, dense features, ``torch.topk``, a
dense decode and a full softmax, in batches of 16 sequences of 32 tokens as published
(arXiv:2606.18383; the authors' scripts) or of any other size. It is written as a competent user of the
two libraries would write it: inference mode, nothing computed that is not used, no per-token loops.

``python -m benchmarks.reference_protocol`` times it, in tokens per second.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

PUBLISHED_BATCH = 16
PUBLISHED_LENGTH = 32


@dataclass(frozen=True)
class ReferenceEvidence:
    """What the published protocol measures on each evaluation sequence."""

    loss_base: Float[Tensor, " sequences"]
    loss_sae: Float[Tensor, " sequences"]
    loss_pool: Float[Tensor, " sequences"]
    violation: Bool[Tensor, " sequences"]


def keep_topk(
    features: Float[Tensor, "batch pos d_sae"], k: int | None
) -> Float[Tensor, "batch pos d_sae"]:
    """Return the features with all but the ``k`` largest of each token set to zero (None: as is)."""
    if k is None or k >= features.shape[-1]:
        return features
    values, indices = features.topk(k, dim=-1)
    return torch.zeros_like(features).scatter_(-1, indices, values)


def smoothed_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], alpha: float
) -> Float[Tensor, " batch"]:
    """Return the mean of -log2((1 - alpha) p(target) + alpha / V) of each sequence, in bits."""
    probabilities = logits.softmax(dim=-1)
    gold = probabilities[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -torch.log2((1 - alpha) * gold + alpha / logits.shape[-1]).mean(dim=-1)


@torch.inference_mode()
def reference_calibrate(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences pos"],
    k: int | None = 64,
    batch_size: int = PUBLISHED_BATCH,
) -> Int[Tensor, " d_sae"]:
    """Count the calibration tokens in which each feature is selected.

    Args:
        model: HookedTransformer or TransformerBridge.
        sae: The SAE; its metadata names the hook.
        tokens: Token ids, whole sequences without pads.
        k: Features kept per token, as published; None keeps the SAE's own code.
        batch_size: Sequences a forward.

    Returns:
        Counts over tokens; the published pool is ``counts > 0``.
    """
    hook_name = sae.cfg.metadata.hook_name
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=tokens.device)
    for batch in tokens.split(batch_size):
        _, cache = model.run_with_cache(batch, names_filter=[hook_name])
        selected = keep_topk(sae.encode(cache[hook_name]), k)
        counts += (selected > 0).sum(dim=(0, 1))
    return counts


@torch.inference_mode()
def reference_evaluate(
    model: Any,
    sae: SAE[Any],
    pool: Bool[Tensor, " d_sae"],
    tokens: Int[Tensor, "sequences pos"],
    k: int | None = 64,
    batch_size: int = PUBLISHED_BATCH,
    alpha: float = 0.5,
) -> ReferenceEvidence:
    """Measure M, S∘M and h_G on evaluation sequences: three whole forwards a batch.

    Args:
        model: HookedTransformer or TransformerBridge.
        sae: The SAE; its metadata names the hook.
        pool: Features that h_G may use.
        tokens: Token ids, whole sequences without pads.
        k: Features kept per token, as published; None keeps the SAE's own code.
        batch_size: Sequences a forward.
        alpha: Smoothing of the loss.

    Returns:
        One entry per sequence and column.
    """
    hook_name = sae.cfg.metadata.hook_name
    columns: dict[str, list[Tensor]] = {
        "loss_base": [],
        "loss_sae": [],
        "loss_pool": [],
        "violation": [],
    }

    def loss_with(reconstruction: Tensor, batch: Tensor) -> Tensor:
        def splice(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - passed by name
            return reconstruction

        logits = model.run_with_hooks(batch, fwd_hooks=[(hook_name, splice)])
        return smoothed_loss(logits, batch, alpha)

    for batch in tokens.split(batch_size):
        logits, cache = model.run_with_cache(batch, names_filter=[hook_name])
        columns["loss_base"].append(smoothed_loss(logits, batch, alpha))
        del logits
        features = sae.encode(cache[hook_name])
        selected = keep_topk(features, k)
        columns["loss_sae"].append(loss_with(sae.decode(selected), batch))
        restricted = keep_topk(features * pool, k)
        columns["loss_pool"].append(loss_with(sae.decode(restricted), batch))
        columns["violation"].append(((selected > 0) & ~pool).any(dim=-1).any(dim=-1))
    return ReferenceEvidence(**{name: torch.cat(parts) for name, parts in columns.items()})


@torch.inference_mode()
def reference_permuted_losses(
    model: Any,
    sae: SAE[Any],
    permutations: Int[Tensor, "permutations d_sae"],
    tokens: Int[Tensor, "sequences pos"],
    k: int | None = 64,
    batch_size: int = PUBLISHED_BATCH,
    alpha: float = 0.5,
) -> Float[Tensor, "permutations sequences"]:
    """Measure the loss when feature j is decoded as ``permutations[r][j]``: a whole forward for each.

    Args:
        model: HookedTransformer or TransformerBridge.
        sae: The SAE; its metadata names the hook.
        permutations: One permutation of the features per row.
        tokens: Token ids, whole sequences without pads.
        k: Features kept per token, as published; None keeps the SAE's own code.
        batch_size: Sequences a forward.
        alpha: Smoothing of the loss.

    Returns:
        One loss per permutation and sequence.
    """
    hook_name = sae.cfg.metadata.hook_name
    losses: list[Tensor] = []
    for batch in tokens.split(batch_size):
        _, cache = model.run_with_cache(batch, names_filter=[hook_name], return_type=None)
        selected = keep_topk(sae.encode(cache[hook_name]), k)
        of_batch = []
        for permutation in permutations.long():
            shuffled = torch.zeros_like(selected).index_copy_(-1, permutation, selected)
            reconstruction = sae.decode(shuffled)

            def splice(activation: Tensor, hook: Any, put: Tensor = reconstruction) -> Tensor:  # noqa: ARG001
                return put

            logits = model.run_with_hooks(batch, fwd_hooks=[(hook_name, splice)])
            of_batch.append(smoothed_loss(logits, batch, alpha))
        losses.append(torch.stack(of_batch))
    return torch.cat(losses, dim=1)


def tokens_per_second(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences pos"],
    k: int | None,
    batch_size: int,
    repeats: int = 3,
) -> tuple[float, float]:
    """Return median tokens per second of calibration and of evaluation, after one warm-up batch."""
    counts = reference_calibrate(model, sae, tokens[:batch_size], k, batch_size)

    def timed(run: Any) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return tokens.numel() / sorted(seconds)[len(seconds) // 2]

    calibration = timed(lambda: reference_calibrate(model, sae, tokens, k, batch_size))
    evaluation = timed(lambda: reference_evaluate(model, sae, counts > 0, tokens, k, batch_size))
    return calibration, evaluation


def main(argv: list[str] | None = None) -> None:
    """Time the protocol and print tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=["gpt2-shape", "smollm2"], default="gpt2-shape")
    parser.add_argument("--sae", help="folder of a SAELens SAE (needed with --model smollm2)")
    parser.add_argument("--layer", type=int, default=6, help="layer of the gpt2-shape SAE")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[PUBLISHED_BATCH, 64])
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)
    if args.model == "smollm2":
        from benchmarks.smollm2.model import load_smollm2

        if args.sae is None:
            parser.error("--model smollm2 needs --sae: a folder written by benchmarks.smollm2")
        model: Any = load_smollm2("HookedTransformer")
        sae: SAE[Any] = SAE.load_from_disk(args.sae)
    else:
        from benchmarks.random_models import GPT2, random_model, random_sae

        model = random_model(GPT2)
        sae = random_sae(GPT2, f"blocks.{args.layer}.hook_resid_pre")
    generator = torch.Generator().manual_seed(0)
    shape = (args.sequences, PUBLISHED_LENGTH)
    tokens = torch.randint(0, model.cfg.d_vocab, shape, generator=generator)
    for batch_size in args.batch_sizes:
        calibration, evaluation = tokens_per_second(model, sae, tokens, args.k, batch_size)
        print(
            f"batch {batch_size:4d} x {PUBLISHED_LENGTH}: calibration {calibration:8.0f} tokens/s, "
            f"evaluation {evaluation:8.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
