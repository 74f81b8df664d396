"""Which documents of a SAELens `ActivationsStore` a certificate is about: samples and divisions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, as_sequences, split
from saelens_certify.data.stores import (
    documents_of_store,
    is_store,
    refuse_endless,
    tokenizer_of_store,
)
from saelens_certify.errors import CertifyError

N_CALIBRATION = 2000
"""Calibration sequences drawn from a store unless told otherwise."""

N_EVALUATION = 1200
"""Evaluation sequences drawn from a store unless told otherwise: the published number."""


def sequences_of_store(
    store: Any,
    config: CertifyConfig | None = None,
    *,
    model: Any = None,
    limit: int | None = None,
    one_document_per_row: bool = False,
    **options: Any,
) -> Sequences:
    """Sequences of a store's documents: the first L tokens of each, each document once.

    BOS is put in front of texts if the store does so (``store.prepend_bos``); separators between
    documents do not arise, because documents are not joined. Short documents are left out and
    counted, whatever the store does with them.

    Args:
        store: A SAELens ActivationsStore; left as it is.
        config: Settings (``seq_len``, ``seed``, ``progress``).
        model: The model to be certified; the store's own by default.
        limit: Stop at this many sequences: a random sample of the dataset, with ``config.seed``, or
            the first ones of a stream. None reads everything.
        one_document_per_row: See `documents_of_store`.
        **options: Further arguments of `as_sequences`.

    Returns:
        The sequences.

    Raises:
        CertifyError: If the store's rows are not documents, or give no sequence.
    """
    config = CertifyConfig.check(config)
    model = store.model if model is None else model
    if limit is None:
        refuse_endless(store)
    documents = documents_of_store(
        store,
        one_document_per_row=one_document_per_row,
        seed=None if limit is None else config.seed,
    )
    sequences = as_sequences(
        documents,
        seq_len=config.seq_len,
        d_vocab=int(model.cfg.d_vocab),
        tokenizer=getattr(model, "tokenizer", None) or tokenizer_of_store(store),
        prepend_bos=bool(store.prepend_bos),
        limit=limit,
        progress=config.progress,
        **options,
    )
    if sequences.source.split == "train":
        warnings.warn(
            "the ActivationsStore's documents come from the split 'train', the only one SAELens loads by "
            "name; if the SAE was trained on it they are not held out and the certificate is too good: "
            "give the store a held-out Dataset",
            stacklevel=2,
        )
    return sequences


def draw(
    store: Any,
    config: CertifyConfig,
    *,
    model: Any = None,
    n_calibration: int = N_CALIBRATION,
    n_evaluation: int = N_EVALUATION,
    one_document_per_row: bool = False,
) -> tuple[Sequences, Sequences]:
    """Disjoint calibration and evaluation sequences of one store, divided by content hash.

    A store with fewer documents is divided in the same proportion, with a warning.

    Returns:
        Calibration and evaluation sequences.

    Raises:
        CertifyError: If there are not even one for each, or the store's rows are not documents.
    """
    check_numbers(n_calibration, n_evaluation)
    asked = n_calibration + n_evaluation
    sequences = sequences_of_store(
        store, config, model=model, limit=asked, one_document_per_row=one_document_per_row
    )
    found = len(sequences)
    if found < asked:
        if found < 2:
            raise CertifyError(
                f"the ActivationsStore's dataset gives {found} sequence of {config.seq_len} tokens, "
                "calibration and evaluation need one each; give it more or longer documents"
            )
        n_evaluation = min(max(1, round(found * n_evaluation / asked)), found - 1)
        n_calibration = found - n_evaluation
        warnings.warn(
            f"the ActivationsStore's dataset gives {found} sequences of {config.seq_len} tokens, {asked} "
            f"were asked for: {n_calibration} are used for calibration, {n_evaluation} for evaluation",
            stacklevel=2,
        )
    parts = split(sequences, counts=(n_calibration, n_evaluation), seed=config.seed)
    return parts["calibration"], parts["evaluation"]


def check_numbers(n_calibration: int, n_evaluation: int) -> None:
    """Check how many sequences are asked for.

    Raises:
        CertifyError: If a number is none of at least 1.
    """
    for name, value in (
        ("n_calibration_sequences", n_calibration),
        ("n_evaluation_sequences", n_evaluation),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CertifyError(f"{name} must be an integer of at least 1, got {value!r}")


def certified_sequences(
    store: Any,
    config: CertifyConfig,
    *,
    model: Any,
    source: Mapping[str, Any],
    hashes: Sequence[str],
) -> Sequences:
    """Read a store again as far as a certificate did, and keep what the certificate is about.

    Args:
        store: The store, its dataset in the order that it had then.
        config: Settings of the certificate.
        model: The certified model.
        source: The manifest's record of where the evaluation sequences came from.
        hashes: Ids of the certified sequences.

    Returns:
        Those of the certified sequences that the store has.
    """
    read = source["n_documents_read"] - source["n_too_short"] - source["n_duplicates"]
    # Rows that are no documents cannot have certified ids, so they need not be refused here.
    found = sequences_of_store(
        store, config, model=model, limit=max(1, read), one_document_per_row=True
    )
    wanted = set(hashes)
    return found.select([row for row, key in enumerate(found.hashes) if key in wanted])


def resolve_stores(
    model: Any, calibration: Any, evaluation: Any, config: CertifyConfig
) -> tuple[Any, Any]:
    """Replace stores by sequences; other data is returned as it is.

    Two sides from one dataset, or from two loads of it, are divided by content hash and cannot meet. Of
    stores over other data, calibration leaves out what evaluation has.

    Args:
        model: The model to be certified.
        calibration: Calibration data, perhaps a store.
        evaluation: Evaluation data, perhaps a store.
        config: Settings.

    Returns:
        Calibration and evaluation data without stores.
    """
    stores = is_store(calibration), is_store(evaluation)
    if all(stores) and _same_documents(calibration, evaluation):
        return draw(evaluation, config, model=model)
    if stores[1]:
        evaluation = sequences_of_store(evaluation, config, model=model, limit=N_EVALUATION)
    if not stores[0]:
        return calibration, evaluation
    if not stores[1]:
        return (
            sequences_of_store(calibration, config, model=model, limit=N_CALIBRATION),
            evaluation,
        )
    # The stores may share documents. What evaluation has leaves calibration, which is always valid, and
    # as many more are read, so that calibration is as large as asked wherever there is enough.
    found = sequences_of_store(
        calibration, config, model=model, limit=N_CALIBRATION + len(evaluation)
    ).without(evaluation)
    if len(found) < N_CALIBRATION:
        warnings.warn(
            f"the calibration store has {len(found)} sequences of {config.seq_len} tokens that the "
            f"evaluation store does not have, {N_CALIBRATION} were asked for",
            stacklevel=2,
        )
    return found.take(min(len(found), N_CALIBRATION)), evaluation


def _same_documents(one: Any, other: Any) -> bool:
    """Whether two stores surely give the same documents: one dataset, or two loads of one."""
    reading = ("tokens_column", "prepend_bos", "use_chat_formatting")
    if any(getattr(one, name) != getattr(other, name) for name in reading):
        return False
    if one.dataset is other.dataset:
        return True
    fingerprints = [getattr(store.dataset, "_fingerprint", None) for store in (one, other)]
    return fingerprints[0] is not None and fingerprints[0] == fingerprints[1]
