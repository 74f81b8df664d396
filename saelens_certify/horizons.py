"""Divergence from the model read out some blocks after the patched one (logit lens).

The residual of M and of S∘M after the same number of blocks goes through the model's own final norm and
unembedding. What it shows depends on how far intermediate residuals can be read out at all: it locates growth of
an error, and enters no bound.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.forward import BasePass, FinalState, ForwardEngine, locate
from saelens_certify.outputs import Columns, VariantState, output_statistics
from saelens_certify.subject import Subject


def blocks_after(engine: ForwardEngine, hook: str) -> int:
    """Number of blocks that run after the patched one."""
    return engine.n_layers - _first_block(hook)


def horizon_blocks(engine: ForwardEngine, subject: Subject) -> dict[int, int]:
    """For each horizon of a subject the block at whose input it is read out, while there is one."""
    first = _first_block(subject.adapter.output_hook)
    return {h: first + h for h in subject.config.horizons if first + h < engine.n_layers}


def check_horizons(engine: ForwardEngine, config: CertifyConfig) -> None:
    """Check that intermediate residuals can be read out.

    Raises:
        CertifyError: If the model's own logits cannot be computed from the residual.
    """
    if config.horizons and not engine.strategy.chunked_head:
        raise CertifyError(
            f"horizons={config.horizons} need the model's final norm and unembedding to be applied to "
            "intermediate residuals, but applied to its last residual they do not give this model's logits; set "
            "horizons=()"
        )


def horizon_columns(
    engine: ForwardEngine,
    base: BasePass,
    subject: Subject,
    final: FinalState,
    config: CertifyConfig,
) -> Columns:
    """Return ``kl_h0``, …: KL(M || S∘M) of each sequence after so many blocks, bits per token.

    Args:
        engine: The model.
        base: The base pass of the batch, with the block inputs wanted.
        subject: The subject.
        final: State of S∘M on all sequences of the batch, with the block inputs wanted.
        config: Settings of the pass.

    Returns:
        One column for each horizon; beyond the last block, that after it.
    """
    blocks = horizon_blocks(engine, subject)
    rows = torch.arange(len(base.tokens), device=base.tokens.device)
    columns: Columns = {}
    last = None if subject.length is None else subject.length - 1
    for horizon in subject.config.horizons:
        of_base, of_sae = base, final
        if horizon in blocks:
            block = blocks[horizon]
            of_base = replace(base, final=base.block_inputs[block])
            of_sae = replace(final, residual=final.block_inputs[block], patch=None)
        state = VariantState(rows, of_sae, whole_batch=True)
        _, (found,) = output_statistics(engine, of_base, [state], config)
        columns[f"kl_h{horizon}"] = found["kl"][:, :last].mean(dim=1).numpy()
    return columns


def _first_block(hook: str) -> int:
    """First block whose input is the residual after the patched activation has entered it."""
    site = locate(hook)
    if site.restart is None:
        return 0
    return site.restart if site.replaces_residual else site.restart + 1
