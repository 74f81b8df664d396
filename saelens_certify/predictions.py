"""Predictions of a model and of the variants of an SAE, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from saelens_certify.config import CertifyConfig
from saelens_certify.forward import FinalState, ForwardEngine
from saelens_certify.outputs import prediction_statistics
from saelens_certify.runs import run_key
from saelens_certify.states import base_pass, batch_states, batches, most_variants
from saelens_certify.subject import Subject


@dataclass(frozen=True)
class TokenOutputs:
    """A model's predictions of the tokens of some sequences.

    Attributes:
        logprob: Natural log-probability of token t + 1 given tokens 0 .. t, not smoothed.
        greedy: Whether that token is the most likely one.
        run: On which sequences the variant was run; on the others it is S∘M.
    """

    logprob: Float64[Tensor, "n_sequences predicted"]
    greedy: Bool[Tensor, "n_sequences predicted"]
    run: Bool[Tensor, " n_sequences"]


def token_outputs(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    tokens: Int[Tensor, "n_sequences pos"],
    config: CertifyConfig,
    special_ids: tuple[int, ...] = (),
) -> dict[str, dict[str, TokenOutputs]]:
    """Return the predictions of the model and of every variant, token by token.

    Args:
        engine: The model.
        subjects: SAEs with their settings, pools and variants, as in `measure`.
        tokens: Sequences of one length.
        config: Settings of the pass (batches, operators).
        special_ids: Ids of special tokens (for ``positions="no_bos"``).

    Returns:
        For each subject, by the variant's name (``"base"`` is the model itself). A variant that is S∘M on
        some sequences has its predictions there.
    """
    collected: dict[str, dict[str, list[_Predictions]]] = {name: {} for name in subjects}
    for batch in batches(engine, tokens, config, most_variants(subjects)):
        base = base_pass(engine, subjects, batch)
        everywhere = torch.arange(len(batch), device="cpu")
        unpatched = FinalState(base.tokens, base.final)
        of_base = _predictions(engine, unpatched, everywhere, config)
        for states in batch_states(engine, subjects, base, config, special_ids):
            found = {
                key: _predictions(engine, final, states.runs[key].rows.cpu(), config)
                for key, final in states.finals.items()
            }
            for name, subject in states.subjects.items():
                parts, of_sae = collected[name], found[run_key(subject, subject.variants[0])]
                parts.setdefault("base", []).append(_over(of_base, of_base))
                for variant in subject.variants:
                    of_variant = found[run_key(subject, variant)]
                    parts.setdefault(variant.name, []).append(_over(of_sae, of_variant))
    return {
        name: {
            variant: TokenOutputs(*map(torch.cat, zip(*parts, strict=True)))
            for variant, parts in variants.items()
        }
        for name, variants in collected.items()
    }


_Predictions = tuple[Tensor, Tensor, Tensor]  # as in TokenOutputs, but for the last: rows


def _predictions(
    engine: ForwardEngine, state: FinalState, rows: Int[Tensor, " rows"], config: CertifyConfig
) -> _Predictions:
    return *prediction_statistics(engine, state, config), rows


def _over(of_sae: _Predictions, some: _Predictions) -> _Predictions:
    """Put the predictions of some sequences over those of S∘M on all."""
    logprob, greedy, rows = of_sae[0].clone(), of_sae[1].clone(), some[2]
    logprob[rows], greedy[rows] = some[0], some[1]
    run = torch.zeros(len(logprob), dtype=torch.bool, device="cpu")
    run[rows] = True
    return logprob, greedy, run
