"""A tiny world for SAELens: a tokenizer of words, a model, texts as datasets, stores."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
from datasets import Dataset
from engine.builders import BOS, D_VOCAB, hooked_transformer, make_sae
from sae_lens import ActivationsStore
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SEQ_LEN, EOS = 12, 1


@functools.cache
def tokenizer() -> Any:
    """Words ``w2`` to ``w100``, separated by spaces, BOS, and one token for EOS and padding."""
    vocabulary = {"<bos>": BOS, "<eos>": EOS} | {f"w{i}": i for i in range(2, D_VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        name_or_path="words",
    )
    made.init_kwargs.update(name_or_path="words", add_bos_token=True)
    made.chat_template = "{% for m in messages %}{{ 'w2 ' + m['content'] + ' w3 ' }}{% endfor %}"
    return made


@functools.cache
def model() -> Any:
    """A HookedTransformer with that tokenizer."""
    made = hooked_transformer(seed=7)
    made.set_tokenizer(tokenizer(), default_padding_side="right")
    return made


def ids(n: int, seed: int = 0, short: int = 5, long: int = 40) -> list[list[int]]:
    """Documents of unequal length, without special ids; some shorter than SEQ_LEN."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, D_VOCAB - 3)
    weights /= weights.sum()
    return [
        (
            generator.choice(len(weights), size=generator.integers(short, long), p=weights) + 4
        ).tolist()
        for _ in range(n)
    ]


def texts(n: int, seed: int = 0) -> list[str]:
    """The same as text."""
    return [" ".join(f"w{i}" for i in row) for row in ids(n, seed)]


def text_dataset(n: int = 300, seed: int = 0) -> Dataset:
    """A dataset of texts, with a column that nobody asked for."""
    return Dataset.from_dict({"text": texts(n, seed), "number": list(range(n))})


def store(dataset: Any = None, sae: Any = None, **options: Any) -> ActivationsStore:
    """A store of the dataset; contexts of 16 tokens."""
    dataset = text_dataset() if dataset is None else dataset
    return store_of(model(), trained_sae() if sae is None else sae, dataset, **options)


def store_of(model: Any, sae: Any, dataset: Any, **options: Any) -> ActivationsStore:
    """A store of anything, without SAELens's remarks."""
    options = {"context_size": 16, "streaming": False, "total_tokens": 1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ActivationsStore.from_sae(model, sae, dataset, **options)


def trained_sae(kind: str = "topk", **options: Any) -> Any:
    """An SAE with the metadata that stores need."""
    sae = make_sae(kind, **options)
    sae.cfg.metadata.prepend_bos = True
    sae.cfg.metadata.context_size = 16
    return sae
