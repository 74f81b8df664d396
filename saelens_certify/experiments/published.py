"""The published settings, by name: models, SAEs, documents and numbers of arXiv:2606.18383.

From its repository newcodevelop/sparse-lens-certification: tables and README, and for what these leave open the scripts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.amplification import PUBLISHED_HORIZONS
from saelens_certify.experiments.tasks import PAPER_LIMIT, PAPER_TASKS
from saelens_certify.models import DEMO

PROTOCOL = CertifyConfig(coding="topk:64", alpha=0.5, delta=0.05, seq_len=32, positions="all")
"""Settings of every published certificate."""

CALIBRATION_TOKENS = 2_240_000


@dataclass(frozen=True)
class SAESource:
    """An SAE of a preset.

    Attributes:
        source: What `open_sae` takes: ``release/sae_id``, ``owner/repository/folder``, a folder or an SAE.
        hook: TransformerLens hook that it reads and replaces; None for a stand-in, which knows it itself.
        d_sae: Number of features; None for a stand-in.
    """

    source: Any
    hook: str | None = None
    d_sae: int | None = None


@dataclass(frozen=True)
class ModelSource:
    """A model of a preset, and its SAEs.

    Attributes:
        label: Its name in the tables, with the checkpoint that was loaded (they say Llama-3.1-8B and mean
            Meta-Llama-3-8B).
        model: Hub name, folder, ``"demo"``, or a TransformerLens model.
        saes: SAEs by name.
        dtype: Dtype of the model's parameters.
    """

    label: str
    model: Any
    saes: Mapping[str, SAESource]
    dtype: str = "float32"

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-") or "model"


def _gpt2(*layers: int) -> ModelSource:
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    saes = [SAESource(f"gpt2-small-res-jb/{hook}", hook, 24_576) for hook in hooks]
    return ModelSource("GPT-2 Small", "gpt2", dict(zip(hooks, saes, strict=True)))


def _gemma() -> ModelSource:
    hook = "blocks.12.hook_resid_post"
    sae = SAESource(f"gemma-2b-res-jb/{hook}", hook, 16_384)
    return ModelSource("Gemma-2B", "google/gemma-2b", {hook: sae})


def _llama(*layers: int) -> ModelSource:
    saes = {}
    for layer in layers:
        hook = f"blocks.{layer}.hook_resid_post"
        saes[hook] = SAESource(f"EleutherAI/sae-llama-3-8b-32x/layers.{layer}", hook, 131_072)
    return ModelSource("Llama-3-8B", "meta-llama/Meta-Llama-3-8B", saes, "bfloat16")


@dataclass(frozen=True)
class Preset:
    """Everything that a published experiment needs, and nothing about where it runs.

    What the tables leave open, and what is done here:

    - **dtype.** GPT-2 Small and Gemma-2B in float32, Llama-3-8B in bfloat16, as in the scripts; SAEs in the dtype of
      their checkpoints. The scripts form Llama's losses in 16 bits, here they are formed in float32 and averaged in
      float64: two published evaluations that differ in this have risks up to 0.005 bits apart.
    - **Weights.** Loaded as the SAEs' metadata says (`saelens_certify.models.load_model`). The scripts have
      TransformerLens process them, which changes these hooks' activations by no more than rounding.
    - **Documents.** C4, English, training split, read from its beginning in the order of the hub's files at
      the commit that the manifest records, and divided by content hash into calibration and evaluation. The scripts
      shuffle the stream (seed 42, buffer of 32,000) and take calibration first. The documents are not the same
      ones; both are samples of C4.
    - **Short documents** give no sequence and are left out; the scripts pad them where another of their batch is
      long enough. Documents that repeat others count once.
    - **Calibration where the publication has none** (error amplification, shuffling): that of the other
      experiments. It decides the certificates that come along, not what is published.
    - **Tasks** are those of lm-evaluation-harness, with its prompts. The scripts score WinoGrande's whole sentences,
      and every choice by its mean log-probability per token; accuracies compare between the predictors
      of one table rather than between tables.

    Attributes:
        name: ``paper-fig1`` and so on; numbers are the paper's.
        title: What it shows.
        experiment: Which experiment: ``bound_curves``, ``layer_sweep`` (with ``output_fidelity`` where
            published), ``error_amplification``, ``sensitivity``, ``downstream_tasks``, ``feature_shuffling`` or
            ``distribution_shift``.
        models: Models with their SAEs.
        calibration_sequences: Calibration documents, one sequence of L tokens each.
        evaluation_sequences: Evaluation documents; 0 if the experiment measures something else.
        grid: Numbers of sequences at which bounds are published.
        fidelity: Names of the SAEs whose output fidelity is published.
        budget_tokens: Calibration budgets, tokens.
        taus: Thresholds of calibration frequency.
        ks: Values of K.
        horizons: Numbers of blocks after the hook.
        rates: Shares of tokens that are replaced by random ones.
        tasks: Tasks of lm-evaluation-harness.
        questions: Questions of each task.
        permutations: Feature permutations that the model is run on.
        config: Settings of every certificate.
        dataset: Hub name and configuration of the documents.
        split: Its split.
    """

    name: str
    title: str
    experiment: str
    models: tuple[ModelSource, ...]
    calibration_sequences: int = CALIBRATION_TOKENS // PROTOCOL.seq_len
    evaluation_sequences: int = 10_000
    grid: tuple[int, ...] = ()
    fidelity: tuple[str, ...] = ()
    budget_tokens: tuple[int, ...] = ()
    taus: tuple[int, ...] = ()
    ks: tuple[int, ...] = ()
    horizons: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    tasks: tuple[Any, ...] = ()
    questions: int | None = None
    permutations: int = 0
    config: CertifyConfig = PROTOCOL
    dataset: str = "allenai/c4:en"
    split: str = "train"

    @property
    def calibration_tokens(self) -> int:
        """Calibration budget in tokens."""
        return self.calibration_sequences * self.config.seq_len

    def replaced(
        self,
        *,
        model: Any = None,
        saes: Mapping[str, Any] | Sequence[Any] | None = None,
        calibration: int | None = None,
        evaluation: int | None = None,
        questions: int | None = None,
        tasks: Sequence[Any] | None = None,
        scale: float | None = None,
        **settings: Any,
    ) -> Preset:
        """Return the same settings with another model, or other numbers of documents.

        Numbers that are shares of the documents follow them: the grid those of evaluation, budgets and frequency
        thresholds those of calibration.

        Args:
            model: What takes the place of all models.
            saes: Its SAEs, by name or in a list. An experiment about one SAE is run for each of them. May be left
                out for the bundled model, ``"demo"``.
            calibration: Number of calibration sequences.
            evaluation: Number of evaluation sequences.
            questions: Number of questions of each task.
            tasks: In place of the published ones.
            scale: In place of the three numbers: how many for each published one.
            **settings: Fields of `CertifyConfig` to set otherwise (speed, seed, progress; the published ones are
                what makes it this preset).

        Raises:
            CertifyError: For a model without SAEs or the reverse, or impossible numbers.
        """
        if scale is not None:
            if not scale > 0 or any(n is not None for n in (calibration, evaluation, questions)):
                raise CertifyError(
                    f"scale={scale!r} must be positive, and goes in place of calibration, evaluation and questions"
                )
            calibration = max(1, round(scale * self.calibration_sequences))
            evaluation = max(1, round(scale * self.evaluation_sequences))
            questions = max(1, round(scale * (self.questions or 0)))
        changes: dict[str, Any] = {"config": dataclasses.replace(self.config, **settings)}
        if model is not None or saes is not None:
            stand_in = _stand_in(model, saes, several=self.experiment in _SEVERAL)
            changes |= {"models": (stand_in,)}
            changes |= {"fidelity": tuple(stand_in.saes) if self.fidelity else ()}
        if calibration is not None:
            share = _share("calibration", calibration, self.calibration_sequences)
            length = self.config.seq_len
            changes |= {
                "calibration_sequences": calibration,
                "budget_tokens": tuple(
                    length * n for n in _scaled((t / length for t in self.budget_tokens), share)
                ),
                "taus": _scaled(self.taus, share),
            }
        if evaluation is not None and self.evaluation_sequences:
            share = _share("evaluation", evaluation, self.evaluation_sequences)
            changes |= {"evaluation_sequences": evaluation, "grid": _scaled(self.grid, share)}
        if questions is not None and self.questions is not None:
            changes["questions"] = questions
        if tasks is not None and self.tasks:
            changes["tasks"] = tuple(tasks)
        return dataclasses.replace(self, **changes)


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        CertifyError: If there is none of that name.
    """
    if name not in PRESETS:
        raise CertifyError(f"preset {name!r} is unknown; known are {', '.join(PRESETS)}")
    return PRESETS[name]


