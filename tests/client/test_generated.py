"""What is generated from the contract and from the parsers, held to them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from abliterate.cli import VERBS
from abliterate.commands.completions import script
from abliterate.config_notes import NOTES as CONFIG_NOTES
from abliterate.contract.config import Config
from abliterate.contract.recipe import parse_recipe, recipe_from_table, target_name
from abliterate.introspect import verbs
from abliterate.keys import dotted
from abliterate.recipe_notes import NOTES, commented_recipe, keys
from abliterate.reference import reference
from abliterate.wishes import model_reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "client.md"


def test_every_key_of_the_contract_has_its_words_and_no_other_has() -> None:
    assert sorted(NOTES) == sorted(keys())
    assert sorted(CONFIG_NOTES) == sorted(dotted(Config))


def test_the_new_recipe_is_the_default_and_so_it_is_with_every_comment_taken_off() -> None:
    text = commented_recipe("ollama:qwen3:8b")
    recipe = parse_recipe(text.encode())
    assert recipe == recipe_from_table({"model": "ollama:qwen3:8b"})
    bare = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", text)
    spelt = parse_recipe(bare.encode())
    assert spelt.name == "qwen3-abliterated:8b" == target_name(recipe).short()
    assert recipe_from_table(tomllib.loads(bare) | {"name": ""}) == recipe
    assert len([line for line in bare.splitlines() if re.match(r"[a-z_]+ = ", line)]) == len(keys()) - 1
    assert "edit.norm" not in text
    assert "columns | rows | none" in text
    assert "0 to 10" in text


@pytest.mark.parametrize("model", ["qwen3", "hf:org/repo", "./odd \"quoted\" 'name'", "/x/ä\x7f.gguf", "a/b:c"])
def test_a_new_recipe_is_valid_for_any_model(model: str) -> None:
    text = commented_recipe(model_reference(model))
    assert parse_recipe(text.encode()).model == model_reference(model)


def test_the_reference_is_what_the_program_says() -> None:
    """Regenerate with: python -m abliterate.reference > docs/reference/client.md"""
    # Spaces apart: versions of argparse wrap differently.
    assert PAGE.read_text().split() == reference().split()


def test_every_verb_teaches() -> None:
    assert [verb.name for verb in verbs()] == list(VERBS)
    for verb in verbs():
        assert "examples:" in verb.help, verb.name
        assert f"abliterate {verb.name}" in verb.help
        for option in verb.options:
            assert option.help, (verb.name, option.names)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_valid_for_their_shell(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    for verb in VERBS:
        assert verb in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "c").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "c")], check=True, capture_output=True)


def test_bash_completes_verbs_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "night.toml").write_text("")
    (tmp_path / "c").write_text(script("bash"))

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        ask = f"source ./c; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _abliterate; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("abliterate", "sta") == ["status"]
    assert complete("abliterate", "status", "--w") == ["--watch"]
    assert complete("abliterate", "--config", "nig") == ["night.toml"]
    assert complete("abliterate", "--config", "x.toml", "wai") == ["wait"]
    assert complete("abliterate", "submit", "nig") == ["night.toml"]
    assert complete("abliterate", "completions", "z") == ["zsh"]
