"""The recipe: the design's example and defaults, and every way in which one can be wrong."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Recipe, parse_recipe, recipe_digest, recipe_from_table, target_name
from contract_recipe.design_examples import RECIPE


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.encode(), "r.toml")
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value.message


def test_the_design_s_recipe_parses() -> None:
    recipe = parse_recipe(RECIPE.encode())
    assert recipe.model == "ollama:qwen3:8b"
    assert target_name(recipe).short() == "qwen3-abliterated:8b"


def test_the_defaults_are_the_design_s_and_no_key_is_missing_or_new() -> None:
    spelt = tomllib.loads(RECIPE)
    defaults: dict[str, Any] = msgspec.to_builtins(parse_recipe(b'model = "ollama:qwen3:8b"'))
    assert defaults.pop("matrix") == {}  # the design gives an example there, no default
    assert defaults | {"name": spelt["name"]} == spelt


def test_a_recipe_can_t_be_changed_once_read() -> None:
    recipe = parse_recipe(RECIPE.encode())
    with pytest.raises(AttributeError):
        recipe.model = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        recipe.edit.strength = 2.0  # type: ignore[misc]


def test_two_spellings_of_one_wish_have_one_digest() -> None:
    assert recipe_digest(parse_recipe(b'model="ollama:a"')) == recipe_digest(
        parse_recipe(b'# words\nmodel = "ollama:a"\n[edit]\nstrength = 1.0\n')
    )
    assert recipe_digest(parse_recipe(b'model="ollama:a"')) != recipe_digest(parse_recipe(b'model="ollama:b"'))


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("ollama:qwen3:8b", "qwen3-abliterated:8b"),
        ("ollama:qwen3", "qwen3-abliterated:latest"),
        ("ollama:someone/model:q4", "someone/model-abliterated:q4"),
        ("hf:Org/Some-Model", "some-model-abliterated:latest"),
        ("hf:Org/Some-Model@" + "a" * 40, "some-model-abliterated:latest"),
        ("/models/Llama 3 (Best).gguf", "llama-3-best-abliterated:latest"),
        ("/models/Folder_1.5B", "folder_1.5b-abliterated:latest"),
        ("models/x.gguf", "x-abliterated:latest"),
    ],
)
def test_the_product_s_name(model: str, target: str) -> None:
    assert target_name(recipe_from_table({"model": model})).short() == target


def test_every_problem_is_named_at_once_with_its_line() -> None:
    message = refusal(
        'model = "ollama:qwen3:8b"\nreplase = true\n\n[edit]\nstrenght = 2\nnorm = "colums"\n'
        'strength = 99\n[prompts]\ncount = "many"\n[nonsense]\nx = 1\n'
    )
    lines = message.split("\n")
    assert len(lines) == 6
    assert "r.toml, line 2: replase: unknown key (did you mean `replace`?)" in lines
    assert "r.toml, line 5: edit.strenght: unknown key (did you mean `strength`?)" in lines
    assert any(line.startswith("r.toml, line 6: edit.norm:") and "did you mean 'columns'?" in line for line in lines)
    assert any(line.startswith("r.toml, line 7: edit.strength:") and "at most 10" in line for line in lines)
    assert any(line.startswith("r.toml, line 9: prompts.count:") for line in lines)
    assert any(line.startswith("r.toml, line 10: nonsense: unknown key") for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["model: missing"]),
        ('model = ""', ["line 1: model"]),
        ("model = 7", ["line 1: model"]),
        ('model = "qwen3:8b"', ["line 1: model", "ollama:qwen3:8b"]),
        ('model = "ollama:"', ["line 1: model"]),
        ('model = "ollama:a b"', ["line 1: model", "no model name"]),
        ('model = "hf:just-one-part"', ["line 1: model", "hf:ORG/REPO"]),
        ('model = "ollama:a"\nname = "so/many/parts/here"', ["line 2: name"]),
        ('model = "ollama:a"\nname = "a b"', ["line 2: name"]),
        ('model = "ollama:a"\nedit = 3', ["line 2: edit", "must be a table", "[edit]"]),
        ('model = "ollama:a"\n[edit]\nstrength = nan', ["line 3: edit.strength", "not a finite number"]),
        ('model = "ollama:a"\n[edit]\nstrength = inf', ["line 3: edit.strength", "not a finite number"]),
        ('model = "ollama:a"\n[edit]\nlayers = "some"', ["line 3: edit.layers", "names no layers"]),
        ('model = "ollama:a"\n[edit]\nlayers = [1, -2]', ["line 3: edit.layers"]),
        ('model = "ollama:a"\n[edit]\nwidth = 0', ["line 3: edit.width"]),
        ('model = "ollama:a"\n[direction]\nmethod = "file"', ["direction.file: missing"]),
        ('model = "ollama:a"\n[direction]\nposition = 0', ["line 3: direction.position"]),
        ('model = "ollama:a"\n[direction]\nlayer = [0.5, nan]', ["line 3: direction.layer", "finite"]),
        ('model = "ollama:a"\n[direction]\nindex = "best"', ["line 3: direction.index"]),
        ('model = "ollama:a"\n[export]\nformat = "adapter"', ["edit.norm", "adapter"]),
        ('model = "ollama:a"\n[prompts]\nharmful = []', ["line 3: prompts.harmful", "empty"]),
        ('model = "ollama:a"\n[prompts]\nharmful = ""', ["line 3: prompts.harmful", "empty"]),
        ('model = "ollama:a"\n[prompts]\ncount = true', ["line 3: prompts.count"]),
        ('model = "ollama:a"\n[schedule]\nwindow = "25:00-07:00"', ["line 3: schedule.window"]),
        ('model = "ollama:a"\n[schedule]\nnot_before = "tonight"', ["line 3: schedule.not_before"]),
        ('model = "ollama:a"\n[run]\ndevice = "gpu"', ["line 3: run.device"]),
        ('model = "ollama:a"\nmatrix = {model = "x"}', ["line 2: matrix"]),
        ('model = "ollama:a"\nmodel = "ollama:b"', ["line 2"]),
        ("model = ", ["line 1"]),
        ("[" * 5000, ["r.toml"]),
        ("model = 1" + "0" * 5000, ["r.toml"]),
    ],
)
def test_what_is_wrong_is_said(text: str, words: list[str]) -> None:
    message = refusal(text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text",
    [
        'model = "ollama:a"\n[schedule]\nnot_before = 2030-01-31T22:00:00',
        'model = "ollama:a"\n[schedule]\nnot_before = "2030-01-31T22:00"',
        'model = "ollama:a"\n[schedule]\nwindow = "22:30-06:00"',
        'model = "ollama:a"\n[edit]\nstrength = 1\nlayers = "2-30"',
        'model = "ollama:a"\n[edit]\nlayers = [4, 5]',
        'model = "ollama:a"\n[direction]\nlayer = [0.5, 12]\nindex = 11.5',
        'model = "ollama:a"\n[prompts]\nharmful = ["a.txt", "hf:org/set#text"]',
        'model = "ollama:a"\nedit.strength = 0.5\nedit.mlp = 0.25',
        'model = "ollama:a"\n[matrix]\nmodel = ["ollama:b", "ollama:c"]\n"edit.strength" = [0.5, 1.0]',
        '\ufeffmodel = "ollama:a"\r\n[run]\r\ndevice = "cuda:1"\r\n',
        'model = "./odd:name"',
        'model = "/models/odd:name.gguf"',
        'model = "odd:name.gguf"',
    ],
)
def test_what_is_right_is_taken(text: str) -> None:
    assert isinstance(parse_recipe(text.encode()), Recipe)


def test_a_whole_number_serves_where_a_fraction_may_stand() -> None:
    assert parse_recipe(b'model="ollama:a"\n[edit]\nstrength=2').edit.strength == 2.0


def test_a_layer_stays_an_index_or_a_fraction() -> None:
    layer = parse_recipe(b'model="ollama:a"\n[direction]\nlayer=12').direction.layer
    assert layer == 12
    assert isinstance(layer, int)
    layer = parse_recipe(b'model="ollama:a"\n[direction]\nlayer=0.5').direction.layer
    assert isinstance(layer, float)


def test_a_model_that_would_overwrite_its_own_base_is_refused() -> None:
    with pytest.raises(RecipeError, match="base itself"):
        parse_recipe(b'model = "ollama:qwen3-abliterated:8b"\n')
    parse_recipe(b'model = "ollama:qwen3-abliterated:8b"\nname = "qwen3-abliterated-twice:8b"\n')
