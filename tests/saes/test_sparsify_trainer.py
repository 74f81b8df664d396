"""Sparse coders trained by sparsify's own trainer (package ``eai-sparsify``)."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from engine.builders import make_tokens

from saelens_certify.saes import load_sparsify
from saes.sparsify_files import SparseCoder
from saes.test_sparsify_hooks import activations, hookpoints, models


def train(family: str, folder: Path, **settings: Any) -> Path:
    """Train on all hookpoints of a tiny model; return the run's folder."""
    from datasets import Dataset

    sparsify: Any = importlib.import_module("sparsify")
    tokens = make_tokens(512, seed=3)
    precision = torch.get_float32_matmul_precision()
    try:
        sparsify.Trainer(
            sparsify.TrainConfig(
                sparsify.SparseCoderConfig(expansion_factor=8, k=8, **settings),
                batch_size=8,
                lr=1e-2,
                hookpoints=hookpoints(family),
                log_to_wandb=False,
                run_name="run",
                save_dir=str(folder),
            ),
            Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"),
            copy.deepcopy(models(family)[0]),
        ).fit()
    finally:
        torch.set_float32_matmul_precision(precision)  # which the trainer changes for the process
    return folder / "run"


def check_trained(family: str, folder: Path, **settings: Any) -> None:
    run = train(family, folder, **settings)
    for hookpoint in hookpoints(family):
        sae = load_sparsify(run / hookpoint)
        theirs = SparseCoder.load_from_disk(run / hookpoint)
        metadata = sae.cfg.metadata
        hooks = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
        x, y = (t.flatten(0, 1) for t in activations(models(family)[1], *hooks))
        with torch.no_grad():
            found, expected = sae(x), theirs(x, y)
        torch.testing.assert_close(found, expected.sae_out, atol=1e-4, rtol=1e-4)
        # At another hook, or with the wrong bias, it explains nothing.
        variance = (y - y.mean(dim=0)).square().sum()
        assert (found - y).square().sum() / variance < 0.95
        shifted = load_sparsify(run / hookpoint)
        shifted.b_dec.data.zero_()
        assert (shifted(x) - y).square().sum() > (found - y).square().sum()


def test_trained_autoencoders(tmp_path: Path) -> None:
    check_trained("pythia", tmp_path, activation="groupmax")
    check_trained("gpt2", tmp_path / "topk")


def test_trained_transcoders(tmp_path: Path) -> None:
    check_trained("gpt2", tmp_path, transcode=True, skip_connection=True)
    check_trained("pythia", tmp_path / "plain", transcode=True)
