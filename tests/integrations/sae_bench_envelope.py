"""What SAEBench's published JSON schemas say about their common envelope.

SAEBench has no licence, so none of its files is here. `ENVELOPE` restates facts that `envelope` reads
from the schema files in its wheel; to repeat it, from the folder of the tests::

    pip download --no-deps sae-bench==0.6.0
    python -m integrations.sae_bench_envelope sae_bench-0.6.0-py3-none-any.whl

`test_sae_bench.py` fetches the wheel, compares, and validates a certificate against every schema in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHEEL = "sae-bench==0.6.0"

# By name: JSON types that one of the nine schemas allows, and whether all of them require the entry.
ENVELOPE: dict[str, tuple[tuple[str, ...], bool]] = {
    "datetime_epoch_millis": (("integer",), True),
    "eval_config": (("object",), True),
    "eval_id": (("string",), True),
    "eval_result_details": (("array", "null"), False),
    "eval_result_metrics": (("object",), True),
    "eval_result_unstructured": (("any", "null"), False),
    "eval_type_id": (("string",), False),
    "sae_bench_commit_hash": (("string",), True),
    "sae_cfg_dict": (("null", "object"), True),
    "sae_lens_id": (("null", "string"), True),
    "sae_lens_release_id": (("null", "string"), True),
    "sae_lens_version": (("null", "string"), True),
}

_OWN = ("eval_config", "eval_result_metrics", "eval_result_details")
"""Entries of the envelope that each evaluation fills with objects of its own."""


def fetch(folder: Path) -> Path:
    """Download SAEBench's wheel, as any other package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run(
        [*command, "--quiet", "--disable-pip-version-check", "--dest", str(folder), WHEEL],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def schemas(wheel: Path) -> dict[str, dict[str, Any]]:
    """Read every schema of an evaluation's output; nothing of the package is run."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: json.loads(archive.read(name))
            for name in archive.namelist()
            if Path(name).match("eval_output_schema_*.json")
        }


def envelope(wheel: Path) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Read what all schemas have in common at their top level."""
    files = list(schemas(wheel).values())
    assert len({frozenset(schema["properties"]) for schema in files}) == 1
    return {
        name: (
            tuple(sorted({t for s in files for t in types(s["properties"][name], s)})),
            all(name in schema["required"] for schema in files),
        )
        for name in sorted(files[0]["properties"])
    }


def types(part: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """The JSON types that a part of a schema allows; "any" where it does not say."""
    if "$ref" in part:
        yield from types(schema["$defs"][part["$ref"].rpartition("/")[2]], schema)
    elif "anyOf" in part:
        for option in part["anyOf"]:
            yield from types(option, schema)
    else:
        yield part.get("type", "any")


def violations(values: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What is wrong with the top level of an evaluation's output by a schema.

    The entries in which every evaluation has objects of its own are compared by their type.
    """
    wrong = [f"{name} is missing" for name in schema["required"] if name not in values]
    for name, value in values.items():
        part = schema["properties"].get(name)
        if part is None:
            wrong.append(f"{name} is not in the envelope")
        elif not set(types(part, schema)) & _types_of(value):
            wrong.append(f"{name} is {value!r}")
        elif name in _OWN:
            entries = value if isinstance(value, list) else [value]
            wrong += [
                f"{name} holds {e!r}" for e in entries if not isinstance(e, (dict, type(None)))
            ]
    return wrong


def _types_of(value: Any) -> set[str]:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    if type(value) is int:
        return {"integer", "number", "any"}
    return {"any", {**names, dict: "object", type(None): "null"}[type(value)]}


if __name__ == "__main__":
    sys.stdout.writelines(f"{entry}\n" for entry in envelope(Path(sys.argv[1])).items())
