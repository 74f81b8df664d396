"""Documents of an ActivationsStore: each once, by themselves, and the store left where it was."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, NamedSplit
from hypothesis import given, settings
from hypothesis import strategies as st

from integrations import sae_lens_world as world
from saelens_certify import CertifyConfig, CertifyError, certify, store_draws
from saelens_certify.integrations.sae_lens import (
    documents_of_store,
    is_store,
    resolve_stores,
    sequences_of_store,
)
from saelens_certify.integrations.sae_lens.activations_store import draw

CONFIG = CertifyConfig(seq_len=world.SEQ_LEN, progress=False, seed=5)


def _long_enough(texts: list[str], length: int = world.SEQ_LEN) -> list[list[int]]:
    """What must come out: BOS and the first words of each document that has enough."""
    rows = [[0, *(int(word[1:]) for word in text.split())] for text in texts]
    return [row[:length] for row in rows if len(row) >= length]


def test_every_document_gives_one_sequence_and_none_spans_two() -> None:
    found = sequences_of_store(world.store(), CONFIG)
    wanted = _long_enough(world.texts(300))
    assert found.tokens.tolist() == wanted
    assert found.source.n_documents_read == 300
    assert found.source.n_too_short == 300 - len(wanted) > 0
    assert found.source.prepends_bos
    assert found.source.kind == "activations_store"


def test_the_stream_itself_would_mix_documents() -> None:
    """The trap that is closed: contexts of the store hold separators and begin inside documents."""
    contexts = world.store().get_batch_tokens(40)[:, : world.SEQ_LEN].tolist()
    assert any(0 in row[1:] for row in contexts)
    wanted = {tuple(row) for row in _long_enough(world.texts(300))}
    assert sum(tuple(row) in wanted for row in contexts) < len(contexts) / 2


def test_prepend_bos_of_the_store_counts() -> None:
    sae = world.trained_sae()
    sae.cfg.metadata.prepend_bos = False
    found = sequences_of_store(world.store(sae=sae), CONFIG)
    assert found.tokens[:, 0].min() > 0
    assert not found.source.prepends_bos


@pytest.mark.parametrize(
    "options",
    [
        {"disable_concat_sequences": True},
        {"sequence_separator_token": "eos"},
        {"sequence_separator_token": None},
    ],
)
def test_how_the_store_joins_documents_does_not_matter(options: dict[str, Any]) -> None:
    plain = sequences_of_store(world.store(), CONFIG)
    assert sequences_of_store(world.store(**options), CONFIG).hashes == plain.hashes


def test_a_column_of_another_name() -> None:
    dataset = Dataset.from_dict({"problem": world.texts(60)})
    found = sequences_of_store(world.store(dataset), CONFIG)
    assert found.tokens.tolist() == _long_enough(world.texts(60))


def _datasets() -> dict[str, Any]:
    data = world.text_dataset()

    def rows() -> Any:
        yield from data

    return {
        "in memory": data,
        "streamed": data.to_iterable_dataset(num_shards=5),
        "generated": IterableDataset.from_generator(rows),
        "shuffled stream": data.to_iterable_dataset(num_shards=5).shuffle(seed=1, buffer_size=20),
    }


@pytest.mark.parametrize("name", list(_datasets()))
def test_the_position_of_the_store_is_not_moved(name: str) -> None:
    touched, untouched = world.store(_datasets()[name]), world.store(_datasets()[name])
    for _ in range(3):
        assert torch.equal(touched.get_batch_tokens(4), untouched.get_batch_tokens(4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sequences_of_store(touched, CONFIG, limit=40)
    assert touched.n_dataset_processed == untouched.n_dataset_processed
    assert torch.equal(touched.get_batch_tokens(30), untouched.get_batch_tokens(30))


def test_an_exhausted_dataset_does_not_begin_again() -> None:
    small = world.store(world.text_dataset(20))
    wanted = _long_enough(world.texts(20))
    assert len(sequences_of_store(small, CONFIG, limit=500)) == len(wanted)
    with pytest.warns(UserWarning, match=f"gives {len(wanted)} sequences of 12 tokens, 500"):
        calibration, evaluation = draw(small, CONFIG, n_calibration=400, n_evaluation=100)
    assert len(calibration) + len(evaluation) == len(wanted)
    assert len(evaluation) == round(len(wanted) / 5)


def test_repeated_documents_count_once() -> None:
    dataset = Dataset.from_dict({"text": world.texts(50) * 3})
    found = sequences_of_store(world.store(dataset), CONFIG)
    assert len(found) == len(_long_enough(world.texts(50)))
    assert found.source.n_duplicates == 2 * len(found)


@settings(max_examples=15)
@given(seed=st.integers(0, 10), limit=st.integers(2, 120))
def test_a_limited_sample_is_random_and_named_by_its_rows(seed: int, limit: int) -> None:
    config = CertifyConfig(seq_len=world.SEQ_LEN, progress=False, seed=seed)
    texts = world.texts(300)
    found = sequences_of_store(world.store(), config, limit=limit)
    assert len(found) == limit
    rows = [int(name.removeprefix("dataset:")) for name in found.document_ids]
    assert len(set(rows)) == limit
    for row, tokens in zip(rows, found.tokens.tolist(), strict=True):
        assert tokens == _long_enough([texts[row]])[0]
    if limit > 20:
        assert rows != sorted(rows)
        assert max(rows) > 200


@settings(max_examples=15)
@given(seed=st.integers(0, 5), sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_calibration_and_evaluation_of_one_store_never_meet(
    seed: int, sizes: tuple[int, int]
) -> None:
    config = CertifyConfig(seq_len=world.SEQ_LEN, progress=False, seed=seed)
    calibration, evaluation = draw(
        world.store(), config, n_calibration=sizes[0], n_evaluation=sizes[1]
    )
    assert (len(calibration), len(evaluation)) == sizes
    assert not set(calibration.hashes) & set(evaluation.hashes)


def test_stores_on_both_sides_are_divided_and_other_data_is_let_through() -> None:
    one = world.store()
    with pytest.warns(UserWarning, match="were asked for"):
        calibration, evaluation = resolve_stores(world.model(), one, one, CONFIG)
    assert not set(calibration.hashes) & set(evaluation.hashes)
    texts = world.texts(5)
    assert resolve_stores(world.model(), texts, texts, CONFIG) == (texts, texts)
    calibration, kept = resolve_stores(world.model(), one, texts, CONFIG)
    assert kept is texts
    assert is_store(one)
    assert not is_store(texts)
    assert len(calibration) == len(_long_enough(world.texts(300)))


def test_certify_takes_stores() -> None:
    sae = world.trained_sae()
    touched, untouched = world.store(sae=sae), world.store(sae=sae)
    with pytest.warns(UserWarning, match="were asked for"):
        certificate = certify(
            world.model(), sae, calibration=touched, evaluation=touched, config=CONFIG
        )
    data = certificate.manifest["data"]
    sizes = [data[name]["n_sequences"] for name in ("calibration", "evaluation")]
    assert sum(sizes) == len(_long_enough(world.texts(300)))
    source = data["evaluation"]["source"]
    assert source["kind"] == "activations_store"
    assert "rows in random order, seed=5" in source["selection"]
    assert torch.equal(touched.get_batch_tokens(30), untouched.get_batch_tokens(30))


def _asked(monkeypatch: Any, calibration: int, evaluation: int) -> None:
    """Other numbers than the published ones, which would need thousands of documents."""
    monkeypatch.setattr(store_draws, "N_CALIBRATION", calibration)
    monkeypatch.setattr(store_draws, "N_EVALUATION", evaluation)
    monkeypatch.setattr(
        store_draws,
        "draw",
        functools.partial(draw, n_calibration=calibration, n_evaluation=evaluation),
    )


@pytest.mark.parametrize("n", [300, 90])
def test_two_loads_of_one_dataset_give_what_one_load_gives(n: int, monkeypatch: Any) -> None:
    _asked(monkeypatch, 100, 60)
    one = world.store(world.text_dataset(n))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted = resolve_stores(world.model(), one, one, CONFIG)
        sides = world.store(world.text_dataset(n)), world.store(world.text_dataset(n))
        assert sides[0].dataset is not sides[1].dataset
        found = resolve_stores(world.model(), *sides, CONFIG)
    assert [side.hashes for side in found] == [side.hashes for side in wanted]
    if n == 300:
        assert [len(side) for side in found] == [100, 60]
        assert not any("asked for" in str(each.message) for each in said)
    else:
        assert sum(map(len, found)) == len(_long_enough(world.texts(n)))
        assert sum("were asked for" in str(each.message) for each in said) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_shared_documents_cost_calibration_nothing_where_there_are_enough(
    streamed: bool, monkeypatch: Any
) -> None:
    _asked(monkeypatch, 100, 60)
    first = world.text_dataset(300)
    second = world.text_dataset(150)
    if streamed:
        sides = [world.store(data.to_iterable_dataset()) for data in (first, second)]
    else:
        sides = [world.store(data) for data in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibration, evaluation = resolve_stores(world.model(), sides[0], sides[1], CONFIG)
    assert (len(calibration), len(evaluation)) == (100, 60)
    assert not set(calibration.hashes) & set(evaluation.hashes)


def test_fewer_than_asked_are_said() -> None:
    first, second = world.store(world.text_dataset(100)), world.store(world.text_dataset(40))
    both = len(_long_enough(world.texts(100))), len(_long_enough(world.texts(40)))
    message = f"has {both[0] - both[1]} sequences of 12 tokens that the evaluation store does not"
    with pytest.warns(UserWarning, match=message):
        calibration, evaluation = resolve_stores(world.model(), first, second, CONFIG)
    assert (len(calibration), len(evaluation)) == (both[0] - both[1], both[1])
    assert not set(calibration.hashes) & set(evaluation.hashes)


def test_stores_that_read_one_dataset_in_two_ways_are_two() -> None:
    """What counts is which documents come out; other columns are other documents."""
    dataset = Dataset.from_dict({"text": world.texts(80), "problem": world.texts(80, seed=1)})
    first, second = world.store(dataset), world.store(dataset)
    second.tokens_column = "problem"
    with pytest.warns(UserWarning, match="were asked for"):
        calibration, evaluation = resolve_stores(world.model(), first, second, CONFIG)
    assert len(calibration) == len(_long_enough(world.texts(80)))
    assert len(evaluation) == len(_long_enough(world.texts(80, seed=1)))


def test_rows_are_named_by_what_is_known_of_their_order() -> None:
    """SAELens's `multiple_evals` shuffles its stores: row 17 is then no row 17 of the dataset."""
    plain, shuffled = world.store(), world.store()
    shuffled.shuffle_input_dataset(seed=42)
    streamed = world.store(world.text_dataset().to_iterable_dataset(num_shards=5))
    streamed.shuffle_input_dataset(seed=42)
    for made, prefix, limits in (
        (plain, "dataset", (None, 50)),
        (shuffled, "store", (None, 50)),
        (streamed, "store", (50,)),
    ):
        dataset: Any = made.dataset
        rows = [row["text"] for row in dataset]
        for limit in limits:
            found = sequences_of_store(made, CONFIG, limit=limit)
            for name, tokens in zip(found.document_ids, found.tokens.tolist(), strict=True):
                assert name.startswith(f"{prefix}:")
                row = int(name.removeprefix(f"{prefix}:"))
                assert tokens == _long_enough([rows[row]])[0]
            order = "the order the store reads them" if limit is None or made is streamed else None
            said = f"rows in {order or 'random order, seed=5'}"
            assert said in found.source.selection


