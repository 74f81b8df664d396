"""One model with its SAEs, and the same task done by ours and by the published protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_models import ModelShape, random_model, random_sae, random_tokens
from benchmarks.reference_protocol import (
    PUBLISHED_BATCH,
    ReferenceEvidence,
    keep_topk,
    reference_calibrate,
    reference_evaluate,
)
from benchmarks.session import Session
from saelens_certify.config import CertifyConfig
from saelens_certify.forward import ForwardEngine, choose_strategy
from saelens_certify.measure import Columns, calibrate, measure
from saelens_certify.pool import Calibration, Pool
from saelens_certify.proxies import variants_of
from saelens_certify.saes import Coding, SAEAdapter, adapt
from saelens_certify.subject import Reader, Subject

K = 64
RATIO_OF_TOKENS = 7


@dataclass(frozen=True)
class Bench:
    """A model with the engine that measures it."""

    shape: ModelShape
    session: Session

    @classmethod
    def of(cls, session: Session, shape: ModelShape) -> Bench:
        """Return the bench of a model; only the latest model is kept."""
        sized = shape.toy() if session.quick else shape
        return session.keep(f"model {shape.title}", "bench", lambda: cls(sized, session))

    @cached_property
    def model(self) -> Any:
        """The model, weights random."""
        return random_model(self.shape)

    @cached_property
    def engine(self) -> ForwardEngine:
        """The engine with the strategy that `certify` would choose."""
        probe = random_tokens(self.shape, 4, seed=0)
        hook = self.hook(self.model.cfg.n_layers // 2)
        return ForwardEngine(self.model, choose_strategy(self.model, probe, hook))

    def hook(self, layer: int) -> str:
        """Hook of a layer."""
        return f"blocks.{layer}.hook_resid_pre"

    def sae(self, layer: int) -> Any:
        """The SAE at a layer, as SAELens has it; one layer's is kept."""
        hook = self.hook(layer)
        return self._keep(f"sae {layer}", lambda: random_sae(self.shape, hook, seed=layer))

    def adapter(self, layer: int) -> SAEAdapter:
        """The same SAE as ours has it, prepared."""

        def prepared() -> SAEAdapter:
            adapter = adapt(self.sae(layer))
            adapter.encode(torch.zeros(1, adapter.d_in))
            return adapter

        return self._keep(f"adapter {layer}", prepared)

    def _keep(self, slot: str, make: Callable[[], Any]) -> Any:
        return self.session.keep(f"model {self.shape.title}", slot, make)


def settings(**settings: Any) -> CertifyConfig:
    """The published coding rule."""
    return CertifyConfig(coding=f"topk:{K}", progress=False, **settings)


@dataclass(frozen=True)
class Task:
    """Tokens of one comparison, and the pool of each layer's SAE.

    Attributes:
        calibration: Sequences on which both sides count.
        evaluation: Sequences on which both sides measure.
        pools: By layer. After so few calibration sequences every sequence would violate the pool; in
            the published runs 0.05 % to 2 % do. So both sides count, and then take this pool, which
            one evaluation sequence violates.
    """

    calibration: Tensor
    evaluation: Tensor
    pools: Mapping[int, Pool]

    @classmethod
    def of(cls, bench: Bench, layers: Sequence[int], units: int) -> Task:
        """Draw tokens: ``units`` published batches of evaluation, seven times that of calibration."""
        n = (2 if bench.session.quick else PUBLISHED_BATCH) * units
        calibration = random_tokens(bench.shape, RATIO_OF_TOKENS * n, seed=1)
        evaluation = random_tokens(bench.shape, n, seed=2)
        pools = {layer: _pool(bench, layer, evaluation) for layer in layers}
        return cls(calibration, evaluation, pools)

    def first(self, n: int) -> Task:
        """Keep the first evaluation sequences, and calibration in proportion."""
        return replace(
            self,
            calibration=self.calibration[: RATIO_OF_TOKENS * n],
            evaluation=self.evaluation[:n],
        )

    @property
    def described(self) -> dict[str, int]:
        """Sizes, for the record."""
        return {
            "calibration_tokens": self.calibration.numel(),
            "evaluation_tokens": self.evaluation.numel(),
        }


def _pool(bench: Bench, layer: int, tokens: Tensor) -> Pool:
    """Every feature but a few that only the first of the sequences uses."""
    adapter = bench.adapter(layer)
    hook = bench.hook(layer)
    activations = bench.engine.capture(tokens, [hook])[hook].float()
    indices = [
        adapter.encode(part.flatten(0, 1), Coding.parse(f"topk:{K}")).features.indices.flatten()
        for part in (activations[:1], activations[1:])
    ]
    first, others = (torch.bincount(part, minlength=adapter.d_sae) for part in indices)
    own = ((first > 0) & (others == 0)).nonzero().flatten()
    mask = torch.ones(adapter.d_sae, dtype=torch.bool)
    mask[own[: adapter.d_sae // 400]] = False
    return Pool(mask)


def run_ours(bench: Bench, task: Task) -> dict[int, tuple[Tensor, Columns]]:
    """Calibrate and measure; counts and columns by layer."""
    config = settings()
    readers = {str(layer): Reader(bench.adapter(layer), config) for layer in task.pools}
    calibrated = calibrate(bench.engine, readers, task.calibration, config)
    subjects = {
        name: subject_of(reader.adapter, calibrated[name], task.pools[int(name)], config)
        for name, reader in readers.items()
    }
    measured = measure(bench.engine, subjects, task.evaluation, config)
    return {int(name): (calibrated[name].counts, measured[name]) for name in readers}


def subject_of(
    adapter: SAEAdapter, calibrated: Calibration, pool: Pool, config: CertifyConfig, **more: Any
) -> Subject:
    """What is measured of one SAE."""
    return Subject(
        adapter=adapter,
        config=config,
        pool=pool,
        variants=variants_of(adapter, config),
        mean_activations=calibrated.mean_activations(),
        unigram_bits=calibrated.unigram_bits(config.alpha),
        **more,
    )


def run_reference(
    bench: Bench, layer: int, task: Task, batch: int = PUBLISHED_BATCH
) -> tuple[Tensor, ReferenceEvidence]:
    """Count and evaluate as published; counts and evidence."""
    sae, pool = bench.sae(layer), task.pools[layer].mask
    counts = reference_calibrate(bench.model, sae, task.calibration, K, batch)
    return counts, reference_evaluate(bench.model, sae, pool, task.evaluation, K, batch)


@torch.inference_mode()
def permuted_errors(bench: Bench, layer: int, permutation: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared error of each sequence when feature j is decoded as ``permutation[j]``."""
    sae, hook = bench.sae(layer), bench.hook(layer)
    _, cache = bench.model.run_with_cache(tokens, names_filter=[hook], return_type=None)
    selected = keep_topk(sae.encode(cache[hook]), K)
    shuffled = torch.zeros_like(selected).index_copy_(-1, permutation.long(), selected)
    return (cache[hook] - sae.decode(shuffled)).double().square().sum(dim=-1).mean(dim=-1)
