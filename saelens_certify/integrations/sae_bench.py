"""``certificate.json`` as a schema: SAEBench's envelope, with a title and a description of every entry.

The envelope is that of SAEBench's ``BaseEvalOutput`` (its names, its types, flat metrics in categories); what
stands inside is described here. ``ui_default_display`` marks what a leaderboard shows first, as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from saelens_certify.config import CertifyConfig
from saelens_certify.config_help import setting_descriptions, setting_kind
from saelens_certify.envelope import EVAL_TYPE
from saelens_certify.errors import CertifyError, EvidenceError
from saelens_certify.integrations.sae_bench_metrics import (
    METRICS,
    OPTIONAL,
    SHOWN,
    SHUFFLE_METRICS,
)

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _entry(title: str, description: str, **more: Any) -> Any:
    return Field(title=title, description=description, **more)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _setting_type(field: dataclasses.Field[Any]) -> Any:
    kind = setting_kind(field)
    if kind is tuple:
        return list[int]  # JSON has no tuples
    if field.default is not None:
        return kind
    return (str | float | None) if kind is str else (int | None)


_Settings: type[BaseModel] = create_model(
    "Settings",
    __base__=_Strict,
    __doc__="Settings of a certificate.",
    **{
        field.name: (
            _setting_type(field),
            _entry(_words(field.name), setting_descriptions()[field.name]),
        )
        for field in dataclasses.fields(CertifyConfig)
    },  # pyright: ignore[reportCallIssue, reportArgumentType]
)


class _Numbers(BaseModel):
    """Flat numbers; controls (permuted_i, matched_i, random_decoder_i, random_unit_decoder_i) have more where measured."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Finite] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]


_Metrics: type[BaseModel] = create_model(
    "FaithfulnessCertificateMetrics",
    __base__=_Numbers,
    __doc__=_Numbers.__doc__,
    **{
        name: (
            Optional[_Finite] if name in OPTIONAL else _Finite,  # noqa: UP045 - of an alias
            _entry(
                title,
                text,
                json_schema_extra={"ui_default_display": True} if name in SHOWN else None,
                **({"default": None} if name in OPTIONAL else {}),
            ),
        )
        for name, (title, text) in METRICS.items()
    }
    | {
        # May be missing, but not null.
        name: (
            _Finite,
            _entry(title, text, default=None, json_schema_extra=_without_default),
        )
        for name, (title, text) in SHUFFLE_METRICS.items()
    },  # pyright: ignore[reportCallIssue, reportArgumentType]
)


class MetricCategories(_Strict):
    """Metrics by category."""

    faithfulness_certificate: _Metrics = _entry(  # pyright: ignore[reportInvalidTypeForm]
        "Faithfulness certificate",
        "Bounds on the frozen model's expected loss by way of the SAE, and what they were computed from.",
    )


class BoundEntry(_Strict):
    """One bound."""

    value: _Finite = _entry("Value", "The bound, bits per token; never rounded down.")
    confidence: _Finite = _entry(
        "Confidence",
        "Probability, over the draw of the evaluation sequences, that the bound holds.",
    )
    theorem: str = _entry("Theorem", "What is bounded, by which formula, from which source.")
    assumptions: list[str] = _entry(
        "Assumptions", "What must be true for the confidence to be right."
    )
    terms: dict[str, _Finite] = _entry("Terms", "Terms whose sum is the value, bits per token.")
    lower: _Finite | None = _entry(
        "Lower", "Lower end of a two-sided statement, bits per token.", default=None
    )


class RiskEntry(_Strict):
    """Risk of the unigram model."""

    value: _Finite = _entry("Value", "Mean loss, bits per token.")
    lower: _Finite = _entry("Lower", "Lower confidence limit, bits per token.")
    upper: _Finite = _entry("Upper", "Upper confidence limit, bits per token.")
    confidence: _Finite = _entry("Confidence", "Probability that the risk is between the limits.")


class KeptEntry(_Strict):
    """Share of the model's advantage over a baseline that a proxy keeps."""

    value: _Finite | None = _entry("Value", "Ratio of measured differences; null if there is none.")
    lower: _Finite | None = _entry("Lower", "Lower end of the two-sided statement; null if none.")
    upper: _Finite | None = _entry("Upper", "Upper end of the two-sided statement; null if none.")
    lower_alone: _Finite | None = _entry(
        "Lower alone", "Lower limit that spends all of delta, a statement of its own; null if none."
    )
    confidence: _Finite = _entry("Confidence", "Of the two-sided statement.")
    baseline: str = _entry("Baseline", "Name of the baseline.")
    assumptions: list[str] = _entry("Assumptions", "What must be true for that confidence.")


class StopEntry(_Strict):
    """Why and when a run that may stop early was decided."""

    reason: Literal["nonvacuous", "target", "futile"] = _entry("Reason", "What was decided.")
    n: int = _entry("Sequences", "Sequences (or clusters) after which it was.", ge=1)
    value: _Finite = _entry("Value", "The bound then, or the lower bound of its limit if futile.")


