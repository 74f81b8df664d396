"""Many certificates from few passes: SAEs, settings and data that share what they have in common.

Every experiment is a list of settings. One calibration pass for all that read the same calibration documents, one
evaluation pass for each set of evaluation documents; within a pass the model runs once per batch, each SAE and coding rule
encodes once, and each proxy variant runs once, whoever reads it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from saelens_certify.certificate import Certificate
from saelens_certify.config import SPEED_FIELDS, CertifyConfig
from saelens_certify.data import check_disjoint
from saelens_certify.dependence import Draws, independent_draws
from saelens_certify.errors import CertifyError
from saelens_certify.evidence import CERTIFICATE, RunFolder, measured_table, reading, with_names
from saelens_certify.forward import ForwardEngine
from saelens_certify.manifest import Manifest, build_manifest, model_hash, parameters_sha256
from saelens_certify.outputs import Columns
from saelens_certify.passes import calibration_pass, empty_calibration, evaluation_pass
from saelens_certify.pool import Calibration
from saelens_certify.preparation import PROBE_SEQUENCES, Prepared, prepare, try_out
from saelens_certify.schedule import part_slices
from saelens_certify.scratch import FOLDER, CalibrationPlace, EvaluationPlace, Scratch
from saelens_certify.sealing import check_seal
from saelens_certify.subject import Reader, Subject, encoding_key
from saelens_certify.views import Seen, View
from saelens_certify.workers import Workers, workers_for

__all__ = ["Setting", "View", "certify_many"]

# How files end that an experiment writes beside the runs' folders.
_RESULTS = (".csv", ".json", ".html", ".png", ".parquet")


@dataclass(frozen=True, eq=False)
class Setting:
    """One certificate of a study.

    Attributes:
        sae: A SAELens SAE, a folder, ``"release/sae_id"``, or what `open_sae` returned.
        calibration: Calibration documents.
        evaluation: Evaluation documents.
        config: Settings; ``config.seq_len`` is the length of the views.
    """

    sae: Any
    calibration: View
    evaluation: View
    config: CertifyConfig


@dataclass(frozen=True, eq=False)
class _Member:
    """A setting that was checked.

    Attributes:
        name: Its name.
        setting: The setting.
        prepared: Its SAE.
        calibration: What it sees of the calibration documents.
        draws: What it sees of the evaluation documents, in the order of a single run.
        rows: The rows of these in the evaluation pass.
    """

    name: str
    setting: Setting
    prepared: Prepared
    calibration: Seen
    draws: Draws
    rows: torch.Tensor

    @property
    def reader(self) -> Reader:
        return Reader(
            self.prepared.adapter,
            self.setting.config,
            self.setting.calibration.length,
            self._mask(),
        )

    @property
    def reader_key(self) -> Hashable:
        """Equal for those whose calibrations are equal."""
        rows = tuple(self.calibration.rows.tolist())
        return encoding_key(self.reader), self.setting.calibration.length, rows

    def _mask(self) -> torch.Tensor:
        n = len(self.setting.calibration.sequences)
        mask = torch.zeros(n, dtype=torch.bool, device="cpu")
        mask[self.calibration.rows] = True
        return mask


def certify_many(
    model: Any, settings: Mapping[str, Setting], *, output: str | Path | None = None
) -> dict[str, Certificate]:
    """Issue many certificates, sharing passes over the documents.

    Each certificate is the one that `certify` would issue by itself, up to rounding in the model's own arithmetic
    (1e-5 bits). With ``output``, each has a run's folder there, under its name, that `verify` takes; a study that was
    killed goes on where it stopped, and one that is repeated with more settings measures only these.

    Args:
        model: A TransformerLens model. It is not changed.
        settings: What is certified, by name.
        output: Folder for the runs' folders. None keeps everything in memory.

    Returns:
        The certificates, in the order of the settings.

    Raises:
        CertifyError: Before any long work, if the pieces do not fit together.
        EvidenceError: If a run's folder holds another run or damaged files.
    """
    _check_settings(settings)
    engine = ForwardEngine(model)
    members, engine, checks = _members(model, engine, settings)
    certificates: dict[str, Certificate] = {}
    pending: dict[str, _Member] = {}
    manifests: dict[str, Manifest] = {}
    folders: dict[str, RunFolder] = {}
    of_model, of_sae = model_hash(model), _sae_hashes(members)
    for name, member in members.items():
        manifest = _manifest(engine, member, checks[name], of_model, of_sae[name])
        if output is not None:
            folders[name], manifest = RunFolder.open(Path(output) / folder_name(name), manifest)
            check_seal(folders[name])
            if (folders[name].path / CERTIFICATE).exists():
                certificates[name] = Certificate.load(folders[name].path)
                continue
        pending[name], manifests[name] = member, manifest
    scratch = None if output is None else Scratch.of(Path(output), manifests)
    with workers_for(engine, next(iter(settings.values())).config) as workers:
        calibrations = _calibrate(workers, pending, scratch)
        for group in _grouped(pending, "evaluation"):
            for name, table in _evaluate(workers, group, calibrations, scratch).items():
                certificate = Certificate(manifests[name], calibrations[name], table)
                if name in folders:
                    with reading(folders[name].path):
                        certificate.save(folders[name].path)
                certificates[name] = certificate
    if scratch is not None:
        scratch.remove(_places(pending, scratch))
    return {name: certificates[name] for name in settings}


def folder_name(name: str) -> str:
    """Return the name of a setting's folder."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)