def test_a_train_split_is_said() -> None:
    dataset = world.text_dataset(60)
    dataset._split = NamedSplit("train")  # as load_dataset(..., split="train") sets it
    with pytest.warns(UserWarning, match="split 'train'"):
        found = sequences_of_store(world.store(dataset), CONFIG)
    assert found.source.split == "train"


# Pre-tokenised datasets.


def _tokens(rows: list[list[int]], **columns: Any) -> Dataset:
    return Dataset.from_dict({"tokens": rows, **columns})


def test_concatenated_rows_are_refused() -> None:
    contexts = world.store().get_batch_tokens(80).tolist()
    with pytest.raises(CertifyError, match="all have 16 tokens and [0-9]+ hold BOS, EOS or SEP"):
        documents_of_store(world.store(_tokens(contexts)))


def test_rows_without_separators_are_refused_by_their_equal_length() -> None:
    contexts = world.store(sequence_separator_token=None).get_batch_tokens(80)[:, 1:].tolist()
    with pytest.raises(CertifyError, match="one_document_per_row=True"):
        documents_of_store(world.store(_tokens(contexts), context_size=15))


def test_rows_are_taken_when_the_user_says_so() -> None:
    rows = [[0, *row[:15]] for row in world.ids(80) if len(row) >= 15]
    found = sequences_of_store(world.store(_tokens(rows)), CONFIG, one_document_per_row=True)
    assert found.tokens.tolist() == [row[:12] for row in rows]


