"""What every source is turned into: documents, read in batches, as text or as token ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from saelens_certify.data.sequences import DataSource
from saelens_certify.errors import CertifyError

TOKEN_COLUMNS = ("tokens", "input_ids")
MASK_COLUMN = "attention_mask"


class Batch(NamedTuple):
    """Some documents: ids, and either texts or 1-D integer rows (with their masks, if any)."""

    ids: list[str]
    rows: Sequence[Any] | np.ndarray
    masks: Sequence[Any] | None = None


@dataclass(frozen=True)
class Documents:
    """An opened source that can be read more than once.

    Attributes:
        source: Where the documents come from; its counts are still zero.
        holds: Whether rows are texts or token ids.
        batches: Reads all documents from the start, ``batches(size)`` at a time.
        total: Number of documents, where it is known without reading.
    """

    source: DataSource
    holds: Literal["text", "tokens"]
    batches: Callable[[int], Iterator[Batch]]
    total: int | None = None


def choose_column(columns: Iterable[str], text_column: str, where: str) -> str:
    """The column to read: ``text_column`` if there, else (by default) a column of token ids.

    Raises:
        CertifyError: If there is no such column; names the near ones.
    """
    columns = list(columns)
    if text_column in columns:
        return text_column
    if text_column == "text":
        for name in TOKEN_COLUMNS:
            if name in columns:
                return name
    near = difflib.get_close_matches(text_column, columns, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise CertifyError(
        f"{where} has no column {text_column!r}; it has {columns}.{hint} "
        "Name the column of texts or token ids with text_column (--text_column)."
    )


def choose_split(splits: Iterable[str], split: str | None, where: str) -> str:
    """The split to read: the one asked for, or the only one.

    Raises:
        CertifyError: If it does not exist, or none was asked for and there are several.
    """
    splits = [str(name) for name in splits]
    if split in splits:
        return str(split)
    if split is None and len(splits) == 1:
        return splits[0]
    problem = "needs a split" if split is None else f"has no split {split!r}"
    near = difflib.get_close_matches(split or "", splits, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CertifyError(f"{where} {problem}; it has {splits}.{hint} Name one with split (--split).")


def kind_of_value(value: Any, where: str) -> Literal["text", "tokens"]:
    """Whether a column's first value is a text or a row of token ids."""
    if value is None or isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        token_row(value, where)
        return "tokens"
    raise CertifyError(
        f"{where} holds {type(value).__name__} ({value!r}), neither text nor a list of token ids. "
        "Name another column with text_column (--text_column)."
    )


def text_value(value: Any, where: str) -> str | None:
    """One document's text; None (a null) is a document without tokens.

    Raises:
        CertifyError: If the value is anything else.
    """
    if value is None or isinstance(value, str):
        return value
    raise CertifyError(
        f"{where} holds {type(value).__name__} where the first document holds text. "
        "Give one kind of document only."
    )


def token_row(value: Any, where: str) -> np.ndarray:
    """One document's token ids as a 1-D integer array.

    Raises:
        CertifyError: If the value is not 1-D or not of integers.
    """
    if value is None:
        return np.empty(0, np.int64)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        row = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise CertifyError(
            f"{where} is not a list of token ids ({error}). Give whole numbers."
        ) from error
    if row.ndim == 1 and row.size == 0:
        return row.astype(np.int64)
    if row.ndim != 1:
        raise CertifyError(
            f"{where} has {row.ndim} dimensions (shape {list(row.shape)}), a document's token ids "
            "have 1. Give one flat list of ids a document."
        )
    check_integer(row.dtype, where)
    return row


def check_integer(dtype: Any, where: str) -> None:
    """Refuse token ids that are not integers (bool, float, object)."""
    if np.dtype(dtype).kind not in "iu":
        raise CertifyError(
            f"{where} has dtype {dtype}; token ids must be integers. "
            "Activations, embeddings and masks are not data: give the token ids."
        )


def mask_row(value: Any, length: int, where: str) -> np.ndarray:
    """One document's attention mask as a bool array of its length.

    Raises:
        CertifyError: If the length differs or a value is neither 0 nor 1.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    mask = np.asarray(value)
    if mask.shape != (length,):
        raise CertifyError(
            f"{where}: attention_mask has shape {list(mask.shape)}, its token ids have [{length}]. "
            "Give one 0 or 1 a token."
        )
    if not np.isin(mask, (0, 1)).all():
        raise CertifyError(f"{where}: attention_mask has values other than 0 and 1. Give 0 or 1.")
    return mask.astype(bool)
