"""The page of results: a pure function of them, so that it says what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_certify.experiments import Experiment
from saelens_certify.report import write_picture
from saelens_certify.report.experiments.table import main_columns

PAGE = "experiments-smollm2.md"

_LONG = 12  # rows beyond which a table is folded

_ABOUT = {
    "layer_sweep": "Certificates of the SAEs at six layers, from one calibration pass and one evaluation pass.",
    "output_fidelity": "The same certificates: how far the predictions of S∘M and h_G are from the model's.",
    "error_amplification": "Divergence from the model read out some blocks after the patched one by the model's own final norm and "
    "unembedding, and after all blocks.",
    "feature_shuffling": "The SAE at a late layer against copies of it in which only the alignment of features with directions is "
    "random. Its decoder rows have norm 1, so both kinds of random decoder are the same here.",
    "sensitivity": "The same SAE: one setting after another, all from one calibration pass and one evaluation pass.",
    "distribution_shift": "The same SAE and the same pool on corrupted documents, on random tokens and on Python code.",
    "downstream_tasks": "The same SAE on a multiple-choice task by lm-evaluation-harness: which of four endings is the passage's own? "
    "(WinoGrande, PIQA and HellaSwag need the hub; this one is made of the bundled prose and is easier.)",
}


def write_page(
    results: Mapping[str, Any], folder: Path, experiments: Mapping[str, Experiment]
) -> None:
    """Write page and pictures.

    Args:
        results: What `benchmarks.smollm2.experiments` writes as JSON.
        folder: The folder of the documentation.
        experiments: The experiments, for their pictures.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, experiment in experiments.items():
        write_picture(experiment.figure, folder / picture(name), scale=1.5)
    (folder / PAGE).write_text(page(results))


def picture(name: str) -> str:
    """Path of an experiment's picture, relative to the documentation."""
    return f"images/smollm2-{name.replace('_', '-')}.png"


def page(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    machine = results["environment"]
    lines = [
        "# Every experiment on SmolLM2-135M",
        "",
        "Written by `python -m benchmarks.smollm2.experiments --json benchmarks/results/smollm2-experiments.json --docs docs`",
        f"on {machine['date']}: {machine['cores']} cores ({machine['processor']}), torch {machine['versions']['torch']}, "
        f"{results['seconds'] / 60:.0f} minutes for everything once the SAEs are in the cache, at commit "
        f"{machine['commit'][:7]}. Sentences are made from the",
        "numbers. The SAEs are small ones (d_sae 2,304, k = 32, trained on 63,000 tokens by `benchmarks.smollm2.train_saes`), so",
        "this shows what the experiments say, not what good SAEs of this model could do.",
        "",
    ]
    lines += ["## Against the paper", "", *_against_the_paper(results), ""]
    for name, found in results["experiments"].items():
        labels, cells = main_columns(name, found["rows"])
        long = len(cells) > _LONG
        lines += [
            f"## {found['title']}",
            "",
            f"{_ABOUT[name]} {_size(name, results['size'])} ({found['seconds']:.0f} s)",
            "",
            f"![{found['title']}]({picture(name)})",
            "",
            *(f"- {finding}" for finding in found["findings"]),
            "",
            *(["<details><summary>Table</summary>", ""] if long else []),
            _line(labels),
            "|---" + "|---:" * (len(labels) - 1) + "|",
            *map(_line, cells),
            "",
            *(["</details>", ""] if long else []),
        ]
    return "\n".join(lines)


_SIZES = {
    "layer_sweep": "layers",
    "output_fidelity": "layers",
    "error_amplification": "amplification",
    "feature_shuffling": "shuffling",
    "sensitivity": "sensitivity",
    "distribution_shift": "shift",
}


def _size(name: str, size: Mapping[str, int]) -> str:
    """How many documents an experiment was made of."""
    calibration = f"{size['calibration']:,} calibration sequences"
    if name not in _SIZES:
        return f"{calibration}, {size['questions']:,} questions."
    return f"{calibration}, N = {size[_SIZES[name]]:,} evaluation sequences."


def _against_the_paper(results: Mapping[str, Any]) -> list[str]:
    """The findings that compare with the paper's."""
    return [
        f"- {found['title'].partition(':')[0]}: {finding}"
        for found in results["experiments"].values()
        for finding in found["findings"]
        if "paper" in finding
    ]


def _line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
