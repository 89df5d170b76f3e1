"""A product carries the mended template, and says so, unless an engine serves its base or the recipe says no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abliterate.contract.messages import Task
from abliterate.contract.recipe import Edit, Recipe, recipe_from_table
from abliterated.pipeline.chat_template import MENDED, TEMPLATE, template_keys
from abliterated.pipeline.directions import direction
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.templates.abilities import abilities
from engine.scripted_gguf import Model, write
from templates.families import own_families

ONE_CALL = next(family.jinja for family in own_families() if family.name == "header-ids")


def task(base: str, **export: Any) -> Task:
    recipe: Recipe = recipe_from_table({"model": base, **({"export": export} if export else {})})
    return Task(recipe=recipe, base=base, source="", work="", output="")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write(tmp_path / "base.gguf", Model(chat_template=ONE_CALL))


def test_the_written_file_holds_the_variant(gguf: Path, tmp_path: Path) -> None:
    keys, notes = template_keys(task("./base.gguf"), gguf)
    assert "several calls" in abilities(keys[TEMPLATE]) - abilities(ONE_CALL)
    assert len(notes) == 1 and "tool_template = false" in notes[0]
    target = tmp_path / "product.gguf"
    edit_gguf(
        gguf,
        target,
        direction(np.eye(1, 512)[0], origin={}),
        Edit(),
        allow_partial=False,
        metadata=keys,
        progress=lambda done, total: None,
        cancelled=lambda: False,
    )
    values = read_gguf(target).values
    assert values[TEMPLATE] == keys[TEMPLATE]
    assert "one after the other" in values[MENDED]


@pytest.mark.parametrize(
    "asked", [task("ollama:llama3:8b"), task("./base.gguf", tool_template=False)], ids=["engine serves it", "opt-out"]
)
def test_the_template_stays_where_it_should(gguf: Path, asked: Task) -> None:
    assert template_keys(asked, gguf) == ({}, ())


def test_nothing_to_mend_nothing_said(tmp_path: Path) -> None:
    assert template_keys(task("./base.gguf"), write(tmp_path / "whole.gguf")) == ({}, ())
    bare = write(tmp_path / "bare.gguf", Model(chat_template=None))
    assert template_keys(task("hf:some/model"), bare) == ({}, ())