def _check_settings(settings: Mapping[str, Setting]) -> None:
    """Check what can be checked without opening anything.

    Raises:
        CertifyError: If there are none, two share a folder or a pass differs within itself.
    """
    if not settings:
        raise CertifyError("a study needs at least one setting")
    folders: dict[str, str] = {}
    for name in settings:
        folder = folder_name(name)
        other = folders.setdefault(folder, name)
        if other != name:
            raise CertifyError(f"settings {other!r} and {name!r} would share a folder; rename one")
        if folder in ("", ".", "..", FOLDER) or len(folder) > 200 or folder.endswith(_RESULTS):
            raise CertifyError(
                f"a setting cannot be called {name!r}: a folder of that name would be in the way of other results; rename it"
            )
    first_name, first = next(iter(settings.items()))
    for name, setting in settings.items():
        config = CertifyConfig.check(setting.config, f"config of {name!r}")
        if config.until is not None:
            raise CertifyError(
                f"setting {name!r} has until={config.until!r}, but settings that share a pass cannot stop at "
                "different times; set until=None (Certificate.sequence gives the time-uniform bound at every N)"
            )
        for field in (*sorted(SPEED_FIELDS), "part_sequences"):
            mine, theirs = getattr(config, field), getattr(first.config, field)
            if mine != theirs:
                raise CertifyError(
                    f"{field} is {theirs!r} in setting {first_name!r} and {mine!r} in {name!r}: one pass has one"
                )


def _members(
    model: Any, engine: ForwardEngine, settings: Mapping[str, Setting]
) -> tuple[dict[str, _Member], ForwardEngine, dict[str, dict[str, Any]]]:
    """Open SAEs, find what each setting sees, and try everything on a few sequences."""
    sources = {name: _source(setting.sae) for name, setting in settings.items()}
    configs = {
        source: [settings[name].config for name in settings if sources[name] == source]
        for source in dict.fromkeys(sources.values())
    }
    prepared = {
        source: prepare(
            model, next(s.sae for n, s in settings.items() if sources[n] == source), of_source
        )
        for source, of_source in configs.items()
    }
    drawn: dict[Hashable, Draws] = {}
    members = {
        name: _member(name, setting, prepared[sources[name]], drawn)
        for name, setting in settings.items()
    }
    probe = next(iter(members.values())).calibration.sequences.tokens[:PROBE_SEQUENCES]
    all_configs = [setting.config for setting in settings.values()]
    by_number = {str(i): each for i, each in enumerate(prepared.values())}
    engine, checks = try_out(engine, by_number, probe, all_configs)
    of_source = {source: checks[str(i)] for i, source in enumerate(prepared)}
    return members, engine, {name: of_source[sources[name]] for name in members}


def _member(
    name: str,
    setting: Setting,
    prepared: Prepared,
    drawn: dict[Hashable, Draws],
) -> _Member:
    config = setting.config
    evaluation = Seen.of(setting.evaluation)
    cut = setting.calibration.length is not None
    # Beginnings of different documents may be equal: they are left out of the calibration.
    shared = frozenset(evaluation.sequences.hashes) if cut else frozenset()
    calibration = Seen.of(setting.calibration, shared)
    for side, seen in (("calibration", calibration), ("evaluation", evaluation)):
        if seen.sequences.seq_len != config.seq_len:
            raise CertifyError(
                f"setting {name!r} has seq_len = {config.seq_len}, its {side} sequences have "
                f"{seen.sequences.seq_len} tokens"
            )
    check_disjoint(calibration.sequences, evaluation.sequences)
    key = calibration.sequences.digest, evaluation.sequences.digest, config.dependence
    if key not in drawn:
        drawn[key] = independent_draws(calibration.sequences, evaluation.sequences, config)
    draws = drawn[key]
    row_of = dict(zip(evaluation.sequences.hashes, evaluation.rows.tolist(), strict=True))
    found = [row_of[own] for own in draws.sequences.hashes]
    rows = torch.tensor(found, dtype=torch.int64, device="cpu")
    return _Member(name, setting, prepared, calibration, draws, rows)


def _source(sae: Any) -> Hashable:
    """What tells SAEs apart: a name, or the object."""
    return str(sae) if isinstance(sae, (str, Path)) else id(sae)


