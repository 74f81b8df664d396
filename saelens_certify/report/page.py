"""A certificate as one self-contained HTML page."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path

from rich.console import Console

from saelens_certify.certificate import Certificate
from saelens_certify.report.figure import certificate_figure
from saelens_certify.report.table import certificate_tables
from saelens_certify.report.terms import CONTROLS, bound_label
from saelens_certify.rounding import percent
from saelens_certify.storage import write_atomically

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1180px; margin: 2em auto; color: #222; }
pre { font-size: 0.8em; overflow-x: auto; }
.verdict { font-size: 1.2em; padding: 0.8em 1em; border-left: 6px solid; }
.yes { border-color: #228833; } .no { border-color: #ee6677; }
"""


def write_report(certificate: Certificate, path: str | Path) -> Path:
    """Write the page: verdict, picture, tables, every bound's theorem and assumptions, provenance.

    Args:
        certificate: The certificate.
        path: The file, e.g. ``run/report.html``.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = certificate_figure(certificate).to_html(full_html=False, include_plotlyjs=True)
    tables = "".join(f"<pre>{html.escape(text)}</pre>" for text in _plain_tables(certificate))
    bounds = "".join(
        f"<h3>{html.escape(bound_label(name))}: {bound.value:.4f} bits per token, confidence "
        f"{percent(bound.confidence)}</h3><p>{html.escape(bound.theorem)}</p><ul>"
        + "".join(f"<li>{html.escape(a)}</li>" for a in bound.assumptions)
        + "</ul>"
        for name, bound in certificate.bounds.items()
    )
    tests = "".join(
        f"<h3>{html.escape(CONTROLS[kind])}: p = {test.p_value:.4g}, R = {test.n_permutations}</h3>"
        f"<p>Null hypothesis: {html.escape(test.null)}</p><ul>"
        + "".join(f"<li>{html.escape(a)}</li>" for a in test.assumptions)
        + "</ul>"
        for kind, test in certificate.shuffle_tests.items()
    )
    tests = f"<h2>What each shuffle test says</h2>{tests}" if tests else ""
    provenance = html.escape(json.dumps(certificate.manifest, indent=2, sort_keys=True))
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>Faithfulness certificate</title><style>{_STYLE}</style></head><body>"
        "<h1>Faithfulness certificate</h1>"
        f"<p class='verdict {'yes' if certificate.nonvacuous else 'no'}'>"
        f"{html.escape(certificate.verdict())}</p>{picture}{tables}"
        f"<h2>What each bound says, and what it assumes</h2>{bounds}{tests}"
        f"<details><summary>Provenance (manifest.json)</summary><pre>{provenance}</pre></details>"
        "</body></html>"
    )
    write_atomically(path, page.encode())
    return path


def _plain_tables(certificate: Certificate) -> list[str]:
    texts = []
    for table in certificate_tables(certificate):
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(table)
        texts.append(text.getvalue())
    return texts
