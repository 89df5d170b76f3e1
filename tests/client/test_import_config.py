"""ollama-forge's configurations, as their users have them, become recipes."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Recipe, parse_recipe
from abliterate.forge import KINDS, import_forge

Run = Callable[..., subprocess.CompletedProcess[str]]
EVERYTHING: dict[str, Any] = {
    "model": "Qwen/Qwen3-8B",
    "output_dir": "out",
    "llama_cpp_dir": "/x/llama.cpp",
    "harmful": "h.txt",
    "harmless": "s.txt",
    "harmful_dir": "hd",
    "harmless_dir": None,
    "num_instructions": 64,
    "layer_fracs": [0.4, 0.5, 0.6],
    "num_directions": 2,
    "per_layer_directions": False,
    "load_in_8bit": True,
    "no_verify": True,
    "strength": 0.8,
    "atten_strength": 0.4,
    "mlp_strength": 0.8,
    "skip_begin_layers": 1,
    "skip_end_layers": 2,
    "norm_preserving": False,
    "direction_index": 12.5,
    "strength_kernel": "linear_peak",
    "kernel_center_frac": 0.6,
    "kernel_width_frac": 0.3,
    "no_requantize": False,
    "quant": "Q5_K_M",
    "template_from": "qwen3:8b",
    "device": "cuda:1",
}


def recipe_of(**forge: Any) -> tuple[Recipe, list[str]]:
    text, comments = import_forge({"model": "org/m", **forge}, "forge.yaml")
    return parse_recipe(text.encode()), comments


def test_there_are_their_27_keys_and_no_other() -> None:
    assert sorted(KINDS) == sorted(EVERYTHING)
    assert len(KINDS) == 27


def test_every_key_has_its_place_or_its_comment(run: Run, tmp_path: Path) -> None:
    (tmp_path / "forge.json").write_text(json.dumps(EVERYTHING))
    done = run("import-config", "forge.json")
    assert done.returncode == 0, done.stderr
    recipe = parse_recipe(done.stdout.encode())
    assert recipe.model == "hf:Qwen/Qwen3-8B"
    assert recipe.prompts.harmful == [str(tmp_path / "h.txt"), str(tmp_path / "hd")]
    assert recipe.prompts.harmless == str(tmp_path / "s.txt")
    assert recipe.prompts.count == 64
    assert (recipe.direction.method, recipe.direction.layer) == ("layer", [0.4, 0.5, 0.6])
    assert (recipe.direction.rank, recipe.direction.index) == (2, 12.5)
    assert (recipe.edit.strength, recipe.edit.attention, recipe.edit.mlp) == (0.8, 0.5, 1.0)
    assert (recipe.edit.layers, recipe.edit.norm) == ("1-", "none")
    assert (recipe.edit.kernel, recipe.edit.center, recipe.edit.width) == ("linear", 0.6, 0.3)
    assert (recipe.export.quantize, recipe.export.template_from) == ("Q5_K_M", "qwen3:8b")
    assert recipe.run.device == "cuda:1"
    for key in ("output_dir", "llama_cpp_dir", "load_in_8bit", "no_verify", "skip_end_layers"):
        assert f"# {key} = " in done.stdout
        assert f"abliterate: {key} = " in done.stderr
    assert run("check", "-", input=done.stdout).returncode == 0


def test_yaml_says_the_same_as_json(run: Run, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with abliterated[pipeline]")
    (tmp_path / "forge.yaml").write_text("# mine\n" + yaml.safe_dump(EVERYTHING))
    (tmp_path / "forge.json").write_text(json.dumps(EVERYTHING))
    first, second = (run("import-config", f"forge.{kind}").stdout for kind in ("yaml", "json"))
    assert first.splitlines()[1:] == second.splitlines()[1:]


def test_a_folder_tells_how_many_layers_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    recipe, comments = recipe_of(model=str(tmp_path), skip_begin_layers=1, skip_end_layers=1)
    assert (recipe.model, recipe.edit.layers, comments) == (str(tmp_path), "1-30", [])


def test_directions_of_their_own_for_every_layer() -> None:
    recipe, comments = recipe_of(per_layer_directions=True, layer_fracs=[0.5])
    assert (recipe.direction.method, len(comments)) == ("per-layer", 1)


def test_no_requantize_is_half_precision() -> None:
    assert recipe_of(no_requantize=True, quant="Q4_K_M")[0].export.quantize == "F16"


@pytest.mark.parametrize(
    ("forge", "ours"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"strength": 0.5}, (0.5, 1.0, 1.0)),
        ({"atten_strength": 0.5}, (1.0, 0.5, 1.0)),
        ({"strength": 2.0, "mlp_strength": 1.0}, (2.0, 1.0, 0.5)),
        ({"strength": 0.0, "mlp_strength": 0.7}, (1.0, 0.0, 0.7)),
        ({"strength": 0.0}, (0.0, 1.0, 1.0)),
    ],
)
def test_strengths_of_the_parts_become_factors(forge: dict[str, float], ours: tuple[float, ...]) -> None:
    edit = recipe_of(**forge)[0].edit
    assert (edit.strength, edit.attention, edit.mlp) == ours


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("modle: x\nstrength: a\nfoo: 1\n", 2, ["modle: unknown key (did you mean `model`?)", "strength: must be a",
                                                 "foo: unknown key", "model: missing"]),
        ("model: org/m\nstrength_kernel: gausian\n", 2, ["did you mean `gaussian`?"]),
        ("model: org/m\nstrength: 99\n", 2, ["edit.strength"]),
        ("model: [org/m\n", 2, ["not readable as YAML (line 2"]),
        ("model: !!python/object/apply:os.system [ls]\n", 2, ["not readable as YAML"]),
        ("a: &a [x]\nmodel: *a\n", 2, ["aliases are not read"]),
        ("- a\n- b\n", 2, ["no configuration"]),
        ("", 2, ["no configuration"]),
        ("\x00", 2, ["not readable as YAML"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(run: Run, text: str, code: int, words: list[str]) -> None:
    pytest.importorskip("yaml", reason="PyYAML comes with abliterated[pipeline]")
    done = run("import-config", "-", input=text)
    assert (done.returncode, done.stdout) == (code, "")
    for word in words:
        assert word in done.stderr
    assert "→" in done.stderr


def test_no_file_and_no_json(run: Run, tmp_path: Path) -> None:
    assert run("import-config", "none.yaml").returncode == 7
    (tmp_path / "f.json").write_text("{")
    done = run("import-config", "f.json")
    assert (done.returncode, "not readable as JSON" in done.stderr) == (2, True)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.floats(), max_size=3)
)


@given(st.dictionaries(st.sampled_from(sorted(KINDS)) | st.text(max_size=6), values, max_size=8))
def test_whatever_stands_there_becomes_a_recipe_or_an_error(table: dict[str, Any]) -> None:
    with contextlib.suppress(RecipeError):
        text, _ = import_forge({"model": "org/m", **table}, "f")
        parse_recipe(text.encode())
