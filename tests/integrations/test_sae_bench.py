"""``certificate.json`` against its own schema, and against what SAEBench's published envelope asks for."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest

from integrations.certified import Certified, certified
from integrations.sae_bench_envelope import ENVELOPE, envelope, fetch, schemas, types, violations
from saelens_certify import CertifyConfig, CertifyError, EvidenceError
from saelens_certify.cli import EXIT_DONE, main
from saelens_certify.integrations.sae_bench import certificate_schema, check_certificate
from saelens_certify.integrations.sae_bench_metrics import METRICS, OPTIONAL, SHOWN, SHUFFLE_METRICS
from saelens_certify.manifest import provenance

__all__ = ["certified"]

_ENDS = ("lower", "upper")
_KINDS = {
    "string": str, "integer": int, "object": dict, "array": list, "null": type(None), "any": object,
}  # fmt: skip


@pytest.fixture
def values(certified: Certified) -> dict[str, Any]:
    """A fresh certificate.json."""
    return json.loads((certified.run / "certificate.json").read_text())


def test_the_envelope_is_sae_bench_s(values) -> None:
    assert set(values) <= set(ENVELOPE)
    assert {name for name, (_, required) in ENVELOPE.items() if required} <= set(values)
    for name, value in values.items():
        assert isinstance(value, tuple(_KINDS[kind] for kind in ENVELOPE[name][0])), name
        assert not isinstance(value, bool)
    assert 0 <= values["datetime_epoch_millis"] <= 9_999_999_999_999
    for category in values["eval_result_metrics"].values():
        assert all(type(number) in (int, float) for number in category.values()), "not flat"
    for row in values["eval_result_details"]:
        assert not any(isinstance(entry, (dict, list)) for entry in row.values())


def test_the_file_is_strict_json(certified) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (certified.run / "certificate.json").read_text()
    assert json.loads(text, parse_constant=refuse)["eval_type_id"] == "faithfulness_certificate"


def test_the_schema_accepts_what_is_written(certified, values) -> None:
    check_certificate(values)
    check_certificate(certified.certificate.to_json({}))


def test_the_schema_asks_for_what_the_envelope_asks_for() -> None:
    schema = certificate_schema()
    assert set(schema["properties"]) == set(ENVELOPE)
    required = {name for name, (_, required) in ENVELOPE.items() if required}
    assert required <= set(schema["required"])
    for name, (allowed, _) in ENVELOPE.items():
        ours = set(types(schema["properties"][name], schema))
        assert ours <= set(allowed) or "any" in allowed, name
        assert "null" in ours or "null" not in allowed or name.startswith("eval_result_"), name


def test_the_envelope_is_the_published_schemas(values, tmp_path) -> None:
    """The wheel is fetched: its schemas are not ours to copy."""
    wheel = fetch(tmp_path)
    assert envelope(wheel) == ENVELOPE
    published = schemas(wheel)
    assert len(published) == 9
    for name, schema in published.items():
        assert violations(values, schema) == [], name
        assert violations({**values, "eval_id": 3, "more": 1}, schema) == [
            "eval_id is 3",
            "more is not in the envelope",
        ]
        assert violations({"sae_lens_id": None}, schema)[0].endswith("is missing")


def test_every_entry_has_a_title_and_a_description() -> None:
    schema = certificate_schema()
    objects = [schema, *schema["$defs"].values()]
    entries = [
        (name, entry) for part in objects for name, entry in part.get("properties", {}).items()
    ]
    assert len(entries) > 60
    for name, entry in entries:
        assert entry.get("title"), name
        assert len(entry.get("description", "")) > 5, name
        assert "``" not in entry["description"]
    settings = schema["$defs"]["Settings"]["properties"]
    assert set(settings) == {field.name for field in dataclasses.fields(CertifyConfig)}
    numbers = schema["$defs"]["FaithfulnessCertificateMetrics"]["properties"]
    assert {name for name, entry in numbers.items() if entry.get("ui_default_display")} == SHOWN


def test_every_number_but_controls_is_described(values) -> None:
    """A new bound or metric needs a line in sae_bench_metrics.METRICS."""
    numbers = values["eval_result_metrics"]["faithfulness_certificate"]
    control = re.compile(r"(risk|gap|kl)_(permuted|random_decoder)_\d+")
    plain = {name for name in numbers if not control.fullmatch(name)}
    tested = {name for name in SHUFFLE_METRICS if name.endswith(("permuted", "random_decoder"))}
    tested |= {f"shuffle_effect_{k}_{end}" for k in ("permuted", "random_decoder") for end in _ENDS}
    assert plain - OPTIONAL == (set(METRICS) | tested) - OPTIONAL
    assert plain <= set(METRICS) | tested
    assert len(numbers) - len(plain) == 9


def _without(path: str):
    def edit(values: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            values = values[name]
        del values[last]

    return edit


def _with(path: str, value: Any):
    def edit(values: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            values = values[name]
        values[last] = value

    return edit


FLAT = "eval_result_metrics.faithfulness_certificate"


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (_without("eval_id"), "eval_id: Field required"),
        (_without(f"{FLAT}.sharp_betting"), f"{FLAT}.sharp_betting"),
        (_with(f"{FLAT}.u_sae", float("nan")), "finite"),
        (_with(f"{FLAT}.u_sae", "7.1"), f"{FLAT}.u_sae"),
        (_with(f"{FLAT}.nested", {"a": 1.0}), f"{FLAT}.nested"),
        (_with(f"{FLAT}.risk_new", None), f"{FLAT}.risk_new"),
        (_with("eval_result_metrics.more", {}), "eval_result_metrics.more"),
        (_with("eval_result_details", [{"a": {"b": 1}}]), "eval_result_details"),
        (_with("datetime_epoch_millis", -1), "datetime_epoch_millis"),
        (_with("datetime_epoch_millis", 10**13), "datetime_epoch_millis"),
        (_with("eval_config.seq_len", "32"), "eval_config.seq_len"),
        (_with("extra", 1), "extra"),
        (_with("eval_result_unstructured.files.x", "abc"), "files.x"),
        (_without("eval_result_unstructured.bounds.u_sae.theorem"), "bounds.u_sae.theorem"),
        (_with("sae_lens_release_id", 3), "sae_lens_release_id"),
        (_with("eval_type_id", "core"), "no faithfulness certificate: its eval_type_id is 'core'"),
    ],
)
def test_what_is_not_a_certificate_is_named(values, edit, where) -> None:
    broken = copy.deepcopy(values)
    edit(broken)
    with pytest.raises(EvidenceError, match=re.escape(where)):
        check_certificate(broken)


def test_things_that_are_no_table() -> None:
    wrong: Any = [1]
    with pytest.raises(CertifyError, match="got list"):
        check_certificate(wrong)


def test_release_and_id(certified, values) -> None:
    """Of a folder there is no release; `test_cli_many` has the registered case."""
    assert (values["sae_lens_release_id"], values["sae_lens_id"]) == (None, "layer_1")
    provenance = values["eval_result_unstructured"]["provenance"]
    assert provenance["sae"]["origin"]["checkpoint_dtype"] == "float32"
    assert provenance["data"]["evaluation"]["n_sequences"] == 50
    assert str(certified.sae.parent) not in json.dumps(values)


def test_local_paths_lose_their_folders(certified) -> None:
    manifest = copy.deepcopy(certified.certificate.manifest)
    sources = [side["source"] for side in manifest["data"].values()]
    sources[0] |= {"kind": "jsonl", "location": "/home/me/secret/texts.jsonl"}
    sources[1] |= {"kind": "hub", "location": "owner/texts:en"}
    data = provenance(manifest)["data"]
    assert data["calibration"]["source"]["location"] == "texts.jsonl"
    assert data["evaluation"]["source"]["location"] == "owner/texts:en"


def test_the_command_prints_the_schema(capsys) -> None:
    assert main(["schema"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out) == certificate_schema()