class ShuffleTestEntry(_Strict):
    """The SAE against random copies of it."""

    p_value: _Finite = _entry("P-value", "(1 + b) / (1 + R), exact; never rounded down.")
    n_permutations: int = _entry("R", "Number of copies.", ge=1)
    b: int = _entry("b", "How many of them have a gap at most that of the SAE.", ge=0)
    gap: _Finite = _entry("Gap", "Gap of the SAE, bits per token.")
    control_gap: _Finite = _entry("Gap of copies", "Mean gap of the copies, bits per token.")
    effect: _Finite = _entry("Effect", "Gap of the copies minus gap of the SAE, bits per token.")
    lower: _Finite = _entry("Lower", "Lower confidence limit of the effect.")
    upper: _Finite = _entry("Upper", "Upper confidence limit of the effect.")
    confidence: _Finite = _entry(
        "Confidence", "Probability, over the draw of the sequences, that both limits hold."
    )
    null: str = _entry("Null hypothesis", "What a small p-value speaks against.")
    assumptions: list[str] = _entry(
        "Assumptions", "What must be true for p-value and confidence to be right."
    )


class Documents(_Strict):
    """Documents of one side."""

    n_sequences: int = _entry("Sequences", "Number of sequences, one a document.", ge=1)
    source: dict[str, Any] = _entry(
        "Source", "Where the documents came from and how many were left out, by reason."
    )


class Sides(_Strict):
    """The documents."""

    calibration: Documents = _entry(
        "Calibration", "Documents from which the pool of features was built."
    )
    evaluation: Documents = _entry("Evaluation", "Documents on which everything was measured.")


class Origin(_Strict):
    """Where the certificate came from."""

    model: dict[str, str | None] = _entry("Model", "The model's name, class and dtype.")
    sae: dict[str, Any] = _entry(
        "SAE",
        "Architecture, dtype it was certified in, and release, id and dtype of its checkpoint.",
    )
    data: Sides = _entry("Data", "The documents, without folders of local paths.")
    dependence: dict[str, Any] = _entry(
        "Dependence", "Which evaluation sequences repeat each other, or calibration sequences."
    )
    versions: dict[str, str] = _entry("Versions", "Versions of Python and the packages that count.")


class Unstructured(_Strict):
    """What does not fit into flat metrics."""

    verdict: str = _entry("Verdict", "The result in one sentence.")
    stop: StopEntry | None = _entry(
        "Stop", "Why and when the run was decided; null if it measured a number fixed in advance."
    )
    unigram_risk: RiskEntry = _entry("Unigram risk", "The unigram model's risk, with limits.")
    kept: dict[str, KeptEntry] = _entry(
        "Information kept", "Share of the model's advantage that each proxy keeps, by baseline."
    )
    bounds: dict[str, BoundEntry] = _entry("Bounds", "Every bound by name, with theorem and terms.")
    shuffle_tests: dict[str, ShuffleTestEntry] = _entry(
        "Shuffle tests", "The SAE against its controls, by kind of control; empty without any."
    )
    provenance: Origin = _entry("Provenance", "Model, SAE, documents and versions.")
    identity: dict[str, Any] = _entry(
        "Identity", "What two runs must have in common to be the same run: settings and SHA-256s."
    )
    files: dict[str, _Sha256] = _entry(
        "Files", "SHA-256 of every file of the run that the certificate rests on, by name."
    )


class CertificateFile(_Strict):
    """A faithfulness certificate of a sparse autoencoder in SAEBench's envelope."""

    model_config = ConfigDict(title="Faithfulness certificate")

    eval_type_id: Literal["faithfulness_certificate"] = _entry(
        "Eval type", "What kind of evaluation this is."
    )
    eval_config: _Settings = _entry(  # pyright: ignore[reportInvalidTypeForm]
        "Eval config", "What decides what the certificate says, and how it was computed."
    )
    eval_id: str = _entry(
        "Eval ID",
        "UUID made from the run's identity: the same model, SAE, documents and settings give the same.",
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$",
    )
    datetime_epoch_millis: int = _entry(
        "Time", "When the run began, milliseconds since 1970.", ge=0, le=9_999_999_999_999
    )
    eval_result_metrics: MetricCategories = _entry("Metrics", "Flat numbers by category.")
    eval_result_details: list[dict[str, str | float | int | bool | None]] = _entry(
        "Details", "Rows of flat entries; empty for one SAE."
    )
    sae_bench_commit_hash: str = _entry("SAEBench commit", "Empty: SAEBench did not run.")
    sae_lens_id: str | None = _entry(
        "SAE ID", "The SAE's id in its release, or the name by which it was certified."
    )
    sae_lens_release_id: str | None = _entry(
        "SAE release", "SAELens release or Hugging Face repository; null if it came from neither."
    )
    sae_lens_version: str | None = _entry(
        "SAELens version", "Version of SAELens that loaded the SAE."
    )
    sae_cfg_dict: dict[str, Any] | None = _entry("SAE configuration", "sae.cfg.to_dict().")
    eval_result_unstructured: Unstructured = _entry(
        "Unstructured results", "Verdict, theorems, provenance and hashes."
    )


def certificate_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of ``certificate.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return schema | CertificateFile.model_json_schema()


def check_certificate(values: Mapping[str, Any]) -> None:
    """Check that a parsed ``certificate.json`` has the form that its schema describes.

    This says nothing about its truth: see `saelens_certify.verify`.

    Raises:
        EvidenceError: Naming the first entries that have not.
    """
    if not isinstance(values, Mapping):
        raise CertifyError(f"a certificate is a table of entries, got {type(values).__name__}")
    if values.get("eval_type_id") != EVAL_TYPE:
        raise EvidenceError(
            f"this is no faithfulness certificate: its eval_type_id is {values.get('eval_type_id')!r}"
        )
    try:
        CertificateFile.model_validate(dict(values))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:4]
        ]
        raise EvidenceError(
            f"{error.error_count()} entries of the certificate are not what its schema says: "
            f"{'; '.join(wrong)}"
        ) from None
