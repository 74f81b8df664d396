"""Documents already in memory: tensors, arrays, lists of texts or of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saelens_certify.data.documents import (
    MASK_COLUMN,
    TOKEN_COLUMNS,
    Batch,
    Documents,
    check_integer,
    choose_column,
    mask_row,
    token_row,
)
from saelens_certify.data.sequences import DataSource
from saelens_certify.errors import CertifyError


def open_array(
    tokens: Any,
    mask: Any = None,
    names: Sequence[str] | None = None,
    source: DataSource | None = None,
    label: str = "tokens",
) -> Documents:
    """An integer tensor or array [n, >= L], one document a row.

    Raises:
        CertifyError: On a dtype that is not integer, or another number of dimensions.
    """
    array = as_array(tokens)
    check_integer(array.dtype, f"{label} array")
    if array.ndim != 2:
        raise CertifyError(
            f"{label} array has {array.ndim} dimensions (shape {list(array.shape)}), needs 2: "
            "[n_sequences, pos], one document a row. "
            "A flat stream of tokens has to be cut into its documents first."
        )
    return open_rows(array, mask, names, source, label)


def open_rows(
    rows: Sequence[Any] | np.ndarray,
    masks: Any = None,
    names: Sequence[str] | None = None,
    source: DataSource | None = None,
    label: str = "tokens",
) -> Documents:
    """Rows of token ids that are already checked, with masks and names that are not."""
    n = len(rows)
    check_names(names, n)
    if masks is not None:
        masks = as_array(masks) if not isinstance(masks, (list, tuple)) else masks
        if len(masks) != n:
            raise CertifyError(
                f"attention_mask has {len(masks)} rows for {n} documents. Give one row a document."
            )
        masks = [
            mask_row(mask, len(row), f"{label}:{i}")
            for i, (mask, row) in enumerate(zip(masks, rows, strict=True))
        ]

    def batches(size: int) -> Iterator[Batch]:
        for start in range(0, n, size):
            stop = min(start + size, n)
            ids = [names[i] if names is not None else f"{label}:{i}" for i in range(start, stop)]
            yield Batch(ids, rows[start:stop], None if masks is None else masks[start:stop])

    return Documents(source or DataSource(kind="tokens"), "tokens", batches, n)


def open_list(
    items: Sequence[Any], mask: Any = None, names: Sequence[str] | None = None
) -> Documents:
    """A list of texts, or of 1-D tensors, arrays or lists of token ids.

    Raises:
        CertifyError: If items are of mixed or other types; names the first offender.
    """
    if isinstance(items[0], str):
        for i, item in enumerate(items):
            if not isinstance(item, str):
                raise CertifyError(
                    f"document {i} is {type(item).__name__}, document 0 is text. Give texts only."
                )
        if mask is not None:
            raise CertifyError(
                "attention_mask was given for texts, which have no padding. Drop it."
            )
        return open_texts(items, names)
    if isinstance(items[0], (int, np.integer)):
        raise CertifyError(
            f"data is a flat list of numbers (first {items[0]!r}). "
            "Give one list of token ids a document: [[...], [...]]."
        )
    for i, item in enumerate(items):
        if isinstance(item, str) or not (
            isinstance(item, (list, tuple)) or hasattr(item, "__array__")
        ):
            raise CertifyError(
                f"document {i} is {type(item).__name__}, not token ids. "
                "Give texts only, or 1-D tensors or lists of token ids only."
            )
    return open_rows(
        [token_row(item, f"document {i}") for i, item in enumerate(items)], mask, names
    )


def open_mapping(
    data: Mapping[str, Any], mask: Any, names: Sequence[str] | None, text_column: str
) -> Documents:
    """A tokenizer's output: "input_ids" or "tokens", and perhaps "attention_mask"."""
    column = choose_column(data.keys(), text_column, "the mapping")
    rows = data[column]
    if mask is None and column in TOKEN_COLUMNS:
        mask = data.get(MASK_COLUMN)
    if isinstance(rows, (list, tuple)):
        if not rows:
            raise CertifyError(f"{column!r} of the mapping is empty. Give documents.")
        return open_list(rows, mask, names)
    return open_array(rows, mask, names)


def open_texts(
    texts: Sequence[str | None],
    names: Sequence[str] | None = None,
    source: DataSource | None = None,
    label: str = "text",
) -> Documents:
    """Texts that are all at hand."""
    n = len(texts)
    check_names(names, n)

    def batches(size: int) -> Iterator[Batch]:
        for start in range(0, n, size):
            stop = min(start + size, n)
            ids = [names[i] if names is not None else f"{label}:{i}" for i in range(start, stop)]
            yield Batch(ids, texts[start:stop])

    return Documents(source or DataSource(kind="text"), "text", batches, n)


def as_array(value: Any) -> np.ndarray:
    """A tensor on any device, or an array, as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.dtype.is_floating_point:
            # NumPy has no bfloat16; only the dtype matters, and it is refused.
            value = value.float()
    return np.asarray(value)


def check_names(names: Sequence[str] | None, n: int) -> None:
    """One name a sequence; sequences of one document share its name (see `find_clusters`)."""
    if names is None:
        return
    if len(names) != n:
        raise CertifyError(f"document_ids has {len(names)} names for {n} documents. Give one each.")
