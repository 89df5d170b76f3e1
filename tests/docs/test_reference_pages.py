"""The pages that follow from the program are what the program says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from abliterate.contract.recipe import QUANTISATIONS
from abliterate.contract.states import MEANING, STATES, WHY, Reason

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("reference_pages", ROOT / "tools" / "reference.py")
assert SPEC and SPEC.loader
PAGES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PAGES)


@pytest.mark.parametrize("name", sorted(PAGES.PAGES))
def test_a_written_page_is_what_the_program_says_now(name: str) -> None:
    assert (ROOT / "docs" / "reference" / name).read_text() == PAGES.PAGES[name](), "run python tools/reference.py"


def test_the_quantisations_a_recipe_may_name_are_those_that_are_made() -> None:
    from abliterated.pipeline.mixes import MIXES

    assert ("keep", *MIXES) == QUANTISATIONS


def test_every_state_and_every_reason_is_explained() -> None:
    assert set(MEANING) == set(STATES)
    assert set(WHY) == set(get_args(Reason)) - {""}
