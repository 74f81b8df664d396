"""A certificate as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saelens_certify.bounds import Bound
from saelens_certify.certificate import Certificate
from saelens_certify.controls import BEYOND, first_of_each_kind
from saelens_certify.report.terms import CONTROLS, bound_label, control_label, term_label
from saelens_certify.rounding import percent, rounded_down, rounded_up

_SUMS = ("u_sae", "u_sae_occam")
_EXCESS = (
    "sharp_unigram",
    "excess_sae",
    "excess_sae_two_sided",
    "excess_pool",
    "excess_pool_two_sided",
)


def print_certificate(certificate: Certificate, console: Console | None = None) -> None:
    """Print tables and verdict.

    Args:
        certificate: What to print.
        console: Where; the terminal by default.
    """
    console = console or Console()
    for table in certificate_tables(certificate):
        console.print(table)
    style = "bold green" if certificate.nonvacuous else "bold red"
    console.print(certificate.verdict(), style=style, markup=False, highlight=False, soft_wrap=True)


def certificate_tables(certificate: Certificate) -> list[Table]:
    """Return the tables of a certificate.

    Returns:
        What was measured; what each bound is made of; each bound beside its baselines; controls and
        shuffle tests, if any controls were measured.
    """
    tables = [
        _measured(certificate),
        _terms(certificate),
        _bounds(certificate),
        _excess(certificate),
    ]
    if certificate.kept:
        tables.append(_kept(certificate))
    if certificate.controls:
        tables.append(_controls(certificate))
    if certificate.shuffle_tests:
        tables.append(_shuffle_tests(certificate))
    return tables


def _measured(certificate: Certificate) -> Table:
    measured, pool = certificate.measured, certificate.pool
    share = pool.size / certificate.dict_size
    data = certificate.manifest["data"]
    alpha = f"{certificate.config.alpha:g}"
    table = plain_table(
        f"Measured (losses smoothed with alpha = {alpha})", "quantity", "value", "unit"
    )
    rows: list[tuple[str, str, str]] = [
        ("model", str(certificate.manifest["model"]["name"]), ""),
        ("SAE", _sae_name(certificate), ""),
        ("calibration", f"{data['calibration']['n_sequences']:,}", "sequences"),
        ("evaluation (N)", f"{measured.n_sequences:,}", certificate.unit),
        ("pool G (P of m features)", f"{pool.size:,} of {certificate.dict_size:,}", f"{share:.1%}"),
        ("  left out", _left_out(data), ""),
        ("near duplicates", _repeats(certificate), ""),
        ("smoothed risk of M", f"{measured.risk_base:.4f}", "bits/token"),
        ("smoothed risk of S∘M", f"{measured.risk_sae:.4f}", "bits/token"),
        ("smoothed proxy risk: h_G", f"{measured.risk_pool:.4f}", "bits/token"),
        ("reconstruction gap", f"{measured.gap:.4f}", "bits/token"),
        ("pool mismatch η", f"{measured.eta:.2%}", "of sequences"),
        ("KL(M‖S∘M)", f"{certificate.column('kl').mean():.4f}", "bits/token"),
        ("top-1 agreement", f"{certificate.column('top1_agreement').mean():.1%}", "of positions"),
        ("L0", f"{certificate.column('l0').mean():.1f}", "features/token"),
        ("explained variance", f"{certificate.explained_variance():.4f}", ""),
        ("  without position 0", f"{certificate.explained_variance(first=False):.4f}", ""),
    ]
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _terms(certificate: Certificate) -> Table:
    shown = [certificate.headline]
    shown += [certificate.bounds[name] for name in _SUMS if name in certificate.bounds]
    names = list(dict.fromkeys(term for bound in shown for term in bound.terms))
    table = plain_table("What the certificate adds up [bits/token]", "term", *map(_label, shown))
    for name in names:
        values = [f"{b.terms[name]:.4f}" if name in b.terms else "" for b in shown]
        table.add_row(term_label(name), *values)
    table.add_section()
    table.add_row(
        "upper bound on the risk of M", *(f"{rounded_up(b.value):.4f}" for b in shown), style="bold"
    )
    return table


def _bounds(certificate: Certificate) -> Table:
    baselines = certificate.baselines
    title = (
        f"Bounds at {percent(1 - certificate.config.delta)} confidence [bits/token], uniform guess "
        f"{baselines['uniform']:.3f}, unigram model {baselines['unigram']:.3f}"
    )
    table = plain_table(title, "bound", "value", "below uniform", "below unigram", "non-vacuous")
    for name, bound in certificate.bounds.items():
        if name in _EXCESS:
            continue
        table.add_row(
            bound_label(name),
            f"{rounded_up(bound.value):.4f}",
            f"{rounded_down(baselines['uniform'] - bound.value):+.4f}",
            f"{baselines['unigram'] - bound.value:+.4f}",
            "yes" if bound.nonvacuous(baselines["uniform"]) else "no",
        )
    return table


def _excess(certificate: Certificate) -> Table:
    confidence = percent(1 - certificate.config.delta)
    title = f"Differences of risks at {confidence} confidence [bits/token]"
    table = plain_table(title, "difference", "measured", "lower", "upper")
    for name in _EXCESS:
        bound = certificate.bounds[name]
        lower = "" if bound.lower is None else f"{rounded_down(bound.lower):+.4f}"
        measured = next(iter(bound.terms.values()))
        table.add_row(
            bound_label(name), f"{measured:+.4f}", lower, f"{rounded_up(bound.value):+.4f}"
        )
    return table


def _kept(certificate: Certificate) -> Table:
    confidence = percent(1 - certificate.config.delta)
    title = f"Share kept of what M knows beyond a baseline, at {confidence} confidence"
    table = plain_table(title, "proxy", "baseline", "measured", "lower", "upper")
    for name, share in certificate.kept.items():
        proxy = "S∘M" if name.startswith("sae_") else "h_G"
        lower = "" if share.lower is None else f"{rounded_down(100 * share.lower, 1):.1f}%"
        upper = "" if share.upper is None else f"{rounded_up(100 * share.upper, 1):.1f}%"
        measured = "" if share.value is None else f"{share.value:.1%}"
        table.add_row(proxy, share.baseline, measured, lower, upper)
    return table


def _controls(certificate: Certificate) -> Table:
    title = "Controls"
    if certificate.time_uniform:
        title += (
            " (no shuffle tests: the SAE's own losses decided how many sequences were measured)"
        )
    table = plain_table(title, "proxy", "risk", "gap to M", "KL from M")
    measured = certificate.measured
    kl = f"{certificate.column('kl').mean():.4f}"
    table.add_row("this SAE", f"{measured.risk_sae:.4f}", f"{measured.gap:.4f}", kl)
    controls = certificate.controls
    shown = first_of_each_kind(controls)
    for name in shown:
        values = (f"{controls[name][k]:.4f}" for k in ("risk", "gap", "kl"))
        table.add_row(control_label(name), *values)
    if len(shown) < len(controls):
        table.add_row(f"… and {len(controls) - len(shown)} more", "", "", "")
    return table


def _shuffle_tests(certificate: Certificate) -> Table:
    interval = f"{percent(1 - certificate.config.share)} interval"
    table = plain_table(
        "Shuffle tests: how much larger the gap of random copies is [bits/token]",
        "copies", "R", "p-value", "smallest", "effect", interval, "share", "shows, if p is small",
    )  # fmt: skip
    for kind, test in certificate.shuffle_tests.items():
        table.add_row(
            CONTROLS[kind],
            f"{test.n_permutations}",
            f"{rounded_up(test.p_value):.4f}",
            f"{rounded_up(test.smallest_p_value):.4f}",
            f"{test.effect:+.4f}",
            f"{rounded_down(test.lower):+.4f} to {rounded_up(test.upper):+.4f}",
            f"{test.share:+.1%}",
            BEYOND[kind],
        )
    return table


def plain_table(title: str, first: str, *columns: str) -> Table:
    """Return an empty table: the first column to the left, all others to the right."""
    # Titles hold units in square brackets, which rich would take for markup.
    table = Table(title=escape(title), title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _label(bound: Bound) -> str:
    return bound_label(bound.name)


def _repeats(certificate: Certificate) -> str:
    """What evaluation repeats, in itself and of calibration."""
    found = certificate.manifest["dependence"]
    if not found["looked_for"]:
        return "not looked for"
    return (
        f"{certificate.evidence.num_rows - certificate.measured.n_sequences:,} of each other, "
        f"{found['of_calibration']['n_repeated']:,} of calibration"
    )


def _left_out(data: dict[str, Any]) -> str:
    sources = [side["source"] for side in data.values()]
    short = sum(source["n_too_short"] for source in sources)
    doubled = sum(source["n_duplicates"] for source in sources)
    return f"{short:,} too short, {doubled:,} repeated"


def _sae_name(certificate: Certificate) -> str:
    sae, identity = certificate.manifest["sae"], certificate.manifest["identity"]
    return f"{sae['architecture']} at {identity['hook_out']}"
