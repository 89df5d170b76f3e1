"""The recipe: what a person asks for. All keys, their types, bounds and defaults; frozen once read.

`parse_recipe` is the one way in, for client and daemon alike: strict, every problem at once, with line and remedy.
Touches neither files nor network. Does not know how any of it is done.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, field

from abliterate.contract.errors import RecipeError
from abliterate.contract.names import ModelName, abliterated_name, name_from_stem, parse_name
from abliterate.contract.schema import Problem, build, raise_problems, replaced
from abliterate.contract.toml_source import parse_toml

QUANTISATIONS: Final = (
    "keep", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M",
    "Q5_0", "Q5_1", "Q4_0", "Q4_1",
)  # fmt: skip
SUITES: Final = ("over-refusal", "injection", "extraction", "multi-turn", "tool-misuse")

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Strength = Annotated[float, Meta(ge=0.0, le=10.0)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Line = Annotated[str, Meta(max_length=4096)]
Lines = Annotated[list[Line], Meta(max_length=1000)]
Layer = Annotated[float, Meta(ge=0.0, le=10_000.0)] | Annotated[int, Meta(ge=0, le=10_000)]


class Prompts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[prompts]`: what is asked while measuring."""

    harmful: Line | Lines = "builtin"
    harmless: Line | Lines = "builtin"
    atoms: Lines = field(default_factory=list)
    count: Count = 128
    seed: Seed = 0
    system: Line = ""


class Direction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[direction]`: how the refusal direction is found."""

    method: Literal["auto", "layer", "per-layer", "file"] = "auto"
    layer: Layer | list[Layer] = 0.6
    index: Literal["auto"] | float = "auto"
    position: Annotated[int, Meta(ge=-4096, le=-1)] = -1
    rank: Annotated[int, Meta(ge=1, le=64)] = 1
    convention: Literal["output", "input"] = "output"
    orthogonalize: bool = True
    winsorize: Annotated[float, Meta(gt=0.5, le=1.0)] = 1.0
    file: Line = ""


class Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[edit]`: how it is removed from the weights."""

    strength: Strength = 1.0
    attention: Strength = 1.0
    mlp: Strength = 1.0
    norm: Literal["columns", "rows", "none"] = "columns"
    layers: Line | Annotated[list[Annotated[int, Meta(ge=0, le=10_000)]], Meta(max_length=1000)] = "all"
    kernel: Literal["constant", "linear", "gaussian", "trapezoid"] = "constant"
    center: Fraction = 0.5
    width: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.4
    floor: Fraction = 0.0
    post_norm: bool = True
    embeddings: bool = False
    invert: bool = False


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[search]`: how hard to look for better strengths."""

    trials: Annotated[int, Meta(ge=0, le=100_000)] = 60
    refusal_target: Fraction = 0.03


