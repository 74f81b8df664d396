"""Whole measurements: both sides do the same task, whatever the shape."""

from __future__ import annotations

import pytest
import torch

from benchmarks.end_to_end import Bench, Task, run_ours, run_reference
from benchmarks.random_models import (
    GEMMA_2B,
    GPT2,
    LLAMA_3_8B,
    ModelShape,
    random_model,
    random_sae,
    random_tokens,
)
from benchmarks.reference_protocol import reference_evaluate, reference_permuted_losses
from benchmarks.session import Session
from benchmarks.whole_work import work_of
from saelens_certify.proxies import feature_permutation


@pytest.mark.parametrize("shape", [GPT2, GEMMA_2B, LLAMA_3_8B], ids=lambda shape: shape.title)
def test_random_models_are_of_the_shape_and_predict_something(shape: ModelShape) -> None:
    toy = shape.toy()
    model = random_model(toy)
    tokens = random_tokens(toy, 2, seed=0)
    logits = model(tokens).float()
    assert logits.shape == (2, 32, toy.settings["d_vocab"])
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    assert model.W_E.dtype == toy.dtype
    assert random_sae(toy, "blocks.1.hook_resid_pre").W_enc.dtype == toy.sae_dtype
    assert logits.equal(random_model(toy)(tokens).float())


def test_named_shapes_are_those_of_the_models() -> None:
    assert (GPT2.settings["n_layers"], GPT2.settings["d_model"], GPT2.d_sae) == (12, 768, 24576)
    assert GEMMA_2B.settings["d_vocab"] == 256000
    assert LLAMA_3_8B.settings["d_mlp"] == 14336
    for truncated in (GEMMA_2B, LLAMA_3_8B):
        assert f"{truncated.settings['n_layers']} of" in truncated.title


def test_both_sides_do_the_same_task() -> None:
    bench = Bench.of(Session("cpu", quick=True), GPT2)
    task = Task.of(bench, [3, 6], units=1)
    assert len(task.calibration) == 7 * len(task.evaluation)
    ours = run_ours(bench, task)
    for layer in (3, 6):
        counts, evidence = run_reference(bench, layer, task)
        assert ours[layer][0].sum() == counts.sum()
        columns = ours[layer][1]
        for name in ("loss_base", "loss_sae", "loss_pool"):
            theirs = getattr(evidence, name).double()
            assert torch.from_numpy(columns[name]).allclose(theirs, atol=1e-4)
        assert columns["violation"].tolist() == evidence.violation.tolist()


def test_the_work_of_a_measurement_is_what_it_multiplies() -> None:
    bench = Bench.of(Session("cpu", quick=True), GPT2)
    task = Task.of(bench, [3], units=1)
    model, sae = bench.model, bench.sae(3)
    weights = [*model.parameters(), *sae.parameters()]
    rest, encoder = work_of(lambda: run_ours(bench, task), weights, torch.float32, screened=True)
    calibrated, measured = task.calibration.numel(), task.evaluation.numel()
    d, predicted = model.cfg.d_model, measured * 31 // 32
    assert encoder.flops == 2 * d * sae.cfg.d_sae * (calibrated + measured)
    assert encoder.precision == "16bit"
    # Linear maps of a block, and scores and mixtures of attention over 32 positions.
    block = 2 * d * (4 * d + 2 * model.cfg.d_mlp) + 2 * 2 * 32 * d
    layers = model.cfg.n_layers
    blocks = 3 * calibrated + (layers + (layers - 3)) * measured
    head = 2 * 2 * d * model.cfg.d_vocab * predicted
    # One sequence violates the pool: its suffix, decoding and head come on top.
    assert 1.0 <= rest.flops / (block * blocks + head) < 1.3
    assert rest.n_bytes == sum(weight.nbytes for weight in weights)


def test_the_identity_permutation_is_the_sae_itself() -> None:
    bench = Bench.of(Session("cpu", quick=True), GPT2)
    task = Task.of(bench, [6], units=1)
    sae, tokens = bench.sae(6), task.evaluation
    permutations = torch.stack(
        [torch.arange(bench.shape.d_sae).int(), feature_permutation(bench.shape.d_sae, 0, 0)]
    )
    losses = reference_permuted_losses(bench.model, sae, permutations, tokens, k=8, batch_size=2)
    plain = reference_evaluate(bench.model, sae, task.pools[6].mask, tokens, k=8)
    assert losses.shape == (2, len(tokens))
    assert losses[0].allclose(plain.loss_sae, atol=1e-5)
    assert not losses[1].allclose(plain.loss_sae, atol=1e-3)
