"""From whatever the caller has to `Sequences`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from saelens_certify.data.documents import Documents
from saelens_certify.data.hub import is_dataset, open_dataset
from saelens_certify.data.memory import open_array, open_list, open_mapping
from saelens_certify.data.paths import open_path
from saelens_certify.data.sequences import DataSource, Sequences
from saelens_certify.data.splits import check_size
from saelens_certify.data.stores import (
    documents_of_store,
    is_store,
    refuse_endless,
    tokenizer_of_store,
)
from saelens_certify.data.tokenise import bos_to_prepend, known_bos, tokenise, tokenizer_name
from saelens_certify.data.windows import Padding, cut
from saelens_certify.errors import CertifyError

OnDuplicate = Literal["drop", "error", "keep"]
# Documents tokenised together; results do not depend on it.
_BATCH = 256


def load_documents(
    data: Any,
    *,
    text_column: str = "text",
    split: str | None = None,
    revision: str | None = None,
    attention_mask: Any = None,
    document_ids: Sequence[str] | None = None,
) -> Documents:
    """Open a source and check everything about it that can be checked without reading it through.

    Args:
        data: See `as_sequences`.
        text_column: Column of texts or token ids. If the default is not there, "tokens" and
            "input_ids" are tried.
        split: Split of a dataset; needed if it has several.
        revision: Branch, tag or commit of a hub dataset.
        attention_mask: 1 at real tokens, 0 at padding; for token data in memory.
        document_ids: Names of documents in memory; one name more than once for sequences of one document.

    Returns:
        The documents, not yet tokenised.

    Raises:
        CertifyError: Naming the source, the value and the remedy.
    """
    opened = isinstance(data, Documents) or is_store(data)
    in_memory = not opened and not isinstance(data, (str, Path)) and not is_dataset(data)
    for name, value in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if value is not None and not in_memory:
            raise CertifyError(
                f"{name}= goes with tokens or texts in memory; {_describe(data)} has its own. Drop it."
            )
    for name, value in (("split", split), ("revision", revision)):
        if value is not None and (in_memory or opened):
            raise CertifyError(
                f"{name}={value!r} goes with a dataset, not {_describe(data)}. Drop it."
            )
    if isinstance(data, Documents):
        return data
    if is_store(data):
        return documents_of_store(data)
    if isinstance(data, (str, Path)):
        return open_path(data, text_column, split, revision)
    if is_dataset(data):
        if revision is not None:
            raise CertifyError(
                f"revision={revision!r} goes with a hub name; the dataset is already loaded. Drop it."
            )
        return open_dataset(data, split, text_column)
    if isinstance(data, Mapping):
        return open_mapping(data, attention_mask, document_ids, text_column)
    if isinstance(data, (list, tuple)):
        if not data:
            raise CertifyError("data is an empty list. Give documents.")
        return open_list(data, attention_mask, document_ids)
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return open_array(data, attention_mask, document_ids)
    raise CertifyError(
        f"data is {_describe(data)}. Give Sequences, token ids (tensor, array or list), texts, a "
        "Hugging Face dataset, a SAELens ActivationsStore, a path, or a hub name."
    )


def as_sequences(
    data: Any,
    *,
    seq_len: int,
    d_vocab: int,
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    attention_mask: Any = None,
    document_ids: Sequence[str] | None = None,
    text_column: str = "text",
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    minimum: int = 1,
    on_duplicate: OnDuplicate = "drop",
    progress: bool = False,
) -> Sequences:
    """Read documents and cut each to its first L tokens.

    Args:
        data: `Sequences`; opened `Documents`; an integer tensor or array [n, >= L]; a list of texts or
            of 1-D token ids; a tokenizer's output; a Hugging Face Dataset or IterableDataset (or dict of splits); a
            path to .txt (documents between blank lines; a folder: one a file), .jsonl, .json,
            .parquet, .npy or .safetensors, or to a dataset folder; a hub name "owner/name" or
            "owner/name:config"; a SAELens ActivationsStore (the documents below it, with its own
            ``prepend_bos``; see `documents_of_store`).
        seq_len: L, in tokens, BOS included.
        d_vocab: The model's vocabulary size; ids outside ``[0, d_vocab)`` are refused.
        tokenizer: Hugging Face tokenizer, needed for text.
        prepend_bos: Whether text gets BOS in front: the model's convention. None does what the
            tokenizer does by itself. Token data is taken as it is (see ``source.prepends_bos``).
        bos_token_id: BOS id, if not the tokenizer's.
        pad_token_id: Pad id, if not the tokenizer's.
        attention_mask: Mask for token data in memory.
        document_ids: Names for documents in memory. Sequences that share a name are of one document: they are
            not independent (``CertifyConfig.dependence``), and belong on one side, calibration or evaluation.
        text_column: Column of texts or token ids.
        split: Split of a dataset.
        revision: Revision of a hub dataset.
        limit: Stop as soon as there are this many sequences.
        minimum: The least number of sequences accepted.
        on_duplicate: What to do with a document whose first L tokens came before.
        progress: Whether to show a progress bar.

    Returns:
        Sequences in the order of the data (`Sequences.canonical` sorts them by hash).

    Raises:
        CertifyError: Naming the document or source, the value and the remedy.
    """
    _check_arguments(seq_len, d_vocab, limit, on_duplicate, bos_token_id)
    if is_store(data):
        if limit is None:
            refuse_endless(data)
        tokenizer = tokenizer or tokenizer_of_store(data)
        prepend_bos = bool(data.prepend_bos)
    bos_id = known_bos(tokenizer, bos_token_id)
    pad_id = pad_token_id if pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
    padding = Padding(
        pad_id, bos_id, getattr(tokenizer, "eos_token_id", None), prepend_bos is not False
    )
    earlier = None
    if isinstance(data, Sequences):
        extras = {
            "attention_mask": attention_mask,
            "document_ids": document_ids,
            "split": split,
            "revision": revision,
        }
        for name, value in extras.items():
            if value is not None:
                raise CertifyError(f"{name}= was given, but Sequences carry their own. Drop it.")
        if data.seq_len < seq_len:
            raise CertifyError(
                f"the sequences have {data.seq_len} tokens, seq_len={seq_len} asks for more. "
                "Build them again from the documents, or lower seq_len."
            )
        # Already free of padding: ids that equal the pad id were let in knowingly.
        earlier, padding = data.source, Padding()
        documents = open_array(data.tokens, names=data.document_ids, source=data.source)
    else:
        documents = load_documents(
            data,
            text_column=text_column,
            split=split,
            revision=revision,
            attention_mask=attention_mask,
            document_ids=document_ids,
        )
    is_text = documents.holds == "text"
    bos = None
    if is_text:
        if tokenizer is None:
            raise CertifyError(
                f"{documents.source.location or 'data'} holds text (column "
                f"{documents.source.column!r}), which needs tokenizer=. Pass the model's tokenizer, "
                "or give token ids."
            )
        bos = bos_to_prepend(tokenizer, prepend_bos, bos_id)

    keeper = _Keeper(seq_len, d_vocab, on_duplicate)
    done = False
    with tqdm(total=documents.total, unit="doc", desc="documents", disable=not progress) as bar:
        for batch in documents.batches(_BATCH):
            rows = tokenise(tokenizer, list(batch.rows), bos) if is_text else batch.rows
            masks = batch.masks if batch.masks is not None else [None] * len(rows)
            for name, row, mask in zip(batch.ids, rows, masks, strict=True):
                keeper.add(name, *cut(row, mask, seq_len, padding, strip=not is_text))
                done = limit is not None and len(keeper.hashes) >= limit
                if done:
                    break
            bar.update(len(rows))
            if done:
                break
    source = _source(documents.source, keeper, earlier, bos_id)
    if is_text:
        source = dataclasses.replace(
            source, tokenizer=tokenizer_name(tokenizer), prepends_bos=bos is not None
        )
    sequences = keeper.sequences(source)
    check_size(sequences, minimum, source.location or f"{source.kind} data")
    return sequences


class _Keeper:
    """Takes windows one by one; keeps those that are new and counts the others."""

    def __init__(self, seq_len: int, d_vocab: int, on_duplicate: OnDuplicate) -> None:
        self.seq_len, self.d_vocab, self.on_duplicate = seq_len, d_vocab, on_duplicate
        self.windows: list[np.ndarray] = []
        self.names: list[str] = []
        self.hashes: list[str] = []
        self.first_name: dict[str, str] = {}
        self.n_read = self.n_short = self.n_padded = self.n_duplicates = 0

    def add(self, name: str, window: np.ndarray | None, padded: bool) -> None:
        self.n_read += 1
        self.n_padded += padded
        if window is None:
            self.n_short += 1
            return
        self._check_vocabulary(name, window)
        key = hashlib.sha256(window.astype("<i4").tobytes()).hexdigest()
        if key in self.first_name:
            self.n_duplicates += 1
            if self.on_duplicate == "error":
                raise CertifyError(
                    f"documents {self.first_name[key]} and {name} have the same first {self.seq_len} "
                    'tokens. Remove one, or pass on_duplicate="drop".'
                )
            if self.on_duplicate == "drop":
                return
        self.first_name.setdefault(key, name)
        self.windows.append(window)
        self.names.append(name)
        self.hashes.append(key)

    def _check_vocabulary(self, name: str, window: np.ndarray) -> None:
        wrong = np.flatnonzero((window < 0) | (window >= self.d_vocab))
        if wrong.size:
            position = int(wrong[0])
            raise CertifyError(
                f"document {name} has token id {window[position]} at position {position}, outside the "
                f"model's vocabulary [0, {self.d_vocab}). "
                "Were the tokens made for another model, or padded with a marker (then pass "
                "attention_mask or pad_token_id)?"
            )

    def sequences(self, source: DataSource) -> Sequences:
        rows = np.stack(self.windows) if self.windows else np.empty((0, self.seq_len), np.int64)
        return Sequences(torch.from_numpy(rows), tuple(self.names), tuple(self.hashes), source)


def _source(
    opened: DataSource, keeper: _Keeper, earlier: DataSource | None, bos_id: int | None
) -> DataSource:
    """The opened source with what was counted; of Sequences, the first reading's counts stay."""
    firsts = {int(window[0]) for window in keeper.windows}
    first = firsts.pop() if len(firsts) == 1 else None
    if earlier is not None:
        return dataclasses.replace(
            earlier, n_duplicates=earlier.n_duplicates + keeper.n_duplicates, first_token=first
        )
    constant = first is not None and (
        first == bos_id if bos_id is not None else len(keeper.names) > 1
    )
    return dataclasses.replace(
        opened,
        n_documents_read=keeper.n_read,
        n_too_short=keeper.n_short,
        n_padded=keeper.n_padded,
        n_duplicates=keeper.n_duplicates,
        prepends_bos=constant,
        first_token=first,
    )


def _check_arguments(
    seq_len: int, d_vocab: int, limit: int | None, on_duplicate: str, bos_token_id: int | None
) -> None:
    if seq_len < 2:
        raise CertifyError(
            f"seq_len={seq_len}; a sequence needs at least 2 tokens, one to predict from and one to predict."
        )
    if not 1 <= d_vocab < 2**31:
        raise CertifyError(f"d_vocab={d_vocab} is no vocabulary size. Pass the model's d_vocab.")
    if limit is not None and limit < 1:
        raise CertifyError(f"limit={limit}; ask for at least 1 sequence, or None for all.")
    choices = get_args(OnDuplicate)
    if on_duplicate not in choices:
        near = difflib.get_close_matches(str(on_duplicate), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise CertifyError(f"on_duplicate={on_duplicate!r}; known are {choices}.{hint}")
    if bos_token_id is not None and not 0 <= bos_token_id < d_vocab:
        raise CertifyError(
            f"bos_token_id={bos_token_id} is outside the model's vocabulary [0, {d_vocab}). "
            "Pass the model's own BOS id."
        )


def _describe(data: Any) -> str:
    return repr(str(data)) if isinstance(data, (str, Path)) else f"a {type(data).__name__}"
