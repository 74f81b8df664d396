"""What people are shown is what the certificate says."""

from __future__ import annotations

import html
import io
import math
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import Certificate, CertifyConfig, CertifyError, certify
from saelens_certify.evidence import to_table
from saelens_certify.report import (
    certificate_figure,
    print_certificate,
    write_picture,
    write_report,
)
from saelens_certify.report.terms import bound_label


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(
        hooked_transformer(), make_sae(), calibration=make_tokens(20, seed=1),
        evaluation=make_tokens(40, seed=2),
        config=CertifyConfig(seq_len=SEQ_LEN, permutations=2, random_decoders=1, progress=False),
    )  # fmt: skip


def test_bars_add_up_to_the_bounds(certificate) -> None:
    figure: Any = certificate_figure(certificate)
    sums: dict[str, float] = {}
    for trace in figure.data:
        if trace.type == "bar":
            for label, x in zip(trace.y, trace.x, strict=True):
                sums[label] = sums.get(label, 0.0) + x
    for name in ("sharp_betting", "u_sae", "u_sae_occam", "sharp_direct_base"):
        assert sums[bound_label(name)] == pytest.approx(certificate.bounds[name].value, abs=1e-9)
    lines = sorted(float(shape.x0) for shape in figure.layout.shapes)
    assert lines == sorted(certificate.baselines.values())
    curves = [trace for trace in figure.data if trace.type == "scatter"]
    assert [curve.name for curve in curves] == [
        "this SAE", "shuffled features (0)", "random decoder (0)",
    ]  # fmt: skip
    gaps = np.abs(certificate.column("loss_base") - certificate.column("loss_sae"))
    np.testing.assert_array_equal(curves[0].x, [0.0, *np.sort(gaps)])
    np.testing.assert_allclose(curves[0].y, np.arange(len(gaps) + 1) / len(gaps))


def test_table_shows_every_bound_and_term(certificate) -> None:
    text = io.StringIO()
    print_certificate(certificate, Console(file=text, width=160, color_system=None))
    printed = text.getvalue()
    for bound in certificate.bounds.values():
        # What is shown is never below the bound, nor above it by more than its last digit.
        shown = math.ceil(bound.value * 1e4 * (1 - 1e-12)) / 1e4
        assert f"{shown:.4f}" in printed, bound.name
    for name in ("sharp_betting", "u_sae", "u_sae_occam"):
        for value in certificate.bounds[name].terms.values():
            assert f"{value:.4f}" in printed
    assert certificate.verdict() in printed


def test_page_is_whole_and_self_contained(certificate, tmp_path) -> None:
    page = write_report(certificate, tmp_path / "report.html").read_text()

    class Tags(HTMLParser):
        sources: list[str] = []
        open_tags = 0

        def handle_starttag(self, tag, attrs):
            self.open_tags += tag in ("div", "details", "pre", "html", "body")
            self.sources += [value for key, value in attrs if key in ("src", "href") and value]

        def handle_endtag(self, tag):
            self.open_tags -= tag in ("div", "details", "pre", "html", "body")

    tags = Tags()
    tags.feed(page)
    assert tags.sources == []
    assert tags.open_tags == 0
    page = html.unescape(page)
    assert certificate.verdict() in page
    assert all(bound.theorem in page for bound in certificate.bounds.values())


def test_verdicts(certificate) -> None:
    """A vacuous one is measured; for the others the evidence is put in its place."""
    assert not certificate.nonvacuous
    assert "vacuous, a uniform guess over 101 tokens" in certificate.verdict()

    def with_losses(loss: float, unigram: float) -> Certificate:
        n = 20_000
        columns = {
            "violation": np.zeros(n, dtype=bool),
            "loss_unigram": np.full(n, unigram),
            "rarest": np.full(n, 99.0),
            **{name: np.full(n, loss) for name in ("loss_base", "loss_sae", "loss_pool")},
        }
        table = to_table([str(i) for i in range(n)], [""] * n, columns)
        return Certificate(certificate.manifest, certificate.calibration, table)

    assert "it is at least 2.99 below that of a unigram model" in with_losses(3.0, 6.001).verdict()
    assert (
        "not shown to be below that of a unigram model (measured 2.90)"
        in with_losses(3.0, 2.9).verdict()
    )
    assert with_losses(3.0, 2.9).nonvacuous


def test_pictures_need_a_known_suffix(certificate, tmp_path) -> None:
    with pytest.raises(CertifyError, match=r"a\.gif"):
        write_picture(certificate_figure(certificate), tmp_path / "a.gif")


def test_metrics_have_the_published_names(certificate) -> None:
    metrics = certificate.to_metrics()["faithfulness_certificate"]
    names = (
        "u_sae u_sae_occam direct_base direct_pool preprint risk_base risk_sae risk_pool gap eta "
        "n_sequences vocab_size dict_size pool_size alpha delta loss_range log_binom baseline_uniform "
        "baseline_unigram"
    )
    assert set(names.split()) <= metrics.keys()
    assert all(isinstance(value, (int, float)) for value in metrics.values())
