"""A multiple-choice task that needs no hub: which of four endings is the passage's own?

The form of HellaSwag, made of held-out prose: the first words of a passage, its own next words and those of
three other passages at the same place. Easier than HellaSwag, whose wrong endings were written to deceive.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.smollm2.text import Prose, documents

_CONTEXT, _ENDING = 14, 8  # words
_CHOICES = 4
NAME = "prose_endings"


def questions(n: int, prose: Prose = "bundled", seed: int = 0) -> list[dict[str, Any]]:
    """Return questions, one a passage of the evaluation split.

    Args:
        n: Number of questions.
        prose: Which passages.
        seed: Of the wrong endings and the place of the right one.
    """
    rng = random.Random(seed)
    words = [each.text.split() for each in documents(prose) if each.split == "evaluation"]
    words = [each for each in words if len(each) >= _CONTEXT + _ENDING]
    found = []
    for own in words[:n]:
        others = rng.sample([each for each in words if each is not own], _CHOICES - 1)
        endings = [" ".join(each[_CONTEXT : _CONTEXT + _ENDING]) for each in others]
        label = rng.randrange(_CHOICES)
        endings.insert(label, " ".join(own[_CONTEXT : _CONTEXT + _ENDING]))
        found.append({"context": " ".join(own[:_CONTEXT]), "endings": endings, "label": label})
    return found


def task(folder: Path, n: int) -> dict[str, Any]:
    """Write the questions and return the task's configuration for lm-evaluation-harness.

    Args:
        folder: Where the questions go.
        n: Number of questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{NAME}.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions(n)))
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(folder / "datasets"),
        },
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "label",
        "doc_to_choice": "endings",
        "metric_list": [{"metric": "acc"}],
    }
