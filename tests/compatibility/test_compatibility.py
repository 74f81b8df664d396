"""docs/compatibility.md says what is so."""

from __future__ import annotations

import pytest
from engine.builders import TRANSCODERS

from compatibility.table import PAGE, Cell, everything, page


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str, str], Cell]:
    return everything()


def test_certified_losses_are_those_of_the_sae_s_own_forward(cells) -> None:
    worst = max(cells, key=lambda key: cells[key].error)
    assert cells[worst].error < 1e-4, worst


def expected_reason(model_class: str, kind: str, hook: str) -> str:
    """What must be refused, and why; everything else must be certified."""
    if hook == "hook_mlp_in":
        return "switched off"
    if hook == "mlp.hook_in" and model_class == "HookedTransformer":
        return "not there"
    if kind in TRANSCODERS:
        return "after the output" if hook == "hook_resid_post" else ""
    if hook == "hook_resid_mid" and "Bridge" in model_class:
        return "MLP branch only"
    return ""


def test_what_must_be_certified_is_and_nothing_else(cells) -> None:
    for key, cell in cells.items():
        assert cell.reason == expected_reason(*key), key
        assert cell.certified == (cell.reason == ""), key


def test_the_page_is_current(cells) -> None:
    assert PAGE.read_text() == page(cells), "run PYTHONPATH=tests python -m compatibility.table"