def test_separators_inside_rows_of_unequal_length_are_refused() -> None:
    rows = [[0, *row, 1, *row] for row in world.ids(80) if len(row) > 9]
    with pytest.raises(CertifyError, match=f"{min(64, len(rows))} hold BOS"):
        documents_of_store(world.store(_tokens(rows)))


@pytest.mark.parametrize("masked", [True, False])
def test_tokenised_documents_padded_to_one_length_are_documents(masked: bool) -> None:
    rows = [[0, *row] for row in world.ids(80)]
    filler = 7 if masked else world.EOS  # with a mask, the padding may be any id
    padded = [row + [filler] * (41 - len(row)) for row in rows]
    masks = [[1] * len(row) + [0] * (41 - len(row)) for row in rows]
    dataset = _tokens(padded, **({"attention_mask": masks} if masked else {}))
    found = sequences_of_store(world.store(dataset), CONFIG)
    assert found.tokens.tolist() == [row[:12] for row in rows if len(row) >= 12]


def test_the_format_that_the_store_sets_is_left_alone() -> None:
    dataset = _tokens([[0, *row] for row in world.ids(80)])
    made = world.store(dataset, context_size=4)
    before = dict(dataset.format)
    sequences_of_store(made, CONFIG)
    assert dict(dataset.format) == before


