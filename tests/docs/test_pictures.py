"""Pictures: drawn by our own tools, whole by themselves, and as the text they are made of says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_sound_says_what_it_is_and_fetches_nothing(path: Path) -> None:
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") or root.get("aria-labelledby")
    assert not re.search(r"<script|xlink|href=|url\((?!#)", text)


def test_every_picture_is_shown_somewhere() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert [path.name for path in PICTURES if f"pictures/{path.name}" not in pages] == []


def test_the_terminal_shows_what_was_recorded() -> None:
    recorder = tool("record_terminal")
    text = recorder.TEXT.read_text()
    assert recorder.DRAWN.read_text() == recorder.draw(text), "run python tools/record_terminal.py --draw"
    assert tuple(line[2:] for line in text.splitlines() if line.startswith("$ ")) == recorder.SESSION
    assert "refusal 100% → 0%" in text
    assert str(Path.home()) not in text


def test_the_figures_are_told_as_far_as_there_are_some() -> None:
    figures = tool("figures")
    found = json.loads(figures.RESULTS.read_text())
    page, readme = figures.cost(found), figures.filled(figures.README.read_text(), found)
    assert figures.search(found) in page
    assert figures.search(found) in readme
    assert figures.proxy(found) in readme
    assert figures.cost({}).startswith("# What it costs")