def _manifest(
    engine: ForwardEngine,
    member: _Member,
    checks: Mapping[str, Any],
    model_sha256: str,
    sae_sha256: str,
) -> Manifest:
    prepared, config = member.prepared, member.setting.config
    return build_manifest(
        engine=engine,
        sae=prepared.loaded.sae,
        adapter=prepared.adapter,
        calibration=member.calibration.sequences,
        evaluation=member.draws.sequences,
        dependence=member.draws.found,
        config=config,
        self_check=checks,
        sae_id=prepared.loaded.name,
        origin=prepared.loaded.origin(),
        model_sha256=model_sha256,
        sae_sha256=sae_sha256,
    )


def _sae_hashes(members: Mapping[str, _Member]) -> dict[str, str]:
    """Hash each SAE once."""
    saes = {id(member.prepared): member.prepared.loaded.sae for member in members.values()}
    hashes = {key: parameters_sha256(sae.named_parameters()) for key, sae in saes.items()}
    return {name: hashes[id(member.prepared)] for name, member in members.items()}


def _grouped(members: Mapping[str, _Member], side: str) -> list[dict[str, _Member]]:
    """Group those that read the same documents."""
    groups: dict[int, dict[str, _Member]] = {}
    for name, member in members.items():
        groups.setdefault(id(getattr(member.setting, side).sequences), {})[name] = member
    return list(groups.values())


def _calibrate(
    workers: Workers, members: Mapping[str, _Member], scratch: Scratch | None
) -> dict[str, Calibration]:
    """Calibrate all members; those whose calibrations are equal share one."""
    found: dict[str, Calibration] = {}
    for group in _grouped(members, "calibration"):
        keys = {name: member.reader_key for name, member in group.items()}
        owners = {key: name for name, key in reversed(keys.items())}
        readers = {name: group[name].reader for name in owners.values()}
        one = next(iter(group.values())).setting
        sequences = one.calibration.sequences.canonical
        so_far = {
            name: (0, empty_calibration(workers.engine, each)) for name, each in readers.items()
        }
        places: dict[str, CalibrationPlace] = {}
        if scratch is not None:
            places = {name: scratch.calibration(name, each) for name, each in readers.items()}
            so_far = {name: place.load(so_far[name]) for name, place in places.items()}
        keep = functools.partial(_keep, places)
        totals = calibration_pass(workers, readers, sequences, one.config, so_far=so_far, keep=keep)
        found |= {name: totals[owners[key]] for name, key in keys.items()}
    for name, member in members.items():
        try:
            found[name].pool(member.setting.config.tau)
        except CertifyError as error:
            raise CertifyError(f"setting {name!r}: {error}") from None
    return found


def _keep(places: Mapping[str, CalibrationPlace], name: str, done: int, total: Calibration) -> None:
    if name in places:
        places[name].save(done, total)


def _places(
    members: Mapping[str, _Member], scratch: Scratch
) -> list[CalibrationPlace | EvaluationPlace]:
    """Everything that these members keep in the scratch."""
    return [
        place
        for name, member in members.items()
        for place in (
            scratch.calibration(name, member.reader),
            scratch.evaluation(name, member.setting.evaluation.sequences),
        )
    ]


def _evaluate(
    workers: Workers,
    members: Mapping[str, _Member],
    calibrations: Mapping[str, Calibration],
    scratch: Scratch | None,
) -> dict[str, pa.Table]:
    """Measure members that read the same evaluation documents; return the evidence of each."""
    one = next(iter(members.values())).setting
    sequences = one.evaluation.sequences.canonical
    subjects = {
        name: Subject.of(
            member.prepared.adapter,
            calibrations[name],
            member.setting.config,
            member.setting.evaluation.length,
        )
        for name, member in members.items()
    }
    parts = part_slices(one.config, [None] * len(sequences))
    places = {
        name: None if scratch is None else scratch.evaluation(name, sequences) for name in members
    }

    def kept(index: int, name: str) -> pa.Table | None:
        place = places[name]
        return None if place is None else place.read(index, sequences.hashes[parts[index]])

    def made(index: int, name: str, columns: Columns) -> pa.Table:
        table, place = measured_table(columns), places[name]
        if place is not None:
            place.write(index, sequences.hashes[parts[index]], table)
        return table

    tables = list(
        evaluation_pass(workers, subjects, sequences, parts, one.config, kept=kept, made=made)
    )
    evidence: dict[str, pa.Table] = {}
    for name, member in members.items():
        measured = pa.concat_tables([part[name] for part in tables])
        draws = member.draws
        evidence[name] = with_names(
            measured.take(member.rows.numpy()).combine_chunks(),
            draws.sequences.hashes,
            draws.sequences.document_ids,
            draws.clusters,
            draws.sizes,
        )
    return evidence
