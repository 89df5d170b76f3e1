"""The page of differences is the data's."""

from __future__ import annotations

from dataclasses import fields

from contract.differences import Expected
from contract.page import PAGE, comments, render


def test_every_difference_is_told() -> None:
    assert set(comments()) == {field.name for field in fields(Expected)}


def test_the_page_is_made_of_the_data() -> None:
    assert PAGE.read_text() == render(), "run `tools/ollama_versions.py`"
