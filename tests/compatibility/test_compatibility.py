"""docs/compatibility.md says what is so."""

from __future__ import annotations

import pytest

from compatibility.table import ALL_KINDS, HOOKS, MODEL_CLASSES, PAGE, Cell, everything, page


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str, str], Cell]:
    return everything()


def test_certified_losses_are_those_of_the_sae_s_own_forward(cells) -> None:
    worst = max(cells, key=lambda key: cells[key].error)
    assert cells[worst].error < 1e-4, worst


def test_every_architecture_is_certified_in_every_model_class(cells) -> None:
    for model_class in MODEL_CLASSES:
        for kind in ALL_KINDS:
            n = sum(cells[model_class, kind, hook].certified for hook in HOOKS)
            assert n >= 3, (model_class, kind)


def test_the_page_is_current(cells) -> None:
    assert PAGE.read_text() == page(cells), "run python -m tests.compatibility.table"
