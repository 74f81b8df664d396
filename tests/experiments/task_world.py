"""A small multiple-choice task from the demo's text, and the slow way to score it."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_certify import CertifyConfig, demo

CONFIG = CertifyConfig(progress=False, part_sequences=40, batch_tokens=300)
SAE = "layer4-jumprelu"
HOOK = "blocks.4.hook_resid_post"
N_QUESTIONS = 24
N_CALIBRATION = 12
"""So few documents that the pool is violated by some questions, but not by all."""


@functools.cache
def model() -> Any:
    return demo.load_model("HookedTransformer")


@functools.cache
def sae() -> Any:
    return demo.load_sae(SAE)


@functools.cache
def calibration() -> Int[Tensor, "n pos"]:
    return demo.load_tokens("calibration")[0][:N_CALIBRATION]


@functools.cache
def questions() -> tuple[dict[str, Any], ...]:
    """How does the passage go on? Of three endings one is the passage's own."""
    rng = random.Random(0)
    texts = demo.load_texts("evaluation", 40)[: 2 * N_QUESTIONS]
    words = [text.split() for text in texts]
    found = []
    for own in words[:N_QUESTIONS]:
        n = rng.randrange(4, 12)
        endings = [" ".join(rng.choice(words)[n : n + 4]) for _ in range(2)]
        label = rng.randrange(3)
        endings.insert(label, " ".join(own[n : n + 4]))
        found.append({"context": " ".join(own[:n]), "endings": endings, "label": label})
    return tuple(found)


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **entries: Any) -> Path:
    """A task file (YAML, of which JSON is a part) with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_jsonl(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "validation_split": "validation",
        **entries,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(task))
    return file


def write_endings(folder: Path, name: str = "endings", **entries: Any) -> Path:
    multiple_choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "label",
        "doc_to_choice": "endings",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return write_task(folder, name, questions(), **{**multiple_choice, **entries})


class Oracle:
    """M, S∘M and h_G by TransformerLens's and SAELens's own whole forwards, one text at a time, in float64."""

    def __init__(self, tokens: Int[Tensor, "n pos"]) -> None:
        self.model = copy.deepcopy(model()).double()
        self.sae = copy.deepcopy(sae()).double()
        _, cache = self.model.run_with_cache(tokens, names_filter=HOOK)
        self.pool: Bool[Tensor, " d_sae"] = (self.sae.encode(cache[HOOK]) > 0).any(0).any(0)

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int], proxy: str) -> Tensor:
        """Log-probabilities of all next tokens, [pos, d_vocab]."""

        def hook(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - TransformerLens's signature
            mask = torch.ones_like(self.pool) if proxy == "sae" else self.pool
            return self.sae.decode(self.sae.encode(x) * mask)

        hooks = [] if proxy == "base" else [(HOOK, hook)]
        logits = self.model.run_with_hooks(torch.tensor([list(tokens)]), fwd_hooks=hooks)
        return logits[0].log_softmax(-1)

    @torch.no_grad()
    def outside(self, tokens: Sequence[int]) -> list[bool]:
        """Whether a feature outside the pool is active, by token."""
        _, cache = self.model.run_with_cache(torch.tensor([list(tokens)]), names_filter=HOOK)
        return (self.sae.encode(cache[HOOK][0]) > 0)[:, ~self.pool].any(-1).tolist()

    def score(self, tokens: Sequence[int], n_scored: int, proxy: str) -> tuple[float, bool]:
        logprobs = self.logprobs(tokens, proxy)
        places = range(len(tokens) - n_scored, len(tokens))
        found = [float(logprobs[place - 1, tokens[place]]) for place in places]
        greedy = all(int(logprobs[place - 1].argmax()) == tokens[place] for place in places)
        return sum(found), greedy


def tokens_of(context: str, continuation: str) -> tuple[list[int], int]:
    """BOS and both texts together; the continuation's tokens are those beyond the context's."""
    tokenizer = model().tokenizer
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    whole, before = encode(context + continuation), encode(context)
    return [tokenizer.bos_token_id, *whole], len(whole) - len(before)