# Experiments that take all SAEs of a model at once.
_SEVERAL = ("layer_sweep", "error_amplification")


def _stand_in(
    model: Any, saes: Mapping[str, Any] | Sequence[Any] | None, several: bool
) -> ModelSource:
    if model is None:
        raise CertifyError("saes= goes with model=: name the model that they belong to")
    if saes is None:
        if not isinstance(model, str) or model != DEMO:
            raise CertifyError(
                f"model= goes with saes=: give the SAEs of this model, {{name: sae}} or a list; only {DEMO!r} has "
                "SAEs of its own"
            )
        saes = _demo_saes(several)
    if not isinstance(saes, Mapping):
        from saelens_certify.experiments.naming import named_saes

        saes = named_saes(saes)
    if not saes:
        raise CertifyError("saes is empty: give at least one SAE")
    label = model if isinstance(model, (str, Path)) else getattr(model.cfg, "model_name", None)
    label = "model" if label in (None, "", "custom") else label
    return ModelSource(str(label), model, {str(n): SAESource(sae) for n, sae in saes.items()})


def _demo_saes(several: bool) -> dict[str, Any]:
    """Bundled SAEs: one kind at every layer that has it, or the one that the demo certifies."""
    from saelens_certify import demo

    names = [name for name in demo.sae_names() if name.endswith("-topk")]
    return {n: demo.ASSETS / "saes" / n for n in (names if several else [demo.DEFAULT_SAE])}


