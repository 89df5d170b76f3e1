"""The matrix in the docs is what a run gives: of our own templates all on the embedded engine, some on each Ollama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines import REPOSITORY, Engine, engine_parameters, find_engines, require
from templates.families import Family, own_families, published_families
from templates.matrix import run_engine
from templates.page import render, row

PAGE = REPOSITORY / "docs" / "reference" / "tool-matrix.md"
SOME = ("hermes-json", "pythonic", "plain")  # does all; none of Ollama's parsers is for it; does nothing


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(PAGE.with_suffix(".json").read_text())
    return found


def test_the_page_is_made_of_the_data(committed: dict[str, dict[str, dict[str, Any]]]) -> None:
    assert PAGE.read_text() == render(committed), "run `tools/tool_matrix.py --page`"


def differences(rows: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{row(name, said)}\n{row(name, before[name]) if name in before else 'no such row'}"
        for name, said in rows.items()
        if row(name, said) != (row(name, before[name]) if name in before else "")
    ]


def test_the_embedded_engine_does_what_the_page_says(
    tmp_path: Path, committed: dict[str, dict[str, dict[str, Any]]]
) -> None:
    rows = run_engine(require(find_engines()[0]), own_families(), tmp_path)
    assert not differences(rows, committed["embedded"]), "run `make matrix`"


@pytest.mark.parametrize("engine", [given for given in engine_parameters() if not given.values[0].embedded])
def test_each_ollama_does_what_the_page_says(
    engine: Engine, tmp_path: Path, committed: dict[str, dict[str, dict[str, Any]]]
) -> None:
    some = [family for family in own_families() if family.name in SOME]
    rows = run_engine(require(engine), some, tmp_path)
    if engine.id not in committed:
        pytest.skip(f"{engine.id} is not on the page; `make matrix` puts it there")
    assert not differences(rows, committed[engine.id]), "run `make matrix`"


def test_published_templates_do_what_the_page_says(
    tmp_path: Path, committed: dict[str, dict[str, dict[str, Any]]]
) -> None:
    """A few of them: all are `make matrix`'s business."""
    published: list[Family] = published_families()
    if not published:
        pytest.skip("CHAT_TEMPLATES_DIR names no folder with published chat templates (*.jinja)")
    few = [family for family in published if f"{family.name}, mended" in committed["embedded"]]
    rows = run_engine(require(find_engines()[0]), few, tmp_path)
    assert not differences(rows, committed["embedded"]), "run `make matrix`"
