"""What follows from the settings on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from abliterate.contract.config import Config, EngineSettings
from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.paths import Home
from abliterate.contract.recipe import Direction, Evaluate, Prompts, Recipe
from abliterated.config import Surroundings, check_spooled, engine_kind, prepare_home


@pytest.mark.parametrize(
    ("executable", "unit", "listening", "kind"),
    [
        (False, False, False, "embedded"),
        (True, False, False, "ollama"),
        (False, True, False, "ollama"),
        (False, False, True, "ollama"),
    ],
)
def test_the_embedded_engine_is_taken_only_where_there_is_no_trace_of_an_ollama(
    executable: bool, unit: bool, listening: bool, kind: str
) -> None:
    assert engine_kind(Config(), Surroundings(executable, unit, listening)) == kind


def test_a_named_engine_is_taken_whatever_is_found() -> None:
    config = Config(engine=EngineSettings(kind="embedded"))
    assert engine_kind(config, Surroundings(True, True, True)) == "embedded"


def test_the_folders_are_made_once_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "state", tmp_path / "state" / "spool")
    prepare_home(home)
    prepare_home(home)
    assert home.incoming.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        prepare_home(Home(tmp_path / "file" / "state", tmp_path / "spool"))


def test_a_spooled_recipe_names_only_what_lies_under_the_roots(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "m.gguf").write_bytes(b"")
    (root / "way-out").symlink_to("/etc")
    check_spooled(Recipe(model=str(root / "m.gguf")), [str(root)])
    check_spooled(Recipe(model="ollama:m"), [])
    for recipe in (
        Recipe(model=str(tmp_path / "m.gguf")),
        Recipe(model=str(root / ".." / "m.gguf")),
        Recipe(model=str(root / "way-out" / "passwd")),
        Recipe(model="ollama:m", prompts=Prompts(harmful=["builtin", "/etc/passwd"])),
        Recipe(model="ollama:m", direction=Direction(method="file", file="/srv/d.pt")),
        Recipe(model="m.gguf"),
        Recipe(model="ollama:m", evaluate=Evaluate(suites=["extraction", "/etc/passwd"])),
        Recipe(model="ollama:m", evaluate=Evaluate(suites=["secrets.jsonl"])),
    ):
        with pytest.raises(RecipeError) as caught:
            check_spooled(recipe, [str(root)])
        assert caught.value.remedy


def test_a_matrix_may_name_no_more_than_a_recipe() -> None:
    check_spooled(Recipe(model="ollama:m", matrix={"edit.strength": [0.5, 1.0]}), [])
    with pytest.raises(RecipeError, match="outside"):
        check_spooled(Recipe(model="ollama:m", matrix={"prompts.harmful": ["builtin", "/etc/passwd"]}), [])


def test_the_home_is_not_for_strangers(tmp_path: Path) -> None:
    home = Home(tmp_path / "state", tmp_path / "state" / "spool")
    before = os.umask(0o022)
    try:
        prepare_home(home)
    finally:
        os.umask(before)
    assert home.state.stat().st_mode & 0o007 == 0
    assert home.incoming.stat().st_mode & 0o002 == 0
