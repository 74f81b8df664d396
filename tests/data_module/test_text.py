"""Text in memory, on disk, and through datasets."""

from __future__ import annotations

import hashlib
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify.data import as_sequences, load_documents, split
from saelens_certify.errors import CertifyError

from .conftest import WORDS, make_tokenizer

TEXTS = ["w0 w1 w2 w3", "w4 w5 w6", "w7", "w0 w1 w2 w9"]
WINDOWS = [[4, 5, 6], [8, 9, 10]]
TOKENIZER = make_tokenizer()


def read(data, **keywords):
    return as_sequences(data, **{"seq_len": 3, "d_vocab": 44, "tokenizer": TOKENIZER, **keywords})


def write(kind, folder):
    """TEXTS as a source of the kind; returns what is passed and the first two ids."""
    path = folder / f"data.{kind}"
    names = (f"data.{kind}:0", f"data.{kind}:1")
    if kind == "txt":
        path.write_bytes("\r\n\r\n \n".join(TEXTS).encode("utf-8-sig") + b"\n\n")
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in TEXTS]))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "tokens": [[0]] * 4}), path)
    elif kind == "txt_folder":
        path = folder / "corpus"
        (path / "sub").mkdir(parents=True)
        for i, text in enumerate(TEXTS):
            (path / ("sub" if i else "") / f"{i}.txt").write_text(text)
        names = ("0.txt", "sub/1.txt")
    elif kind == "dataset_folder":
        path = folder / "corpus"
        path.mkdir()
        pq.write_table(pa.table({"text": TEXTS}), path / "train-00000.parquet")
        names = ("corpus:train:0", "corpus:train:1")
    return path, names


