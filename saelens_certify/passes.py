"""Passes over documents, part by part: what was done is kept, and not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.forward import ForwardEngine
from saelens_certify.measure import calibrate, measure
from saelens_certify.outputs import Columns
from saelens_certify.pool import Calibration
from saelens_certify.positions import special_token_ids
from saelens_certify.subject import Reader, Subject
from saelens_certify.workers import Workers

Part = TypeVar("Part")


def empty_calibration(engine: ForwardEngine, reader: Reader) -> Calibration:
    """What a reader has before the first part."""
    return Calibration.empty(reader.adapter.d_sae, engine.d_vocab, reader.adapter.d_out)


def calibration_pass(
    workers: Workers,
    readers: Mapping[str, Reader],
    sequences: Sequences,
    config: CertifyConfig,
    *,
    so_far: Mapping[str, tuple[int, Calibration]],
    keep: Callable[[str, int, Calibration], None],
) -> dict[str, Calibration]:
    """Calibrate part by part, going on after what was done.

    Args:
        workers: Who does the parts.
        readers: Who counts, by name.
        sequences: Calibration sequences in their order.
        config: Settings of the pass.
        so_far: For each reader how many of the sequences it has seen, and its calibration after these.
        keep: Called after every part, for each reader, with its name and the same two.

    Returns:
        The calibrations after all sequences.
    """
    total = {name: calibration for name, (_, calibration) in so_far.items()}
    special = special_token_ids(workers.engine.model)
    first = min(done for done, _ in so_far.values())
    starts = range(first, len(sequences), config.part_sequences)
    tasks = (
        (
            [name for name, (done, _) in so_far.items() if done <= start],
            start,
            sequences.tokens[start : start + config.part_sequences],
        )
        for start in starts
    )
    parts = workers.in_order(_calibrate_part, (readers, config, special), tasks)
    with _progress("calibration", sequences, first, config) as bar:
        for start, found in zip(starts, parts, strict=True):
            done = min(start + config.part_sequences, len(sequences))
            for name, calibration in found.items():
                total[name] = total[name] + calibration
                keep(name, done, total[name])
            bar.update((done - start) * sequences.seq_len)
    return total


def evaluation_pass(
    workers: Workers,
    subjects: Mapping[str, Subject],
    sequences: Sequences,
    parts: Sequence[slice],
    config: CertifyConfig,
    *,
    kept: Callable[[int, str], Part | None],
    made: Callable[[int, str, Columns], Part],
) -> Iterator[dict[str, Part]]:
    """Measure part by part, skipping what was kept.

    Args:
        workers: Who does the parts.
        subjects: What is measured, by name.
        sequences: Evaluation sequences in their order.
        parts: The parts.
        config: Settings of the pass.
        kept: Returns a part of a subject that was measured before, or None.
        made: Takes the columns of a part of a subject that was measured now and keeps it.

    Yields:
        Each part by subject, in order.
    """
    special = special_token_ids(workers.engine.model)
    before = [{name: kept(index, name) for name in subjects} for index in range(len(parts))]
    missing = [[name for name, found in here.items() if found is None] for here in before]
    tasks = (
        (names, sequences.tokens[part]) for names, part in zip(missing, parts, strict=True) if names
    )
    measured = workers.in_order(_measure_part, (subjects, config, special), tasks)
    with _progress("evaluation", sequences, 0, config) as bar:
        for index, part in enumerate(parts):
            columns = next(measured) if missing[index] else {}
            now = {name: made(index, name, each) for name, each in columns.items()}
            bar.update(sequences.tokens[part].numel())
            found = {name: each for name, each in before[index].items() if each is not None}
            yield {name: {**found, **now}[name] for name in subjects}


def _calibrate_part(
    engine: ForwardEngine,
    readers: Mapping[str, Reader],
    config: CertifyConfig,
    special_ids: tuple[int, ...],
    names: Sequence[str],
    start: int,
    tokens: Int[Tensor, "n_sequences pos"],
) -> dict[str, Calibration]:
    """Calibrate these readers on the sequences from ``start`` on."""
    part = slice(start, start + len(tokens))
    here = {name: _of_part(readers[name], part) for name in names}
    return calibrate(engine, here, tokens, config, special_ids)


def _measure_part(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    config: CertifyConfig,
    special_ids: tuple[int, ...],
    names: Sequence[str],
    tokens: Int[Tensor, "n_sequences pos"],
) -> dict[str, Columns]:
    """Measure these subjects."""
    here = {name: subjects[name] for name in names}
    return measure(engine, here, tokens, config, special_ids)


def _of_part(reader: Reader, part: slice) -> Reader:
    if reader.rows is None:
        return reader
    return Reader(reader.adapter, reader.config, reader.length, reader.rows[part])


def _progress(what: str, sequences: Sequences, done: int, config: CertifyConfig) -> tqdm:
    return tqdm(
        total=sequences.tokens.numel(),
        initial=done * sequences.seq_len,
        desc=what,
        unit="tok",
        unit_scale=True,
        disable=not config.progress,
    )
