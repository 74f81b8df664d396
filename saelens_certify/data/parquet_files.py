"""Text or token columns of a Parquet file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saelens_certify.data.documents import (
    MASK_COLUMN,
    Batch,
    Documents,
    choose_column,
    mask_row,
    token_row,
)
from saelens_certify.data.sequences import DataSource
from saelens_certify.errors import CertifyError


def open_parquet(path: Path, source: DataSource, text_column: str) -> Documents:
    """Open a Parquet file; row groups are read as they are needed."""
    try:
        with pq.ParquetFile(path) as file:
            schema, total = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise CertifyError(
            f"{path} cannot be read as Parquet ({error}). Write it again."
        ) from error
    column = choose_column(schema.names, text_column, str(path))
    holds = _kind(schema.field(column).type, f"{path} column {column!r}")
    masked = holds == "tokens" and MASK_COLUMN in schema.names
    columns = [column, MASK_COLUMN] if masked else [column]

    def batches(size: int) -> Iterator[Batch]:
        start = 0
        with pq.ParquetFile(path) as file:
            for table in file.iter_batches(batch_size=size, columns=columns):
                ids = [f"{path.name}:{start + i}" for i in range(len(table))]
                start += len(table)
                if holds == "text":
                    yield Batch(ids, table.column(0).to_pylist())
                    continue
                rows = [
                    token_row(_values(v), name) for v, name in zip(table[column], ids, strict=True)
                ]
                masks = None
                if masked:
                    masks = [
                        mask_row(_values(mask), len(row), name)
                        for mask, row, name in zip(table[MASK_COLUMN], rows, ids, strict=True)
                    ]
                yield Batch(ids, rows, masks)

    return Documents(dataclasses.replace(source, column=column), holds, batches, total)


def _values(scalar: Any) -> np.ndarray:
    values = scalar.values
    return np.empty(0, np.int64) if values is None else values.to_numpy(zero_copy_only=False)


def _kind(kind: pa.DataType, where: str) -> Literal["text", "tokens"]:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        return "text"
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    if is_list and pa.types.is_integer(kind.value_type):
        return "tokens"
    raise CertifyError(
        f"{where} holds {kind}, neither text nor lists of integers. "
        "Name another column with text_column (--text_column)."
    )
