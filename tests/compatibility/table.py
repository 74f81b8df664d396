"""What can be certified: every architecture at every hook of every model class, tried out.

`PYTHONPATH=tests python -m compatibility.table` writes docs/compatibility.md; a test compares it.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine.builders import (
    ALL_KINDS,
    MODEL_CLASSES,
    SEQ_LEN,
    make_sae,
    make_tokens,
    of_class,
)
from torch import Tensor

from saelens_certify import CertifyConfig, CertifyError, certify
from saelens_certify.forward import resolve_hook
from saelens_certify.saes import adapt

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "hook_mlp_in",
)
OUTPUT = "blocks.1.hook_mlp_out"
CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)
CALIBRATION, EVALUATION = make_tokens(3, seed=1), make_tokens(4, seed=2)

REASONS = {
    "switched off": r"did not fire",
    "not there": r"has no hook",
    "MLP branch only": r"MLP branch only",
    "after the output": r"computes after",
}
"""Marks of refusals, and what the error says."""


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        certified: Whether a certificate was issued.
        reason: A key of `REASONS`, if not.
        error: Largest difference of a sequence's loss to SAELens's own ``forward`` spliced by hand,
            bits; 0 if refused.
    """

    certified: bool
    reason: str = ""
    error: float = 0.0


def try_out(kind: str, hook: str, model_class: str) -> Cell:
    """Certify one SAE, and compare its losses with ``sae.forward`` put in by hand."""
    name = f"blocks.1.{hook}"
    model, sae = of_class(model_class), make_sae(kind, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            certificate = certify(
                model, sae, calibration=CALIBRATION, evaluation=EVALUATION, config=CONFIG
            )
    except CertifyError as error:
        return Cell(
            False, next(mark for mark, said in REASONS.items() if re.search(said, str(error)))
        )
    expected = np.sort(_loss_by_hand(model, sae).numpy())
    return Cell(True, error=float(np.abs(np.sort(certificate.column("loss_sae")) - expected).max()))


@torch.no_grad()
def _loss_by_hand(model: Any, sae: Any) -> Tensor:
    adapter = adapt(sae)
    read: dict[str, Tensor] = {}

    def note(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        read["x"] = x.flatten(2)

    def splice(y: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return sae.forward(read["x"]).reshape(y.shape)

    hooks: list[tuple[str, Callable[..., Any]]] = [
        (resolve_hook(model, adapter.input_hook), note),
        (resolve_hook(model, adapter.output_hook), splice),
    ]
    logits = model.run_with_hooks(EVALUATION, return_type="logits", fwd_hooks=hooks)
    p = logits[:, :-1].double().softmax(-1).gather(-1, EVALUATION[:, 1:, None])[..., 0]
    return -torch.log2(0.5 * p + 0.5 / logits.shape[-1]).mean(dim=1)


def everything() -> dict[tuple[str, str, str], Cell]:
    """Try every combination: (model class, architecture, hook) -> what came of it."""
    return {
        (model_class, kind, hook): try_out(kind, hook, model_class)
        for model_class in MODEL_CLASSES
        for kind in ALL_KINDS
        for hook in HOOKS
    }


def page(cells: dict[tuple[str, str, str], Cell]) -> str:
    """Write what was tried as a page."""
    lines = [_BEFORE]
    for model_class in MODEL_CLASSES:
        lines += [f"\n## {model_class}\n", "| SAE | " + " | ".join(f"`{h}`" for h in HOOKS) + " |"]
        lines.append("|---|" + "---|" * len(HOOKS))
        for kind in ALL_KINDS:
            row = [cells[model_class, kind, hook] for hook in HOOKS]
            marks = " | ".join("yes" if cell.certified else cell.reason for cell in row)
            lines.append(f"| `{kind}` | {marks} |")
    return "\n".join(lines) + "\n" + _AFTER


_BEFORE = """# What can be certified

Every architecture at every hook of every model class, tried on a small GPT-2 with random weights. This page is written by
the tests (`PYTHONPATH=tests python -m compatibility.table`; one of them tries everything again and compares), in float32. *yes*:
a certificate was issued, and its losses equal those of the SAE's own `forward` put in by hand, within 1e-4 bits a sequence.
Anything else is a refusal, with its reason:

- *switched off*: the hook exists and does not fire (`model.set_use_hook_mlp_in(True)` turns `hook_mlp_in` on).
- *not there*: this model class has no such hook.
- *MLP branch only*: on a TransformerBridge `hook_resid_mid` is the MLP's input only; a reconstruction put there would miss the
  residual stream.
- *after the output*: the transcoder would read what is computed after the activation that it replaces.

SAEs read and replace one activation; transcoders read the hook of the column and replace `hook_mlp_out`."""

_AFTER = """
## Architectures

| SAE | encoded by | features outside the pool |
|---|---|---|
| `standard`, `jumprelu`, `gated` and their transcoders | our operators | masked before the rule |
| `topk`, `abstopk`, `topk_transcoder`, `topk_skip_transcoder` | our operators | masked before the SAE's own top-k, so that the next may enter |
| `matching_pursuit`, `temporal`, `groupmax` and its transcoders | their own code, whole sequences | dropped from the code |
| classes registered with `register_sae_class` | their own `encode` and `decode` | dropped from the code |

BatchTopK and Matryoshka SAEs are `jumprelu` in their saved form. `topk_transcoder`, `topk_skip_transcoder` and `groupmax` are what
EleutherAI sparsify checkpoints become (`saes.load_sparsify`). Skip terms and what a temporal SAE predicts from context are part of
the reconstruction; permutations and random decoders leave them as they are.

SAEs of 16 bits that our operators encode are encoded in float32 arithmetic from their weights; the self-check compares them with
the same weights in float32, and with their own 16-bit `forward` up to its rounding (`self_check` in the manifest). The others run in their own
precision.

Refused, with the reason: normalisation that SAELens leaves out at inference and that was not folded
(`expected_average_only_in`, `covariance_whitening`), training forms that rank over the whole batch, cross-layer decoders that
SAELens sums, SAEs of a single head, `use_error_term`, hooks that do not fire or come after the last block, classes whose codes depend on the rest of
the batch or whose `forward` is more than `decode(encode(x))`.
"""

if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny tensors
    PAGE.write_text(page(everything()))
    sys.stdout.write(f"{PAGE}\n")