KINDS = ["txt", "jsonl", "json", "parquet", "txt_folder", "dataset_folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_files(kind, tmp_path):
    path, names = write(kind, tmp_path)
    sequences = read(str(path))
    assert sequences.tokens.tolist() == WINDOWS
    assert sequences.document_ids == names
    source = sequences.source
    assert (source.kind, source.location) == (kind, str(path))
    assert (source.n_documents_read, source.n_too_short, source.n_duplicates) == (4, 1, 1)
    assert source.tokenizer == "local/words"
    assert not source.prepends_bos
    assert read(path, progress=True).source == source
    if path.is_file():
        assert source.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_follows_the_content(kind, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    one, other, changed = (write(kind, tmp_path / name)[0] for name in ("a", "b", "c"))
    if changed.is_dir():
        (changed / "zz.txt" if kind == "txt_folder" else changed / "zz.md").write_text("more")
    else:
        changed.write_bytes(changed.read_bytes() + b" ") if kind != "parquet" else pq.write_table(
            pa.table({"text": TEXTS[:2]}), changed
        )
    prints = [load_documents(path).source.fingerprint for path in (one, other, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_a_change_of_one_name_or_file_changes_a_folder_fingerprint(tmp_path):
    path, _ = write("txt_folder", tmp_path)
    first = load_documents(path).source.fingerprint
    (path / "sub" / "1.txt").rename(path / "sub" / "11.txt")
    assert load_documents(path).source.fingerprint != first


@pytest.mark.parametrize("as_dict", [True, False])
def test_saved_datasets(as_dict, tmp_path):
    dataset = Dataset.from_dict({"body": TEXTS})
    (DatasetDict({"test": dataset}) if as_dict else dataset).save_to_disk(tmp_path / "saved")
    sequences = read(tmp_path / "saved", text_column="body")
    assert sequences.tokens.tolist() == WINDOWS
    assert sequences.document_ids[0] == ("saved:test:0" if as_dict else "saved:0")
    assert sequences.source.column == "body"
    assert sequences.source.split == ("test" if as_dict else None)


def test_dataset_folder_with_splits_and_configs(tmp_path):
    folder = tmp_path / "corpus"
    for config in ("one", "two"):
        for name in ("train", "test"):
            (folder / config).mkdir(parents=True, exist_ok=True)
            text = f"w{len(config)} w2 {'w3' if config == 'one' else 'w4'} w5 w6 w7" + name[:0]
            (folder / config / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {c}/{s}.jsonl\n" for s in ("train", "test"))
            for c in ("one", "two")
        )
        + "---\n"
    )
    sequences = read(f"{folder}:two", split="test")
    assert sequences.tokens.tolist() == [[7, 6, 8]]
    assert sequences.document_ids == ("corpus:two:test:0",)
    assert sequences.source.split == "test"
    with pytest.raises(CertifyError, match=r"corpus:two needs a split; it has \['train', 'test'\]"):
        read(f"{folder}:two")
    with pytest.raises(CertifyError, match=r"cannot be opened: ValueError: .*[Cc]onfig"):
        read(f"{folder}:three", split="test")
    with pytest.raises(CertifyError, match=r"revision='main' was given, but .* has no revisions"):
        read(f"{folder}:two", split="test", revision="main")


def test_hub_names_go_through_load_dataset(tmp_path, monkeypatch):
    """The hub's own path, with a local folder standing in for the hub."""
    folder, _ = write("dataset_folder", tmp_path)
    real, calls = datasets.load_dataset, []

    def load(name, config=None, **keywords):
        calls.append((name, config, keywords))
        return real(str(folder), **{**keywords, "revision": None})

    class Api:
        def dataset_info(self, name, revision=None, timeout=None):
            assert (name, timeout) == ("owner/name", 30)
            return type("Info", (), {"sha": f"commit-of-{revision}"})

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    sequences = read("owner/name:config", split="train", revision="v2")
    assert calls == [("owner/name", "config", {"revision": "commit-of-v2", "streaming": True})]
    assert sequences.tokens.tolist() == WINDOWS
    assert sequences.document_ids[0] == "owner/name:config:train:0"
    source = sequences.source
    assert (source.kind, source.location) == ("hub", "owner/name:config")
    assert (source.split, source.revision, source.fingerprint) == ("train", *["commit-of-v2"] * 2)
    with pytest.raises(CertifyError, match="has no split 'trian'; it has .*Did you mean 'train'"):
        read("owner/name", split="trian")


def test_an_unreachable_hub_dataset_is_named(monkeypatch, caplog):
    def load(*_, **__):
        raise ConnectionError("no network")

    class Api:
        def dataset_info(self, *_, **__):
            raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(
        CertifyError, match=r"dataset 'owner/name' \(revision v1\) cannot be opened: Conn"
    ):
        read("owner/name", revision="v1")
    assert "revision of dataset owner/name is not pinned" in caplog.text


@pytest.mark.parametrize("form", ["list", "dataset", "iterable"])
def test_text_in_memory(form):
    dataset = Dataset.from_dict(
        {"text": TEXTS, "tokens": [[0]] * 4}, split=datasets.NamedSplit("train")
    )
    data = {"list": TEXTS, "dataset": dataset, "iterable": dataset.to_iterable_dataset()}[form]
    sequences = read(data)
    assert sequences.tokens.tolist() == WINDOWS
    prefix = "text" if form == "list" else "dataset"
    assert sequences.document_ids == (f"{prefix}:0", f"{prefix}:1")
    # An IterableDataset made from a Dataset no longer knows its split.
    assert sequences.source.split == ("train" if form == "dataset" else None)
    if form == "dataset":
        assert read(data, split="train").hashes == sequences.hashes
        with pytest.raises(CertifyError, match="split='test', but .* a single split .train"):
            read(data, split="test")


def test_null_texts_are_documents_without_tokens(tmp_path):
    assert read(Dataset.from_dict({"text": [None, "w1 w2 w3"]})).source.n_too_short == 1
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": null}\n{"text": "w1 w2 w3"}\n{"text": ""}\n')
    assert read(path).source.n_too_short == 2


documents = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=0, max_size=6).map(" ".join), min_size=1, max_size=20
)


@given(documents, st.sampled_from([None, True, False]), st.booleans())
def test_bos_against_a_naive_oracle(texts, prepend, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    sequences = read(texts, tokenizer=tokenizer, prepend_bos=prepend, minimum=0)
    front = [1] if prepend or (prepend is None and adds_bos) else []
    windows = []
    for text in texts:
        ids = front + [4 + WORDS.index(word) for word in text.split()]
        if len(ids) >= 3 and ids[:3] not in windows:
            windows.append(ids[:3])
    assert sequences.tokens.tolist() == windows
    assert sequences.source.prepends_bos == bool(front)


def test_bos_choices():
    assert read(["<s> w1 w2"], prepend_bos=True).tokens.tolist() == [[1, 5, 6]]
    assert read(["w1 w2"], prepend_bos=True, bos_token_id=2).tokens.tolist() == [[2, 5, 6]]
    without = make_tokenizer(bos=False)
    assert read(["w1 w2 w3"], tokenizer=without).tokens.tolist() == [[5, 6, 7]]
    assert read(["w1 w2"], tokenizer=without, prepend_bos=True, bos_token_id=1).source.prepends_bos
    with pytest.raises(CertifyError, match=r"prepend_bos=True, but tokenizer .* has no BOS token"):
        read(["w1 w2"], tokenizer=without, prepend_bos=True)


def test_pads_spelled_out_in_text_never_enter():
    sequences = read(["w1 <pad> w2", "w1 </s> w2", "w1 w2 w3 <pad>"])
    assert sequences.tokens.tolist() == [[5, 2, 6], [5, 6, 7]]
    assert (sequences.source.n_too_short, sequences.source.n_padded) == (1, 1)


def test_tokenizer_settings_left_by_others_do_not_matter():
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")
    assert read(TEXTS, tokenizer=tokenizer).tokens.tolist() == WINDOWS


@settings(max_examples=15)
@given(st.integers(1, 600), st.integers(0, 100))
def test_batches_and_order_do_not_matter(n, seed):
    texts = [f"w{i % 40} w{i // 40} w{(i * 7) % 40}" for i in range(n)]
    sequences = read(texts)
    assert len(sequences) == n
    assert sequences.source.n_documents_read == n
    one_by_one = [read([text]).hashes[0] for text in texts[:: max(1, n // 3)]]
    assert one_by_one == list(sequences.hashes[:: max(1, n // 3)])
    backwards = read(texts[::-1])
    assert backwards.canonical.hashes == sequences.canonical.hashes
    assert backwards.digest == sequences.digest
    a = split(sequences, (0.3, 0.7), seed=seed)["calibration"].digest
    assert a == split(backwards, (0.3, 0.7), seed=seed)["calibration"].digest


def test_ids_beyond_the_model_are_named():
    with pytest.raises(
        CertifyError, match=r"document text:1 has token id 43 at position 2.*\[0, 43\)"
    ):
        read(["w1 w2 w3", "w1 w2 w39"], d_vocab=43)


def test_limit_stops_reading():
    sequences = read([*TEXTS, "w9 w9 w9"], limit=2)
    assert (len(sequences), sequences.source.n_documents_read) == (2, 2)
    assert len(read([*TEXTS, "w9 w9 w9"], limit=3)) == 3


def test_bad_files_are_refused(tmp_path):
    def refused(name, content, message, **keywords):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CertifyError, match=message):
            load_documents(path, **keywords)

    good = b'{"text": "a"}\n'
    refused("a.csv", b"a,b", r"a\.csv has the unknown suffix '\.csv'; known are \.txt, \.jsonl")
    refused("a.pt", b"PK", r"a\.pt is a \.pt file: pickle can run code.*safetensors")
    refused("a.jsonl", b"", r"a\.jsonl is empty \(0 bytes\)")
    refused("a.jsonl", b"\n\n", r"a\.jsonl holds no documents")
    refused("a.jsonl", good * 300 + b"\n{oops}\n" + good, r"a\.jsonl line 302 is not valid JSON")
    refused("a.jsonl", good + b'{"text": "\xff"}\n', r"a\.jsonl line 2 is not valid JSON")
    refused("a.jsonl", good + b'{"txt": "a"}\n', r"line 2 has no 'text': it has \['txt'\]")
    refused("a.jsonl", good + b'"a"\n', r"line 2 has no 'text': it is str")
    refused("a.jsonl", good + b'{"text": [1]}\n', r"line 2 holds list where the first")
    refused("a.jsonl", b'{"texts": "a"}\n', r"line 1 has no column 'text'.*Did you mean 'texts'")
    refused("a.jsonl", b'{"tokens": [1]}\n{"tokens": [0.5]}\n', r"line 2 has dtype float64")
    refused("a.jsonl", b'{"text": {"x": 1}}\n', r"line 1 holds dict \(\{'x': 1\}\), neither text")
    refused(
        "a.jsonl",
        b'{"tokens": [1, 2], "attention_mask": [1]}\n',
        r"line 1: attention_mask has shape \[1\]",
    )
    refused("a.json", b'[{"text": "a"}', r"a\.json is not valid JSON.*\.jsonl")
    refused("a.json", b'{"text": "a"}', r"a\.json holds one dict, needs a list")
    refused("a.json", b"[]", r"a\.json holds no documents")
    refused("a.json", b'[{"text": "a"}, {"text": 3}]', r"record 1 holds int")
    refused("a.txt", b"caf\xe9 w1", r"a\.txt is not UTF-8 \(byte 3: 0xe9\)")
    refused("a.parquet", b"rubbish", r"a\.parquet cannot be read as Parquet")
    refused("a.txt", b"w1", r"split='train' was given, but .*a\.txt has no splits", split="train")
    refused("a.txt", b"w1", r"document_ids= goes with tokens or texts", document_ids=["a"])
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(CertifyError, match=r"blank\.txt: 0 sequences.* 0 documents were read"):
        read(tmp_path / "blank.txt")


def test_bad_parquet_columns_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1.5], "contents": ["a"], "words": [["a"]]}), path)
    with pytest.raises(CertifyError, match="column 'text' holds double, neither text nor lists of"):
        load_documents(path)
    with pytest.raises(CertifyError, match=r"column 'words' holds list.*string"):
        load_documents(path, text_column="words")
    with pytest.raises(CertifyError, match="no column 'content'.*Did you mean 'contents'"):
        load_documents(path, text_column="content")
    assert load_documents(path, text_column="contents").total == 1


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "no/such/folder", "a/b.parquet", "plain", "a/b.pt"]
)
def test_missing_paths_are_refused(name):
    with pytest.raises(CertifyError, match=re.escape(f"data {name!r}: no such file or folder")):
        load_documents(name)


def test_empty_folder_and_missing_tokenizer(tmp_path):
    with pytest.raises(CertifyError, match=r"folder .* is empty"):
        load_documents(tmp_path)
    with pytest.raises(CertifyError, match=r"holds text .*, which needs tokenizer="):
        as_sequences(TEXTS, seq_len=3, d_vocab=44)
    with pytest.raises(CertifyError, match="attention_mask was given for texts"):
        load_documents(TEXTS, attention_mask=[[1]])
