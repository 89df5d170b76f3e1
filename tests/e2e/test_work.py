"""One recipe in the foreground: `abliterated work`, and every bad input a person may give it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from abliterated import refuser
from e2e.daemons import BIN

pytestmark = pytest.mark.e2e


def work(folder: Path, recipe: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    return subprocess.run(
        [str(BIN / "abliterated"), "work", str(path), "--out", str(folder / "out"), *arguments],
        capture_output=True,
        text=True,
        timeout=170,
    )


def recipe(**changes: str) -> str:
    data = refuser.files()
    values = {"model": str(data.model), "harmful": str(data.harmful), "harmless": str(data.harmless)} | changes
    return (
        f'model = "{values["model"]}"\n'
        f'[prompts]\nharmful = "{values["harmful"]}"\nharmless = "{values["harmless"]}"\ncount = 64\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 16\ntokens = 48\n"
    )


def products(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*.gguf")) if (folder / "out").exists() else []


def test_a_recipe_becomes_one_gguf_beside_its_reports(tmp_path: Path) -> None:
    told = work(tmp_path, recipe(), "--json")
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert products(tmp_path) == [summary["product"]]
    assert summary["metrics"]["refusal_before"] >= 0.9
    assert summary["metrics"]["refusal_after"] <= 0.1
    assert summary["coverage"] == 1.0
    assert "direction" in told.stderr, "progress is told"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")], "nothing half-written"
    direction = next((tmp_path / "out").glob("direction*.safetensors"))

    again = tmp_path / "again"
    again.mkdir()
    by_file = (
        f'model = "{refuser.files().model}"\n[direction]\nmethod = "file"\nfile = "{direction}"\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 0\n"
    )
    told = work(again, by_file, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["coverage"] == 1.0
    assert len(products(again)) == 1


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        told = work(folder, recipe())
        assert told.returncode == 0, told.stderr
        made.append((folder / "out" / products(folder)[0]).read_bytes())
    assert made[0] == made[1]


def truncated(path: Path) -> None:
    path.write_bytes(refuser.files().model.read_bytes()[:100_000])


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"NOPE" + refuser.files().model.read_bytes()[4:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [truncated, wrong_magic, empty])
def test_a_gguf_that_is_none_is_named(tmp_path: Path, make: object) -> None:
    make(tmp_path / "bad.gguf")  # type: ignore[operator]
    told = work(tmp_path, recipe(model="bad.gguf"))
    assert told.returncode == 3, told.stderr
    assert "bad.gguf" in told.stderr
    assert "→" in told.stderr
    assert "Traceback" not in told.stderr
    assert products(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "without a prompt"), (b"# only this\n", "without a prompt"), (b"ok\n\xff\xfe\n", "UTF-8")],
)
def test_a_prompt_file_that_holds_none_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    told = work(tmp_path, recipe(harmful="p.txt"))
    assert told.returncode == 2, told.stderr
    assert "p.txt" in told.stderr
    assert word.lower() in told.stderr.lower()
    assert products(tmp_path) == []


def test_a_missing_model_and_an_impossible_name_are_named(tmp_path: Path) -> None:
    told = work(tmp_path, recipe(model="nowhere.gguf"))
    assert (told.returncode, "nowhere.gguf" in told.stderr) == (3, True)
    told = work(tmp_path, 'name = "no spaces please"\n' + recipe())
    assert told.returncode == 2
    assert "no spaces please" in told.stderr
