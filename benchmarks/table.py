"""``python -m benchmarks.table``: put the committed results into docs/performance.md.

Each table stands between ``<!-- results/NAME.json PREFIX -->`` and ``<!-- end -->`` and shows the rows
whose names begin with PREFIX. A test compares the document with the files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.results import Record

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
_BLOCK = re.compile(
    r"<!-- (?P<file>results/[\w.-]+\.json) (?P<prefix>\S+) -->\n.*?<!-- end -->", re.DOTALL
)


def table(records: dict[str, Record], prefix: str) -> str:
    """Return a Markdown table of the rows whose names begin with a prefix."""
    lines = [
        "| row | ratio | target | ours | baseline | floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, record in records.items():
        if not name.startswith(prefix):
            continue
        if record["ratio"] is None:
            reason = record.get("error") or record.get("unavailable")
            lines.append(f"| `{name}` | – | {_target(record)} | {reason} | | |")
            continue
        missed = " (missed)" if record["met"] is False else ""
        times = " | ".join(_time(record[key]) for key in ("ours_s", "baseline_s", "floor_s"))
        lines.append(f"| `{name}` | {record['ratio']:.3g}{missed} | {_target(record)} | {times} |")
    return "\n".join(lines)


def updated(document: str, folder: Path) -> str:
    """Return the document with every table taken from the files of a folder."""

    def block(found: re.Match[str]) -> str:
        path = folder / found["file"]
        if not path.exists():
            return found[0]
        records = json.loads(path.read_text(encoding="utf-8"))
        marker = found[0].partition("\n")[0]
        return f"{marker}\n{table(records, found['prefix'])}\n<!-- end -->"

    return _BLOCK.sub(block, document)


def _target(record: Record) -> str:
    if record["target"] is None:
        return ""
    return f"{'≤' if record['better'] == 'lower' else '≥'} {record['target']:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def main() -> int:
    """Rewrite the document."""
    before = DOCUMENT.read_text(encoding="utf-8")
    after = updated(before, ROOT / "benchmarks")
    DOCUMENT.write_text(after, encoding="utf-8")
    print(f"{DOCUMENT.name}: {'unchanged' if before == after else 'updated'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