def _share(name: str, number: int, published: int) -> float:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise CertifyError(f"{name}={number!r} must be a number of sequences, at least 1")
    return number / published


def _scaled(values: Iterable[float], share: float) -> tuple[int, ...]:
    """Values as shares of fewer documents: whole, at least 1, each once."""
    return tuple(sorted({max(1, round(share * value)) for value in values}))


_LAYERS = (4, 8, 12, 16, 20, 24, 28, 30)
_THREE = (_gpt2(6), _gemma(), _llama(30))
_CHECKPOINTS = (1008, 2000, 3008, 4000, 5008, 6000, 7008, 8000, 9008, 10_000)
_DEPTH_GRID = (10_000, 30_000, 50_000, 70_000)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper-fig1",
            "U_SAE+Occam against the number of sequences, three models (Figure 1, Table 1)",
            "bound_curves",
            _THREE,
            grid=_CHECKPOINTS,
        ),
        Preset(
            "paper-fig2",
            "Certificates and output fidelity by layer of Llama-3-8B (Figure 2, Tables 3 and 4)",
            "layer_sweep",
            (_llama(4, 12, 20, 28, 30),),
            evaluation_sequences=70_000,
            grid=_DEPTH_GRID,
            fidelity=tuple(f"blocks.{layer}.hook_resid_post" for layer in (4, 20, 30)),
        ),
        Preset(
            "paper-fig3",
            "KL after matched horizons: local error and its amplification (Figure 3)",
            "error_amplification",
            (_gpt2(6), _gemma(), _llama(*_LAYERS)),
            evaluation_sequences=1008,
            horizons=PUBLISHED_HORIZONS,
        ),
        Preset(
            "paper-fig5",
            "Feature-identity shuffling, three models (Figure 5)",
            "feature_shuffling",
            _THREE,
            evaluation_sequences=70_000,
            permutations=1,
        ),
        Preset(
            "paper-fig6",
            "Certificates by layer of GPT-2 Small (Figure 6)",
            "layer_sweep",
            (_gpt2(0, 2, 4, 6, 8, 10),),
            evaluation_sequences=140_000,
            grid=(*_DEPTH_GRID, 140_000),
        ),
        Preset(
            "paper-fig7",
            "Sensitivity to K, three models (Figure 7)",
            "sensitivity",
            _THREE,
            ks=(16, 32, 64, 128),
        ),
        Preset(
            "paper-fig8",
            "One pool under token corruption, three models (Figure 8)",
            "distribution_shift",
            _THREE,
            evaluation_sequences=70_000,
            rates=(0.15, 1.0),
        ),
        Preset(
            "paper-tab2",
            "Sensitivity to the calibration budget, three models (Table 2)",
            "sensitivity",
            _THREE,
            budget_tokens=(280_000, 560_000, 1_120_000, 2_240_000),
        ),
        Preset(
            "paper-tab7",
            "Zero-shot accuracy on WinoGrande, PIQA and HellaSwag (Table 7)",
            "downstream_tasks",
            (_gpt2(6), _gemma(), _llama(*_LAYERS)),
            evaluation_sequences=0,
            tasks=PAPER_TASKS,
            questions=PAPER_LIMIT,
        ),
        Preset(
            "paper-tab8",
            "Pools by frequency threshold, Llama-3-8B layer 30 (Table 8)",
            "sensitivity",
            (_llama(30),),
            taus=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
        ),
    )
}
"""The published experiments by name."""