# Other kinds of store.


def test_conversations_are_tokenised_by_the_chat_template() -> None:
    words = world.texts(60)
    talks = [[{"role": "user", "content": text}] for text in words]
    made = world.store(Dataset.from_dict({"messages": talks, "text": words}))
    made.use_chat_formatting, made.tokens_column = True, "messages"
    found = sequences_of_store(made, CONFIG)
    wanted = [[2, *row[1:]] for row in _long_enough([f"{text} w3" for text in words])]
    assert found.tokens.tolist() == wanted


def test_cached_activations_have_no_documents() -> None:
    made = world.store()
    made.dataset = None
    with pytest.raises(CertifyError, match="cached activations and has no documents"):
        sequences_of_store(made, CONFIG)


def test_an_endless_stream_needs_a_limit() -> None:
    made = world.store(world.text_dataset().to_iterable_dataset())
    with pytest.raises(CertifyError, match="limit="):
        sequences_of_store(made, CONFIG)
    assert len(sequences_of_store(made, CONFIG, limit=7)) == 7


@pytest.mark.parametrize("wrong", [0, -3, True, 2.5])
def test_numbers_of_sequences_are_checked(wrong: Any) -> None:
    with pytest.raises(CertifyError, match="n_calibration_sequences must be an integer"):
        draw(world.store(), CONFIG, n_calibration=wrong)
