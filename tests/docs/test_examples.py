"""What the documents show is what the code reads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from abliterate.contract.config import Config, parse_config
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.recipe import Recipe, parse_recipe
from abliterate.contract.states import STATES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BIN = Path(sys.executable).parent


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def test_the_recipe_reference_shows_every_key_with_its_default() -> None:
    text, *_ = blocks(ROOT / "docs" / "reference" / "recipe.md", "toml")
    recipe = parse_recipe(text.encode())
    assert msgspec.structs.replace(recipe, model="") == Recipe(model="")
    for field in msgspec.structs.fields(Recipe):
        assert field.name == "matrix" or re.search(rf"^(\[{field.name}\]|{field.name} )", text, re.M), field.name


def test_the_configuration_reference_shows_every_key_with_its_default() -> None:
    (text,) = blocks(ROOT / "docs" / "reference" / "configuration.md", "toml")
    assert parse_config(text.encode()) == Config()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_toml_example_can_be_read(path: Path) -> None:
    for text in blocks(path, "toml"):
        read = parse_config if path.name in ("configuration.md", "proxy.md") else parse_recipe
        read(text.encode(), path.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_documents_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_ours_in_the_documents_exists(path: Path) -> None:
    shown = set(re.findall(r"\b(abliterated?) ([a-z][a-z-]+)\b", "\n".join(blocks(path, ""))))
    for command, verb in sorted(shown):
        told = subprocess.run([str(BIN / command), verb, "--help"], capture_output=True, text=True)
        assert told.returncode == 0, f"{command} {verb}: {told.stderr}"


def test_every_state_and_every_exit_code_is_explained() -> None:
    states = (ROOT / "docs" / "reference" / "states.md").read_text()
    for state in STATES:
        assert f"`{state}`" in states, state
    text = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    for error in AbliteratedError.__subclasses__():
        if error.__module__ == "abliterate.contract.errors":
            assert f"| {error.exit_code} |" in text, error


def test_every_module_of_the_pipeline_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folder = ROOT / "daemon" / "abliterated" / "pipeline"
    missing = [path.stem for path in folder.glob("[a-z]*.py") if f"`{path.stem}`" not in text]
    assert missing == []
