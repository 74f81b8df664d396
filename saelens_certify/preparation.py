"""From an SAE that somebody names to one that is known to fit the model: all checks before any long work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, as_sequences
from saelens_certify.data.stores import is_store
from saelens_certify.forward import ForwardEngine, Strategy, choose_strategy
from saelens_certify.horizons import check_horizons
from saelens_certify.preflight import (
    check_bare,
    check_order,
    check_pair,
    check_settings,
    check_width,
    warn_about_training_positions,
)
from saelens_certify.proxies import check_controls
from saelens_certify.saes import SAEAdapter, adapt
from saelens_certify.saes.loading import LoadedSAE, open_sae
from saelens_certify.saes.selfcheck import self_check
from saelens_certify.store_draws import sequences_of_store

PROBE_SEQUENCES = 4
"""Calibration sequences on which everything is tried before a run."""


@dataclass(frozen=True)
class Prepared:
    """An SAE that fits the model.

    Attributes:
        loaded: The SAE and where it came from.
        adapter: The adapter made from it.
    """

    loaded: LoadedSAE
    adapter: SAEAdapter


def prepare(model: Any, sae: Any, configs: Sequence[CertifyConfig]) -> Prepared:
    """Open an SAE and check everything that takes no forward pass.

    Args:
        model: The model.
        sae: A SAELens SAE, a folder, ``"release/sae_id"``, or what `open_sae` returned.
        configs: The settings under which it will be measured.

    Raises:
        CertifyError: If the pieces do not fit together.
    """
    loaded = open_sae(sae)
    adapter = adapt(loaded.sae)
    for config in configs:
        check_settings(model, config)
    check_bare(model, loaded.sae)
    check_pair(model, loaded.sae)
    for config in configs:
        check_controls(adapter, config)
    warn_about_training_positions(loaded.sae.cfg.metadata)
    return Prepared(loaded, adapter)


def try_out(
    engine: ForwardEngine,
    saes: Mapping[str, Prepared],
    probe: Int[Tensor, "batch pos"],
    configs: Sequence[CertifyConfig],
) -> tuple[ForwardEngine, dict[str, dict[str, Any]]]:
    """Try everything on a few real sequences.

    Args:
        engine: The model.
        saes: The SAEs, by name.
        probe: Calibration sequences.
        configs: The settings; one ``impl`` in all of them.

    Returns:
        The engine with the fastest way of running forwards that is right for all SAEs, and what
        `self_check` found, by name.

    Raises:
        CertifyError: If a hook does not fire, a width differs, or an adapter is not its SAE.
    """
    hooks = {
        hook
        for each in saes.values()
        for hook in (each.adapter.input_hook, each.adapter.output_hook)
    }
    activations = engine.capture(probe, hooks)
    checks: dict[str, dict[str, Any]] = {}
    for name, each in saes.items():
        check_order(each.adapter, activations)
        check_width(each.adapter, activations)
        x = activations[each.adapter.input_hook]
        found = self_check(each.loaded.sae, each.adapter, x, configs[0].impl)
        checks[name] = dataclasses.asdict(found)
    outputs = sorted({each.adapter.output_hook for each in saes.values()})
    strategies = [choose_strategy(engine.model, probe, hook) for hook in outputs]
    engine = ForwardEngine(engine.model, Strategy.right_for_all(strategies))
    for config in configs:
        check_horizons(engine, config)
    return engine, checks


def sequences_for(model: Any, data: Any, config: CertifyConfig, **options: Any) -> Sequences:
    """Cut documents to sequences by the model's conventions.

    Args:
        model: The model: its tokenizer, vocabulary and BOS convention are used.
        data: Anything `as_sequences` accepts. A SAELens ActivationsStore keeps its own ``prepend_bos``,
            and with ``limit`` gives a random sample (see `sequences_of_store`).
        config: Settings (``seq_len``, ``progress``).
        **options: Further arguments of `as_sequences` (``split``, ``revision``, ``limit``, …).

    Returns:
        The sequences, in the order of the data.
    """
    if is_store(data):
        return sequences_of_store(data, config, model=model, **options)
    return as_sequences(
        data,
        seq_len=config.seq_len,
        d_vocab=int(model.cfg.d_vocab),
        tokenizer=getattr(model, "tokenizer", None),
        prepend_bos=getattr(model.cfg, "default_prepend_bos", None),
        progress=config.progress,
        **options,
    )
