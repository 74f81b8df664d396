"""Token data in memory and on disk."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from saelens_certify.data import as_sequences
from saelens_certify.errors import CertifyError

IDS = [[1, 5, 6, 7], [1, 8, 9, 10, 11], [1, 3], [1, 5, 6, 9]]
WINDOWS = [[1, 5, 6], [1, 8, 9]]  # the third is too short, the fourth repeats the first


def read(data, **keywords):
    return as_sequences(data, **{"seq_len": 3, "d_vocab": 12, **keywords})


def write(kind, folder):
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"input_ids": row, "n": 1}) for row in IDS) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(IDS))
    elif kind == "parquet":
        pq.write_table(pa.table({"tokens": IDS, "other": ["x"] * len(IDS)}), path)
    elif kind == "safetensors":
        flat = np.concatenate([np.array(row, dtype=np.int32) for row in IDS])
        offsets = np.cumsum([0, *map(len, IDS)])
        save_file({"tokens": flat, "offsets": offsets}, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "column"),
    [("jsonl", "input_ids"), ("json", None), ("parquet", "tokens"), ("safetensors", None)],
)
def test_ragged_files(kind, column, tmp_path):
    path = write(kind, tmp_path)
    sequences = read(path)
    assert sequences.tokens.tolist() == WINDOWS
    assert sequences.document_ids == (f"data.{kind}:0", f"data.{kind}:1")
    source = sequences.source
    assert (source.kind, source.location, source.column) == (kind, path, column)
    assert (source.n_documents_read, source.n_too_short, source.n_duplicates) == (4, 1, 1)
    assert source.fingerprint is not None
    assert len(source.fingerprint) == 64
    assert source.prepends_bos
    assert source.first_token == 1
    assert source.tokenizer is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64])
def test_npy(dtype, tmp_path):
    array = np.arange(20, dtype=dtype).reshape(4, 5) % 12
    np.save(tmp_path / "t.npy", array)
    sequences = read(tmp_path / "t.npy")
    assert sequences.tokens.tolist() == array[:, :3].tolist()
    assert sequences.document_ids[3] == "t.npy:3"
    assert sequences.source.kind == "npy"


def test_safetensors_with_masks(tmp_path):
    path = tmp_path / "t.safetensors"
    tokens = np.array([[0, 1, 2, 3], [4, 5, 6, 0]])
    save_file({"tokens": tokens, "attention_mask": (tokens != 0).astype(np.int64)}, path)
    assert read(path).tokens.tolist() == [[1, 2, 3], [4, 5, 6]]
    save_file(
        {
            "tokens": tokens.ravel(),
            "attention_mask": (tokens != 0).astype(np.int64).ravel(),
            "offsets": np.array([0, 4, 8]),
        },
        path,
    )
    assert read(path).tokens.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_parquet_list_kinds_nulls_and_masks(tmp_path):
    path = tmp_path / "t.parquet"
    fixed = pa.array([[0, 1, 2, 3], [4, 5, 6, 0]], pa.list_(pa.int16(), 4))
    mask = pa.array([[0, 1, 1, 1], [1, 1, 1, 0]], pa.list_(pa.int8()))
    pq.write_table(pa.table({"tokens": fixed, "attention_mask": mask}), path)
    assert read(path).tokens.tolist() == [[1, 2, 3], [4, 5, 6]]
    large = pa.array([[1, 2, 3], None, [4, 5, 6]], pa.large_list(pa.int64()))
    pq.write_table(pa.table({"tokens": large}), path)
    sequences = read(path)
    assert sequences.tokens.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert sequences.source.n_too_short == 1
    pq.write_table(pa.table({"tokens": pa.array([[1, None, 3]])}), path)
    with pytest.raises(CertifyError, match=r"t\.parquet:0 has dtype float64; token ids must be"):
        read(path)


@pytest.mark.parametrize("form", ["dataset", "torch format", "iterable", "generator", "dict"])
@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_datasets_of_tokens(form, column):
    dataset = Dataset.from_dict({column: IDS, "other": list("abcd")})
    data = dataset
    if form == "torch format":
        data = dataset.with_format("torch")
    elif form == "iterable":
        data = dataset.to_iterable_dataset()
    elif form == "generator":
        data = IterableDataset.from_generator(lambda: iter([{column: row} for row in IDS]))
    elif form == "dict":
        data = DatasetDict({"train": dataset})
    sequences = read(data)
    assert sequences.tokens.tolist() == WINDOWS
    assert sequences.document_ids == ("dataset:0", "dataset:1")
    assert sequences.source.kind == "dataset"
    assert sequences.source.column == column
    if form in ("dataset", "dict"):
        assert sequences.source.fingerprint == dataset._fingerprint


def test_dataset_mask_column():
    dataset = Dataset.from_dict(
        {"input_ids": [[0, 5, 6, 7], [8, 9, 0, 0]], "attention_mask": [[0, 1, 1, 1], [1, 1, 0, 0]]}
    )
    sequences = read(dataset)
    assert sequences.tokens.tolist() == [[5, 6, 7]]
    assert sequences.source.n_too_short == 1


@given(st.integers(0, 8), st.sampled_from(["tensor", "array", "tuple", "tensors", "arrays"]))
def test_memory_forms_agree(extra, form):
    table = np.random.default_rng(extra).integers(0, 12, (6, 3 + extra))
    data = {
        "tensor": torch.from_numpy(table),
        "array": table.astype(np.uint8),
        "tuple": tuple(row.tolist() for row in table),
        "tensors": [torch.from_numpy(row) for row in table],
        "arrays": list(table.astype(np.int16)),
    }[form]
    sequences = read(data, on_duplicate="keep")
    assert sequences.tokens.tolist() == table[:, :3].tolist()


def test_names_limit_minimum_and_duplicates():
    names = ["a", "b", "c", "d"]
    assert read(IDS, document_ids=names).document_ids == ("a", "b")
    kept = read(IDS, document_ids=names, on_duplicate="keep")
    assert kept.document_ids == ("a", "b", "d")
    assert kept.source.n_duplicates == 1
    with pytest.raises(CertifyError, match="documents a and d have the same first 3 tokens"):
        read(IDS, document_ids=names, on_duplicate="error")
    one = read(IDS, limit=1)
    assert (len(one), one.source.n_documents_read) == (1, 1)
    with pytest.raises(CertifyError, match=r"tokens data: 2 sequences .* at least 3 needed"):
        read(IDS, minimum=3)
    # What follows the limit is not looked at.
    assert len(read([[1, 2, 3], [99, 99, 99]], limit=1)) == 1


def test_prepends_bos_is_stated_for_tokens(tokenizer):
    tokens = torch.tensor([[1, 5, 6], [1, 8, 9]])
    assert read(tokens, bos_token_id=1).source.prepends_bos
    assert read(tokens, tokenizer=tokenizer).source.prepends_bos
    assert not read(tokens, bos_token_id=2).source.prepends_bos
    assert read(tokens, bos_token_id=2).source.first_token == 1
    assert read(tokens).source.prepends_bos
    assert not read(tokens[:1]).source.prepends_bos
    mixed = read(torch.tensor([[1, 5, 6], [2, 8, 9]]), bos_token_id=1).source
    assert (mixed.prepends_bos, mixed.first_token) == (False, None)


def test_the_input_is_not_changed():
    tokens = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 2]], dtype=torch.int32)
    before = tokens.clone()
    sequences = read(tokens)
    sequences.tokens.zero_()
    assert torch.equal(tokens, before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(3, 4), "tokens array has dtype float32; token ids must be integers"),
        (torch.rand(3, 4).bfloat16(), "token ids must be integers"),
        (torch.ones(3, 4, dtype=torch.bool), "tokens array has dtype bool"),
        (torch.arange(4), "has 1 dimensions (shape [4]), needs 2"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "has 3 dimensions (shape [1, 2, 3])"),
        ([1, 2, 3], "a flat list of numbers (first 1)"),
        ([[1, 2, 3], [1, 2.5, 3]], "document 1 has dtype float64"),
        ([[1, 2, 3], [True, False, True]], "document 1 has dtype bool"),
        ([[1, 2, 3], [[1], [2], [3]]], "document 1 has 2 dimensions (shape [3, 1])"),
        ([[1, 2, 3], [[1], [2, 3]]], "document 1 is not a list of token ids"),
        ([[1, 2, 3], "text"], "document 1 is str, not token ids"),
        (["text", [1, 2, 3]], "document 1 is list, document 0 is text"),
        ([], "data is an empty list"),
        ({"input_ids": []}, "'input_ids' of the mapping is empty"),
        ({"ids": [[1, 2, 3]]}, "the mapping has no column 'text'; it has ['ids']"),
        (torch.zeros(0, 3, dtype=torch.int64), "0 documents were read"),
        ([[1, 2, 3], [1, 12, 3]], "document tokens:1 has token id 12 at position 1, outside"),
        ([[1, 2, 3], [1, 5, -1]], "document tokens:1 has token id -1 at position 2, outside"),
        (np.array([[1, 2, 2**40]]), f"token id {2**40} at position 2"),
        (42, "data is a int. Give Sequences, token ids"),
        (None, "data is a NoneType"),
        (Dataset.from_dict({"x": []}), "dataset has no rows"),
        (Dataset.from_dict({"text": [1.5]}), "holds float (1.5), neither text nor"),
        (Dataset.from_dict({"tokens": [[0.5]]}), "has dtype float64; token ids must be integers"),
        (Dataset.from_dict({"txt": ["a"], "id": [1]}), "Did you mean 'txt'?"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(CertifyError, match=re.escape(message)):
        read(data)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"seq_len": 1}, "seq_len=1; a sequence needs at least 2 tokens"),
        ({"d_vocab": 0}, "d_vocab=0 is no vocabulary size"),
        ({"limit": 0}, "limit=0; ask for at least 1"),
        (
            {"on_duplicate": "dropp"},
            "on_duplicate='dropp'; known are ('drop', 'error', 'keep'). Did you mean 'drop'?",
        ),
        ({"bos_token_id": 12}, "bos_token_id=12 is outside the model's vocabulary [0, 12)"),
        ({"split": "train"}, "split='train' goes with a dataset, not a list"),
        ({"revision": "main"}, "revision='main' goes with a dataset, not a list"),
        ({"document_ids": ["a"]}, "document_ids has 1 names for 4 documents"),
        (
            {"seq_len": 9},
            "0 sequences of L = 9 tokens, at least 1 needed. 4 documents were read, 4 were too short",
        ),
    ],
)
def test_bad_arguments_are_refused(keywords, message):
    with pytest.raises(CertifyError, match=re.escape(message)):
        read(IDS, **keywords)


def test_sequences_of_one_document_share_its_name():
    names = ("a", "b", "b", "c")
    found = read(IDS, seq_len=2, document_ids=list(names), on_duplicate="keep")
    assert found.document_ids == names
    assert read(found, seq_len=2, on_duplicate="keep").document_ids == names


def test_dataset_splits_are_chosen_by_name():
    a, b = Dataset.from_dict({"tokens": [[1, 2, 3]]}), Dataset.from_dict({"tokens": [[4, 5, 6]]})
    data = DatasetDict({"train": a, "validation": b})
    assert read(data, split="validation").tokens.tolist() == [[4, 5, 6]]
    with pytest.raises(CertifyError, match=r"dataset needs a split; it has \['train', 'valid"):
        read(data)
    with pytest.raises(CertifyError, match=r"no split 'valdation'.*Did you mean 'validation'"):
        read(data, split="valdation")
    with pytest.raises(
        CertifyError, match=r"split='train', but the dataset given is a single split"
    ):
        read(a, split="train")
    with pytest.raises(CertifyError, match=r"revision='v1' goes with a hub name"):
        read(a, revision="v1")
    with pytest.raises(CertifyError, match=r"attention_mask= goes with tokens or texts in memory"):
        read(a, attention_mask=[[1]])


def test_bad_token_files_are_refused(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.array([[1, 2], [3]], dtype=object), allow_pickle=True)
    with pytest.raises(CertifyError, match=r"object arrays are pickle.*safetensors"):
        read(path)
    path.write_bytes(b"\x93NUMPY rubbish")
    with pytest.raises(CertifyError, match=r"t\.npy is not a plain array of numbers"):
        read(path)
    np.save(path, np.arange(5))
    with pytest.raises(CertifyError, match=r"t\.npy array has 1 dimensions"):
        read(path)
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"rubbish")
    with pytest.raises(CertifyError, match="cannot be read as safetensors"):
        read(path)
    save_file({"token": np.zeros((2, 3), np.int64)}, path)
    with pytest.raises(CertifyError, match=r"no column 'text'; it has \['token'\]"):
        read(path)
    with pytest.raises(CertifyError, match=r"no column 'tokns'.*Did you mean 'token'"):
        read(path, text_column="tokns")
    assert len(read(path, text_column="token")) == 1
    flat = np.arange(6)
    for arrays, message in [
        ({"tokens": flat}, "has 1 dimensions"),
        ({"tokens": flat, "offset": flat}, "found 'offset'"),
        ({"tokens": flat, "offsets": np.array([0, 4, 3, 6])}, "falling somewhere"),
        ({"tokens": flat, "offsets": np.array([0, 3])}, r"rise from 0 to 6 .* are 0 \.\.\. 3"),
        ({"tokens": flat, "offsets": np.array([0.0, 6.0])}, "'offsets' has dtype float64"),
        ({"tokens": flat.reshape(2, 3), "offsets": np.array([0, 6])}, "go with flat tokens"),
        ({"tokens": flat * 0.5, "offsets": np.array([0, 6])}, "'tokens' has dtype float64"),
        (
            {"tokens": flat, "offsets": np.array([0, 6]), "attention_mask": np.ones(5)},
            r"attention_mask has shape \[5\], tokens \[6\]",
        ),
    ]:
        save_file(arrays, path)
        with pytest.raises(CertifyError, match=message):
            read(path)