class Evaluate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[evaluate]`: what is checked on the written model."""

    prompts: Annotated[int, Meta(ge=0, le=100_000)] = 100
    tokens: Annotated[int, Meta(ge=1, le=32_768)] = 128
    judge: Line = ""
    keep_answers: bool = False
    suites: Lines = field(default_factory=list)


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[export]`: what comes out."""

    format: Literal["gguf", "safetensors", "adapter", "direction"] = "gguf"
    quantize: Line = "keep"
    template_from: Line = ""
    tool_template: bool = True
    register: bool = True
    allow_partial: bool = False


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[run]`: on what it runs."""

    device: Annotated[
        str, Meta(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$", description="auto, cpu, mps, cuda, or cuda:N")
    ] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    from_checkpoint: Line = ""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[schedule]`: when it may run."""

    window: Annotated[
        str,
        Meta(pattern=r"^$|^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$", description='as in "01:00-07:00"'),
    ] = ""
    not_before: Line = ""
    after: Lines = field(default_factory=list)
    when: Literal["any", "gpu-idle"] = "any"
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    hold: bool = False


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole recipe. Every key but `model` has a default."""

    model: Annotated[str, Meta(min_length=1, max_length=4096)]
    name: Line = ""
    replace: bool = False
    force: bool = False
    prompts: Prompts = Prompts()
    direction: Direction = Direction()
    edit: Edit = Edit()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    run: Run = Run()
    schedule: Schedule = Schedule()
    matrix: dict[str, list[Any]] = field(default_factory=dict)


_HF = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(@[0-9a-f]{40}|@[\w./-]{1,128})?")
_LAYERS = re.compile(r"all|\d+-\d+|\d+-|-\d+|\d+")


def parse_recipe(data: bytes, source: str = "recipe") -> Recipe:
    """Read a recipe from TOML bytes. Raises RecipeError that names every problem."""
    table, text = parse_toml(data, source)
    return recipe_from_table(table, source, text)


def recipe_from_table(table: dict[str, Any], source: str = "recipe", text: str = "") -> Recipe:
    """Read a recipe from a plain table (a parsed TOML document). Raises RecipeError."""
    recipe, problems = build(Recipe, table)
    if recipe is not None:
        problems = _consistency(recipe)
    elif (rest := build(Recipe, _without(table, problems))[0]) is not None:
        wrong = {problem.key for problem in problems}
        problems += [problem for problem in _consistency(rest) if problem.key not in wrong]
    raise_problems(source, text, problems)
    assert recipe is not None
    return recipe


def _without(table: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """What is left of `table` where the keys that are wrong are taken out: that is looked at, too."""
    wrong = {problem.key for problem in problems}
    return {
        key: {name: held for name, held in value.items() if f"{key}.{name}" not in wrong}
        if isinstance(value, Mapping)
        else value
        for key, value in table.items()
        if key not in wrong
    }


def recipe_with(recipe: Recipe, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """The recipe with other values at these dotted keys. Raises RecipeError that names every problem."""
    problems: list[Problem] = []
    for key, value in values.items():
        recipe, found = replaced(recipe, key, value)
        problems += found
    raise_problems(source, "", problems or _consistency(recipe))
    return recipe


def target_name(recipe: Recipe) -> ModelName:
    """The name the product gets in Ollama. Raises RecipeError if Ollama would refuse it."""
    if recipe.name:
        return parse_name(recipe.name)
    kind, _, rest = recipe.model.partition(":")
    if kind == "ollama":
        return abliterated_name(parse_name(rest))
    if kind == "hf":
        return abliterated_name(name_from_stem(rest.partition("@")[0].rpartition("/")[2]))
    path = PurePath(recipe.model)
    return abliterated_name(name_from_stem(path.stem if path.suffix == ".gguf" else path.name))


def recipe_digest(recipe: Recipe) -> str:
    """sha256 (hex) of what the recipe asks for; defaults spelt out, so two spellings of one wish agree."""
    return hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()


def _looks_like_a_name(model: str) -> bool:
    """Whether an unprefixed model is rather a forgotten `ollama:` than a path, as `qwen3:8b` is."""
    return not model.endswith(".gguf") and not model.startswith(("/", "./", "../", "~")) and "/" not in model


def _consistency(recipe: Recipe) -> list[Problem]:
    found: list[Problem] = []
    kind, _, rest = recipe.model.partition(":")
    try:
        if kind == "ollama":
            parse_name(rest)
        elif kind == "hf" and not _HF.fullmatch(rest):
            found.append(
                Problem("model", f"{rest!r} is no Hugging Face repository", "Write hf:ORG/REPO or hf:ORG/REPO@COMMIT")
            )
        elif kind not in ("ollama", "hf") and rest and _looks_like_a_name(recipe.model):
            found.append(
                Problem(
                    "model",
                    f"{recipe.model!r} is neither a path nor says where it is from",
                    f"Write ollama:{recipe.model}, or ./{recipe.model} for a folder",
                )
            )
    except RecipeError as error:
        found.append(Problem("model", error.message, error.remedy))
    if not found:
        try:
            target = target_name(recipe)
        except RecipeError as error:
            found.append(Problem("name", error.message, error.remedy))
        else:
            if kind == "ollama" and target.key() == parse_name(rest).key():
                message = f"{target.short()} is the base itself, which would be overwritten"
                found.append(Problem("name", message, "Give another name"))
    if recipe.direction.method == "file" and not recipe.direction.file:
        found.append(Problem("direction.file", "missing", 'method = "file" needs the file\'s path'))
    if isinstance(recipe.edit.layers, str) and not _LAYERS.fullmatch(recipe.edit.layers.strip()):
        found.append(
            Problem(
                "edit.layers", f"{recipe.edit.layers!r} names no layers", 'as in "all", "2-30", "1-", "-30" or [4, 5]'
            )
        )
    if (asked := recipe.export.quantize.strip()).upper() not in {name.upper() for name in QUANTISATIONS}:
        found.append(Problem("export.quantize", f"{asked!r} is not known", f"One of {', '.join(QUANTISATIONS)}"))
    for suite in recipe.evaluate.suites:
        if re.fullmatch(r"[\w-]+", suite) and suite not in SUITES:  # a file's name has a suffix, or a folder before it
            found.append(
                Problem(
                    "evaluate.suites",
                    f"there is no suite {suite!r}",
                    f"Built in: {', '.join(SUITES)}; a file as ./{suite}",
                )
            )
    if recipe.export.format == "adapter" and recipe.edit.norm != "none":
        found.append(Problem("edit.norm", "an adapter can only hold the plain edit", 'Set edit.norm = "none"'))
    for key in ("harmful", "harmless"):
        value = getattr(recipe.prompts, key)
        if value == "" or value == []:
            found.append(Problem(f"prompts.{key}", "empty", 'Leave it out, or give "builtin" or a file'))
    if recipe.schedule.not_before:
        try:
            datetime.datetime.fromisoformat(recipe.schedule.not_before)
        except ValueError:
            found.append(Problem("schedule.not_before", "no date and time", "as in 2030-01-31T22:00"))
    if recipe.matrix and not found:
        from abliterate.contract.matrix import expand

        try:
            expand(recipe)
        except RecipeError as error:
            found.append(Problem("matrix", error.message.removeprefix("recipe: "), error.remedy))
    return found
