"""Passes over documents, part by part: what was done is kept, and not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.forward import ForwardEngine
from saelens_certify.measure import calibrate, measure
from saelens_certify.outputs import Columns
from saelens_certify.pool import Calibration
from saelens_certify.positions import special_token_ids
from saelens_certify.subject import Reader, Subject

Part = TypeVar("Part")


def empty_calibration(engine: ForwardEngine, reader: Reader) -> Calibration:
    """What a reader has before the first part."""
    return Calibration.empty(reader.adapter.d_sae, engine.d_vocab, reader.adapter.d_out)


def calibration_pass(
    engine: ForwardEngine,
    readers: Mapping[str, Reader],
    sequences: Sequences,
    config: CertifyConfig,
    *,
    so_far: Mapping[str, tuple[int, Calibration]],
    keep: Callable[[str, int, Calibration], None],
) -> dict[str, Calibration]:
    """Calibrate part by part, going on after what was done.

    Args:
        engine: The model.
        readers: Who counts, by name.
        sequences: Calibration sequences in their order.
        config: Settings of the pass.
        so_far: For each reader how many of the sequences it has seen, and its calibration after these.
        keep: Called after every part, for each reader, with its name and the same two.

    Returns:
        The calibrations after all sequences.
    """
    total = {name: calibration for name, (_, calibration) in so_far.items()}
    special = special_token_ids(engine.model)
    first = min(done for done, _ in so_far.values())
    with _progress("calibration", sequences, first, config) as bar:
        for start in range(first, len(sequences), config.part_sequences):
            part = slice(start, start + config.part_sequences)
            here = {
                name: _of_part(reader, part)
                for name, reader in readers.items()
                if so_far[name][0] <= start
            }
            tokens = sequences.tokens[part]
            for name, found in calibrate(engine, here, tokens, config, special).items():
                total[name] = total[name] + found
                keep(name, start + len(tokens), total[name])
            bar.update(tokens.numel())
    return total


def evaluation_pass(
    engine: ForwardEngine,
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
        engine: The model.
        subjects: What is measured, by name.
        sequences: Evaluation sequences in their order.
        parts: The parts.
        config: Settings of the pass.
        kept: Returns a part of a subject that was measured before, or None.
        made: Takes the columns of a part of a subject that was measured now and keeps it.

    Yields:
        Each part by subject, in order.
    """
    special = special_token_ids(engine.model)
    with _progress("evaluation", sequences, 0, config) as bar:
        for index, part in enumerate(parts):
            tokens = sequences.tokens[part]
            before = {name: kept(index, name) for name in subjects}
            missing = {name: subjects[name] for name, found in before.items() if found is None}
            now: dict[str, Part] = {}
            if missing:
                columns = measure(engine, missing, tokens, config, special)
                now = {name: made(index, name, each) for name, each in columns.items()}
            bar.update(tokens.numel())
            found = {name: part for name, part in before.items() if part is not None}
            yield {name: {**found, **now}[name] for name in subjects}


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
