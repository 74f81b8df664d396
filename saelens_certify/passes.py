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


def empty_calibrations(
    engine: ForwardEngine, readers: Mapping[str, Reader]
) -> dict[str, Calibration]:
    """What every reader has before the first part."""
    return {
        name: Calibration.empty(r.adapter.d_sae, engine.d_vocab, r.adapter.d_out)
        for name, r in readers.items()
    }


def calibration_pass(
    engine: ForwardEngine,
    readers: Mapping[str, Reader],
    sequences: Sequences,
    config: CertifyConfig,
    *,
    done: int,
    so_far: Mapping[str, Calibration],
    keep: Callable[[int, dict[str, Calibration]], None],
) -> dict[str, Calibration]:
    """Calibrate part by part, going on after what was done.

    Args:
        engine: The model.
        readers: Who counts, by name.
        sequences: Calibration sequences in their order.
        config: Settings of the pass.
        done: Sequences that ``so_far`` has seen.
        so_far: The calibrations after these.
        keep: Called after every part with the number of sequences seen and the calibrations.

    Returns:
        The calibrations after all sequences.
    """
    total = dict(so_far)
    special = special_token_ids(engine.model)
    with _progress("calibration", sequences, done, config) as bar:
        for start in range(done, len(sequences), config.part_sequences):
            part = slice(start, start + config.part_sequences)
            here = {name: _of_part(reader, part) for name, reader in readers.items()}
            tokens = sequences.tokens[part]
            found = calibrate(engine, here, tokens, config, special)
            total = {name: total[name] + found[name] for name in readers}
            keep(start + len(tokens), total)
            bar.update(tokens.numel())
    return total


def evaluation_pass(
    engine: ForwardEngine,
    subjects: Mapping[str, Subject],
    sequences: Sequences,
    parts: Sequence[slice],
    config: CertifyConfig,
    *,
    kept: Callable[[int], Part | None],
    made: Callable[[int, dict[str, Columns]], Part],
) -> Iterator[Part]:
    """Measure part by part, skipping what was kept.

    Args:
        engine: The model.
        subjects: What is measured, by name.
        sequences: Evaluation sequences in their order.
        parts: The parts.
        config: Settings of the pass.
        kept: Returns a part that was measured before, or None.
        made: Takes the columns of a part that was measured now and keeps it.

    Yields:
        Each part, in order.
    """
    special = special_token_ids(engine.model)
    with _progress("evaluation", sequences, 0, config) as bar:
        for index, part in enumerate(parts):
            tokens = sequences.tokens[part]
            found = kept(index)
            if found is None:
                found = made(index, measure(engine, subjects, tokens, config, special))
            bar.update(tokens.numel())
            yield found


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
