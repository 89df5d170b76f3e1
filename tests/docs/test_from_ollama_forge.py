"""The page for those who come from elsewhere: every test it names is there, every key and every verb too."""

from __future__ import annotations

import re
from pathlib import Path

from abliterate.cli import VERBS
from abliterate.contract.recipe import recipe_from_table
from abliterate.forge import KINDS
from abliterate.recipe_notes import keys
from abliterated.cli import VERBS as DAEMON_VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "from-ollama-forge.md").read_text()


def test_every_test_it_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 15
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_every_verb_it_names_is_there() -> None:
    for program, verbs in (("abliterate", VERBS), ("abliterated", DAEMON_VERBS)):
        named = re.findall(rf"`{program} ([a-z][a-z-]+)", PAGE)
        assert named
        assert set(named) <= set(verbs)


def test_all_their_keys_have_a_row_and_all_ours_exist() -> None:
    section = PAGE.partition("## The 27 keys")[2].partition("## Files")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(key for theirs, _ in rows for key in re.findall(r"`(\w+)`", theirs)) == sorted(KINDS)
    for _, ours in rows:
        for dotted in re.findall(r"`((?:prompts|direction|edit|export|run)\.\w+)", ours):
            assert dotted in keys()
    assert recipe_from_table({"model": "hf:a/b"}).edit.norm == "columns"
