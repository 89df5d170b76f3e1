"""`abliterated demo --load`, and the library's door: what is said where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from abliterate.contract.errors import NotFound, RecipeError
from abliterate.contract.recipe import parse_recipe
from abliterated import evaluate, refuser, run_recipe
from abliterated.config import check_spooled
from abliterated.demo import loading
from engines import free_port

PROGRAM = Path(sys.executable).with_name("abliterated")


def load(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    here = os.environ | {"OLLAMA_HOST": f"127.0.0.1:{free_port()}", "HOME": str(folder)} | environment
    return subprocess.run(
        [str(PROGRAM), "demo", "--load"], cwd=folder, env=here, capture_output=True, text=True, timeout=150
    )


def test_without_an_engine_it_says_what_to_start(tmp_path: Path) -> None:
    told = load(tmp_path)
    assert told.returncode == 75
    assert "abliterated serve" in told.stderr
    assert list(tmp_path.glob("*.toml")) == []


def test_a_recipe_of_somebody_s_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / loading.RECIPE).write_text("# mine\n")
    told = load(tmp_path)
    assert told.returncode == 6
    assert "another" in told.stderr
    assert (tmp_path / loading.RECIPE).read_text() == "# mine\n"


def test_its_recipe_may_be_spooled_whatever_the_settings_allow() -> None:
    recipe = parse_recipe(loading.recipe_text())
    check_spooled(recipe, [str(refuser.files().model.parent)])
    with pytest.raises(RecipeError):
        check_spooled(recipe, [])


@pytest.mark.parametrize("path", ["/a b/c", "/it's", "/\"both\" 'of them'", "/back\\slash's", "/tab\there"])
def test_any_path_can_be_written_into_it(path: str) -> None:
    assert tomllib.loads(f"p = {loading._quoted(Path(path))}")["p"] == path


def test_the_library_says_what_is_wrong_before_it_loads_anything(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="count from 1"):
        evaluate(refuser.files().model, prompts=0)
    with pytest.raises(RecipeError, match="can't be read"):
        run_recipe(tmp_path / "none.toml", tmp_path / "out")
    with pytest.raises((NotFound, RecipeError)):
        run_recipe({"model": "qwen3 8b", "nonsense": 1}, tmp_path / "out")


_ENDED = """
import sys, threading
from abliterated.demo import story

def told(*_):
    threading.Thread(target=threading.Event().wait).start()  # as one that was being started in that moment
    sys.exit(143)

story.tell_story = told
from abliterated.cli import main
sys.exit(main(["demo", "--engine", "embedded", "--out", sys.argv[1]]))
"""


def test_a_demo_that_is_ended_waits_for_no_thread(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _ENDED, str(tmp_path)], stdin=subprocess.DEVNULL, timeout=150)
    assert ended.returncode == 143
