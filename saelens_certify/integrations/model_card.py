"""A certificate as a section of a model card: Markdown, to be kept up to date between two markers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.controls import CONTROL, first_of_each_kind
from saelens_certify.envelope import EVAL_TYPE
from saelens_certify.errors import CertifyError
from saelens_certify.integrations.sae_bench import check_certificate
from saelens_certify.report.terms import BOUNDS, CONTROLS, bound_label, control_label
from saelens_certify.rounding import percent

_BEGIN, _END = "<!-- saelens_certify: begin{} -->", "<!-- saelens_certify: end{} -->"


def model_card_section(
    certificate: Mapping[str, Any] | Certificate, *, sae_id: str | None = None
) -> str:
    """Write what a certificate says as a section of a model card.

    Args:
        certificate: The values of a ``certificate.json``, or a certificate.
        sae_id: Name of the SAE in the repository; by default the one in the certificate.

    Returns:
        Markdown that begins with a heading of the second level.

    Raises:
        EvidenceError: If the values are no certificate.
    """
    if isinstance(certificate, Certificate):
        certificate = certificate.to_json({})
    check_certificate(certificate)
    metrics = certificate["eval_result_metrics"][EVAL_TYPE]
    said = certificate["eval_result_unstructured"]
    name = sae_id or certificate["sae_lens_id"] or certificate["sae_cfg_dict"]["architecture"]
    parts = [
        f"## Faithfulness certificate: `{name}`",
        said["verdict"],
        _bounds(said["bounds"], metrics),
        _measured(metrics),
        _controls(metrics),
        _shuffle_tests(said["shuffle_tests"]),
        _data(certificate["eval_config"], said["provenance"], metrics),
        _HOW.format(file=f"{name}/certificate.json"),
        _LIMITS.format(alpha=certificate["eval_config"]["alpha"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def insert_section(card: str, section: str, name: str = "") -> str:
    """Put a section into a model card; one that was put there before under the same name is replaced.

    Args:
        card: The model card; its YAML front matter and everything else stay as they are. The section
            gets the line ends that most of its lines have.
        section: Markdown.
        name: Tells the sections of several SAEs apart.

    Returns:
        The card. Inserting the same section twice changes nothing.

    Raises:
        CertifyError: If the card has only one of the two markers, or a marker twice.
    """
    label = f" {name}" if name else ""
    if "-->" in name or "\n" in name:
        raise CertifyError(f"{name!r} cannot stand in an HTML comment; choose a name without '-->'")
    begin, end = _BEGIN.format(label), _END.format(label)
    line_end = "\r\n" if 2 * card.count("\r\n") > card.count("\n") else "\n"
    block = f"{begin}\n{section.strip()}\n{end}".replace("\n", line_end)
    found = (card.count(begin), card.count(end))
    if found == (0, 0):
        head = card.rstrip("\r\n")
        return (f"{head}{line_end}{line_end}" if head else "") + block + line_end
    if found != (1, 1) or card.index(begin) > card.index(end):
        raise CertifyError(
            f"the model card has the marker {begin!r} {found[0]} times and {end!r} {found[1]} times; "
            "mend it so that each stands there once, in this order, or remove both"
        )
    return card[: card.index(begin)] + block + card[card.index(end) + len(end) :]


def _bounds(bounds: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    uniform = metrics["baseline_uniform"]
    rows = [
        [
            bound_label(name),
            f"{_up(bound['value']):.4f}",
            percent(bound["confidence"]),
            "yes" if bound["value"] < uniform else "no",
            "yes" if bound["value"] < metrics["baseline_unigram"] else "no",
        ]
        for name, bound in sorted(bounds.items(), key=lambda item: _place(item[0]))
    ]
    rows.append(["uniform guess (log2 V)", f"{uniform:.4f}", "", "", ""])
    rows.append(["unigram model (measured)", f"{metrics['baseline_unigram']:.4f}", "", "", ""])
    header = ["upper bound", "bits/token", "confidence", "below uniform", "below unigram"]
    return _table(header, rows)


def _place(bound: str) -> tuple[int, str]:
    """Order bounds as people know them; JSON sorts them by name."""
    names = list(BOUNDS)
    return (names.index(bound) if bound in names else len(names), bound)


def _up(value: float) -> float:
    """Round to what is shown, upwards: a bound is never understated."""
    return math.ceil(value * 1e4) / 1e4


def _measured(metrics: Mapping[str, float]) -> str:
    rows = [
        ["smoothed risk of the model", f"{metrics['risk_base']:.4f} bits/token"],
        ["with the SAE spliced in", f"{metrics['risk_sae']:.4f} bits/token"],
        ["with features seen in calibration only", f"{metrics['risk_pool']:.4f} bits/token"],
        ["reconstruction gap", f"{metrics['gap']:.4f} bits/token"],
        ["sequences that need an unseen feature", f"{metrics['eta']:.2%}"],
        ["features in the pool", f"{metrics['pool_size']:,} of {metrics['dict_size']:,}"],
        ["L0", f"{metrics['l0']:.1f}"],
        ["explained variance", f"{metrics['explained_variance']:.4f}"],
    ]
    return _table(["measured", "value"], rows)


def _controls(metrics: Mapping[str, float]) -> str:
    names = [key.removeprefix("gap_") for key in metrics if key.startswith("gap_")]
    names = first_of_each_kind(name for name in names if CONTROL.fullmatch(name))
    if not names:
        return "No controls (shuffled features, random decoder) were measured."
    rows = [
        [control_label(name), f"{metrics[f'risk_{name}']:.4f}", f"{metrics[f'gap_{name}']:.4f}"]
        for name in names
    ]
    rows.append(["this SAE", f"{metrics['risk_sae']:.4f}", f"{metrics['gap']:.4f}"])
    return _table(["control", "risk (bits/token)", "gap (bits/token)"], rows)


def _shuffle_tests(tests: Mapping[str, Mapping[str, Any]]) -> str:
    if not tests:
        return ""
    rows = [
        [
            CONTROLS[kind],
            f"{tests[kind]['n_permutations']}",
            f"{_up(tests[kind]['p_value']):.4f}",
            f"{tests[kind]['effect']:.4f}",
            f"{-_up(-tests[kind]['lower']):.4f} to {_up(tests[kind]['upper']):.4f}",
            percent(tests[kind]["confidence"]),
        ]
        for kind in CONTROLS
        if kind in tests
    ]
    header = ["shuffle test", "R", "p-value", "effect (bits/token)", "interval", "confidence"]
    return _table(header, rows)


def _data(
    settings: Mapping[str, Any], provenance: Mapping[str, Any], metrics: Mapping[str, float]
) -> str:
    model, sae = provenance["model"], provenance["sae"]
    lines = [
        f"- Model: `{model['name']}` ({model['class']}, {model['dtype']}); SAE: {sae['architecture']}, "
        f"computed in {sae['dtype']}.",
        f"- Sequences: the first {settings['seq_len']} tokens of each document; coding rule "
        f"`{settings['coding']}`, positions `{settings['positions']}`, tau = {settings['tau']}.",
    ]
    for side, part in provenance["data"].items():
        source = part["source"]
        where = source.get("location") or f"{source.get('kind', 'unknown')} in memory"
        more = [f"{key} {source[key]}" for key in ("split", "revision") if source.get(key)]
        named = ", ".join([f"`{where}`", *more])
        lines.append(f"- {side.capitalize()}: {part['n_sequences']:,} documents of {named}.")
    lines.append(f"- Vocabulary: {metrics['vocab_size']:,} tokens; delta = {settings['delta']:g}.")
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_HOW = """**How to verify.** `{file}` holds the numbers above, the theorem and assumptions of every bound, and the
SHA-256 of model, SAE, documents and evidence. With the run's folder, `saelens-certify verify FOLDER` computes every number
again from the evidence; with model, SAE and documents, `saelens_certify.verify(FOLDER, model=, sae=, evaluation=)` also
measures a sample of sequences again."""

_LIMITS = """**What it does not say.** The bounds are about the model's expected smoothed loss (alpha = {alpha:g}) on text of the
distribution that the documents were drawn from, and no other. They say nothing about what features mean. They
hold if the number of sequences was fixed before the results were seen, and do not cover a choice among
several SAEs made after looking. A bound that a unigram model also beats has shown little."""
