"""Documents of a SAELens `ActivationsStore`, not its stream of concatenated contexts.

What a store streams are no independent draws: a context mixes documents, a document spans contexts, and
when the dataset is exhausted the stream begins again without a word. So the documents are read from the
dataset below the store, one sequence a document, each once, and the store's own position is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from saelens_certify.data.documents import MASK_COLUMN, Batch, Documents, mask_row, token_row
from saelens_certify.data.hub import open_dataset
from saelens_certify.data.sequences import DataSource
from saelens_certify.errors import CertifyError

KIND = "activations_store"
_EXAMINED = 64


def is_store(data: Any) -> bool:
    """Whether data is a SAELens ActivationsStore (or of a class derived from it), without importing it."""
    return any(
        cls.__name__ == "ActivationsStore" and cls.__module__.partition(".")[0] == "sae_lens"
        for cls in type(data).__mro__
    )


def documents_of_store(
    store: Any, *, one_document_per_row: bool = False, seed: int | None = None
) -> Documents:
    """The documents below a store, in the form that `as_sequences` reads.

    Args:
        store: A SAELens ActivationsStore. It is not changed, nor is its position in the stream moved.
        one_document_per_row: Assert that each row of a pre-tokenised dataset is (the beginning of) one
            document, where its rows look like concatenated contexts.
        seed: Read the rows in an order drawn with this seed, so that the first n documents are a random
            sample of the dataset. None, and any streamed dataset: in the order the store reads them.

    Returns:
        The documents, not yet tokenised; with conversations for a store that formats chats, their ids.
        They are named ``dataset:17`` for row 17 of the dataset, ``store:17`` where the store reads a
        stream or a shuffled dataset, whose row 17 may be any.

    Raises:
        CertifyError: If the store has no documents, or its rows are not documents.
    """
    dataset = store.dataset
    if dataset is None:
        raise CertifyError(
            "the ActivationsStore reads cached activations and has no documents; give the documents "
            "that they were made from as token ids, texts or a dataset"
        )
    if isinstance(dataset, dict):
        raise CertifyError(
            f"the ActivationsStore's dataset is a dict of splits {sorted(map(str, dataset))}; give the "
            "store, or the certificate, one split"
        )
    column = store.tokens_column
    label = f"the ActivationsStore's dataset (column {column!r})"
    # A copy without the format that the store set, which hides attention masks.
    rows = dataset.with_format(None)
    if store.is_dataset_tokenized and not one_document_per_row:
        _refuse_contexts(rows, column, tokenizer_of_store(store), label)
    # A stream and a shuffled dataset (`shuffle_input_dataset`) have an order of their own.
    shuffled = not hasattr(rows, "select") or getattr(rows, "_indices", None) is not None
    order = None
    if seed is not None and hasattr(rows, "select"):
        order = np.random.default_rng(seed).permutation(len(rows))
        rows = rows.select(order, keep_in_memory=True)
    split_name = None if rows.split is None else str(rows.split)
    source = DataSource(
        kind=KIND,
        location=rows.info.dataset_name,
        split=split_name,
        column=column,
        fingerprint=getattr(dataset, "_fingerprint", None),
        selection=(
            "documents of an ActivationsStore's dataset, one sequence each",
            "rows in the order the store reads them"
            if order is None
            else f"rows in random order, seed={seed}",
        ),
    )
    if store.use_chat_formatting:
        documents = _conversations(rows, column, store.model.tokenizer, source)
    else:
        documents = open_dataset(rows, None, column, source, "dataset")
    return dataclasses.replace(
        documents, batches=_named_by_row(documents, order, "store" if shuffled else "dataset")
    )


def tokenizer_of_store(store: Any) -> Any:
    """The tokenizer of the store's model; None if it has none."""
    return getattr(store.model, "tokenizer", None)


def refuse_endless(store: Any) -> None:
    """Refuse to read a stream to its end, which it may not have.

    Raises:
        CertifyError: If the store streams its dataset.
    """
    if store.dataset is not None and not hasattr(store.dataset, "__len__"):
        raise CertifyError(
            "the ActivationsStore streams its dataset, which may not end; say how many sequences to "
            "read with limit="
        )


def _named_by_row(documents: Documents, order: np.ndarray | None, prefix: str) -> Any:
    """Read as before, with ids that name the row of the store's dataset and not its place in a sample."""

    def batches(size: int) -> Iterator[Batch]:
        start = 0
        for batch in documents.batches(size):
            places = range(start, start + len(batch.ids))
            start += len(batch.ids)
            rows = places if order is None else order[places.start : places.stop]
            yield batch._replace(ids=[f"{prefix}:{int(row)}" for row in rows])

    return batches


def _conversations(rows: Any, column: str, tokenizer: Any, source: DataSource) -> Documents:
    """Conversations as token ids, by the tokenizer's chat template, as the store does it."""
    from sae_lens.tokenization_and_batching import tokenize_with_chat_template

    if tokenizer is None:
        raise CertifyError(
            "the ActivationsStore formats chats, which needs a model with a tokenizer; give token ids"
        )
    rows = rows.select_columns([column])

    def ids(value: Any) -> np.ndarray:
        talk = [{"role": "user", "content": value}] if isinstance(value, str) else value
        return tokenize_with_chat_template(talk, tokenizer).numpy()

    def batches(size: int) -> Iterator[Batch]:
        for chunk in rows.iter(batch_size=size):
            values = [ids(value) for value in chunk[column]]
            yield Batch(["" for _ in values], values)

    return Documents(source, "tokens", batches, len(rows) if hasattr(rows, "__len__") else None)


def _refuse_contexts(rows: Any, column: str, tokenizer: Any, label: str) -> None:
    """Refuse token rows that look like concatenated contexts.

    Concatenation makes all rows equally long and leaves separators inside; one of the two is enough.
    """
    lengths: list[int] = []
    separated = 0
    separators = _separators(tokenizer)
    for row in islice(iter(rows), _EXAMINED):
        ids = _without_padding(row, column, tokenizer, label)
        lengths.append(len(ids))
        separated += bool(np.isin(ids[1:-1], separators).any())
    found = []
    if len(set(lengths)) <= 1:
        found.append(f"all have {lengths[0] if lengths else 0} tokens")
    if separated:
        found.append(f"{separated} hold BOS, EOS or SEP inside")
    if not found:
        return
    raise CertifyError(
        f"the rows of {label} look like contexts concatenated from several documents: of the first "
        f"{len(lengths)}, {' and '.join(found)}. Such rows are no independent draws, since documents go "
        "on from row to row. Give the documents themselves (texts, or token ids before concatenation), "
        "or, if each row begins a document of its own, say so with one_document_per_row=True"
    )


def _separators(tokenizer: Any) -> list[int]:
    names = ("bos_token_id", "eos_token_id", "sep_token_id")
    found = {getattr(tokenizer, name, None) for name in names}
    return sorted(token for token in found if token is not None)


def _without_padding(row: Any, column: str, tokenizer: Any, label: str) -> np.ndarray:
    ids = token_row(row[column], label)
    if MASK_COLUMN in row and row[MASK_COLUMN] is not None:
        return ids[mask_row(row[MASK_COLUMN], len(ids), label)]
    pad = getattr(tokenizer, "pad_token_id", None)
    real = np.flatnonzero(ids != pad) if pad is not None else np.arange(len(ids))
    if not real.size:
        return ids[:0]
    lead = int(real[0])
    # A single leading pad id is a BOS where the two are one id.
    start = lead - 1 if lead == 1 and pad == getattr(tokenizer, "bos_token_id", None) else lead
    return ids[start : int(real[-1]) + 1]
