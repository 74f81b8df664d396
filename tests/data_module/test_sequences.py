from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify.data import DataSource, Sequences, as_sequences
from saelens_certify.errors import CertifyError

rows = st.lists(
    st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3), min_size=1, max_size=20
)


def test_golden_hash_and_digest():
    sequences = Sequences.from_tokens(torch.tensor([[0, 1, 2], [50256, 2**31 - 1, 7]]))
    assert sequences.hashes == (
        hashlib.sha256(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])).hexdigest(),
        hashlib.sha256(struct.pack("<3i", 50256, 2**31 - 1, 7)).hexdigest(),
    )
    # Written down once: a change here breaks every certificate ever saved.
    assert sequences.hashes[0] == "ad5dc1478de06a4c2728ea528bd9361a4b945e92a414bf4d180cedaaeaa5f4cc"
    assert sequences.digest == "c7722609dcac32d72a3896a4515299281c854b959378a506f9b24dda27d23dd8"


@given(rows)
def test_hash_is_that_of_little_endian_int32(ids):
    sequences = Sequences.from_tokens(torch.tensor(ids))
    for row, digest in zip(ids, sequences.hashes, strict=True):
        assert digest == hashlib.sha256(struct.pack("<3i", *row)).hexdigest()
    raw = b"".join(sorted(bytes.fromhex(h) for h in sequences.hashes))
    assert sequences.digest == hashlib.sha256(raw).hexdigest()


@given(rows, st.sampled_from([torch.int64, torch.int32]), st.booleans())
def test_dtype_and_strides_do_not_enter_the_hash(ids, dtype, transposed):
    plain = Sequences.from_tokens(torch.tensor(ids))
    tensor = torch.tensor(ids, dtype=dtype)
    other = Sequences.from_tokens(tensor.T.contiguous().T if transposed else tensor)
    assert other.hashes == plain.hashes
    assert other.tokens.dtype == torch.int64


@given(rows, st.randoms(use_true_random=False))
def test_canonical_order_and_digest_ignore_input_order(ids, random):
    names = [f"doc{i}" for i in range(len(ids))]
    order = list(range(len(ids)))
    random.shuffle(order)
    a = Sequences.from_tokens(torch.tensor(ids), names)
    b = Sequences.from_tokens(torch.tensor([ids[i] for i in order]), [names[i] for i in order])
    assert a.digest == b.digest
    assert a.canonical.document_ids == b.canonical.document_ids
    assert torch.equal(a.canonical.tokens, b.canonical.tokens)
    assert list(a.canonical.hashes) == sorted(a.hashes)


def test_select_take_len_and_source():
    source = DataSource(kind="npy", location="x.npy", n_documents_read=4)
    sequences = Sequences.from_tokens(torch.arange(12).view(4, 3), ["a", "b", "c", "d"], source)
    assert len(sequences) == 4
    assert sequences.seq_len == 3
    assert sequences.take(2).document_ids == ("a", "b")
    assert sequences.take(0).tokens.shape == (0, 3)
    picked = sequences.select(torch.tensor([3, 0]))
    assert picked.document_ids == ("d", "a")
    assert picked.tokens.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert picked.hashes == (sequences.hashes[3], sequences.hashes[0])
    assert picked.source is source
    with pytest.raises(CertifyError, match=r"take\(5\) of 4 sequences"):
        sequences.take(5)
    with pytest.raises(CertifyError, match=r"index -1 is outside 0\.\.3"):
        sequences.select([-1])


def test_frozen_and_checked():
    sequences = Sequences.from_tokens(torch.arange(6).view(2, 3))
    with pytest.raises(AttributeError):
        sequences.tokens = torch.zeros(1, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CertifyError, match=r"int64 \[n_sequences, pos\], is torch.float32"):
        Sequences(torch.zeros(2, 3), ("a", "b"), ("c", "d"), DataSource())
    with pytest.raises(CertifyError, match="2 rows of tokens, 1 document ids and 2 hashes"):
        Sequences(torch.zeros(2, 3, dtype=torch.int64), ("a",), ("c", "d"), DataSource())


def test_source_round_trips_through_json():
    source = DataSource(
        "hub", "a/b:c", "train", "f00", "text", "ff", 9, 1, 1, 2, "gpt2", True, 0, ("x",)
    )
    assert DataSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_shorter_prefix_of_sequences_is_hashed_again():
    long = as_sequences(torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7]]), seq_len=3, d_vocab=10)
    assert as_sequences(long, seq_len=3, d_vocab=10).hashes == long.hashes
    short = as_sequences(long, seq_len=2, d_vocab=10)
    assert short.tokens.tolist() == [[1, 2], [5, 6]]
    assert short.hashes == Sequences.from_tokens(torch.tensor([[1, 2], [5, 6]])).hashes
    assert short.document_ids == ("tokens:0", "tokens:2")
    assert (short.source.n_documents_read, short.source.n_duplicates) == (3, 1)
    with pytest.raises(CertifyError, match=r"document_ids= was given, but Sequences carry"):
        as_sequences(long, seq_len=3, d_vocab=10, document_ids=["a"])
    with pytest.raises(CertifyError, match=r"have 3 tokens, seq_len=4"):
        as_sequences(long, seq_len=4, d_vocab=10)
    with pytest.raises(CertifyError, match=r"document tokens:2 has token id 7 at position 2"):
        as_sequences(long, seq_len=3, d_vocab=7)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 30))
def test_prefix_hashes_match_a_fresh_cut(length, n):
    tokens = torch.from_numpy(np.random.default_rng(n).integers(0, 50, (n, 5)))
    sequences = Sequences.from_tokens(tokens)
    assert sequences.prefix_hashes(length) == Sequences.from_tokens(tokens[:, :length]).hashes
