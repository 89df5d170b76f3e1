"""The commented recipe `new` writes: keys, defaults, types and bounds come from the contract, the words stand here.

A test holds the words to the contract's keys, neither more nor fewer. Pure.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import inspect

from abliterate.contract.recipe import Recipe, recipe_from_table, target_name

NOTES: Final[dict[str, str]] = {
    "model": "ollama:NAME, hf:ORG/REPO[@COMMIT], a folder, or a .gguf file",
    "name": "what the product is called in Ollama",
    "replace": "overwrite a model of that name that abliterated did not make",
    "force": "run again though the same recipe and base already succeeded",
    "prompts.harmful": "builtin, a text file (one prompt a line), a folder, hf:DATASET#COLUMN, or a list of these",
    "prompts.harmless": "the same, for prompts the model answers anyway",
    "prompts.atoms": "harmless concepts whose directions are protected",
    "prompts.count": "how many of each are measured",
    "prompts.seed": "draws them",
    "prompts.system": "system prompt while measuring",
    "direction.method": "auto tries layers and positions on held-out prompts; file takes a measured one",
    "direction.layer": "for method layer: a fraction of the depth or an index; a list is tried in turn",
    "direction.index": "a number between two layers mixes their directions",
    "direction.position": "which token is read, counted from the end",
    "direction.rank": "how many directions are removed",
    "direction.convention": "which side of the layer is read",
    "direction.orthogonalize": "remove the harmless mean's component first",
    "direction.winsorize": "clip each prompt's activations at that quantile of their size (GeGLU: 0.995); 1: off",
    "direction.file": "for method file: .pt or .safetensors",
    "edit.strength": "1 removes the direction wholly",
    "edit.attention": "factor on strength for the attention's writers",
    "edit.mlp": "factor on strength for the MLP's writers",
    "edit.norm": "which norms of the matrices are kept",
    "edit.layers": '"all", "2-30", "1-", "-30", or a list',
    "edit.kernel": "how strength runs over the depth",
    "edit.center": "the kernel's middle, as a fraction of the depth",
    "edit.width": "the kernel's width, as a fraction of the depth",
    "edit.floor": "the kernel's least factor",
    "edit.post_norm": "correct for norms between writer and stream",
    "edit.embeddings": "edit the token embeddings too",
    "edit.invert": "strengthen the refusal instead",
    "search.trials": "0 searches nothing",
    "search.refusal_target": "good enough at this refusal rate",
    "evaluate.prompts": "how many are asked of the written model; 0 asks none",
    "evaluate.tokens": "longest answer",
    "evaluate.judge": "a model Ollama serves, to judge the answers",
    "evaluate.keep_answers": "store the answers in the report",
    "evaluate.suites": "further checks: over-refusal, injection, extraction, multi-turn, tool-misuse, files",
    "export.format": "what comes out",
    "export.quantize": "keep the base's types, or Q8_0, Q6_K, Q5_K_M, Q4_K_M, F16, BF16 …",
    "export.template_from": "take the chat template of this model in Ollama",
    "export.tool_template": "mend a chat template that drops tools its model was trained for",
    "export.register": "give the product to Ollama",
    "export.allow_partial": "go on though not every writer could be edited",
    "run.device": "auto, cpu, mps, cuda, or cuda:N",
    "run.dtype": "precision while measuring",
    "run.from_checkpoint": "start at the export, from an edited folder",
    "schedule.window": 'only between these local times: "01:00-07:00"',
    "schedule.not_before": 'not before this local time: "2030-01-31T22:00"',
    "schedule.after": "names of recipes that come first",
    "schedule.when": "gpu-idle waits until nobody else uses the GPU",
    "schedule.priority": "higher goes first",
    "schedule.hold": "wait for `abliterate release`",
    "matrix": "one recipe, many jobs: every combination of the lists",
}

_MATRIX_EXAMPLE: Final = '# "edit.strength" = [0.8, 1.0]'


def commented_recipe(model: str) -> str:
    """A recipe for `model`: every other key commented out, with its default, its choices and what it is for."""
    name = target_name(recipe_from_table({"model": model}, "new")).short()
    blocks = [
        "# A recipe for abliterated. Only `model` is needed: every other line shows its default; uncomment to change.",
        _row("model", _toml(model), "", active=True),
    ]
    top: list[str] = []
    for field in msgspec.structs.fields(Recipe):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            about = (field.type.__doc__ or "").partition(": ")[2].strip().rstrip(".")
            rows = [_row(key, _toml(default), _allowed(kind), field.name) for key, kind, default in _keys(field.type)]
            blocks.append("\n".join([f"[{field.name}]  # {about}", *rows]))
        elif field.name == "matrix":
            blocks.append(f"[matrix]  # {NOTES['matrix']}\n{_MATRIX_EXAMPLE}")
        elif field.name != "model":
            top.append(_row(field.name, _toml(name if field.name == "name" else field.default), ""))
    blocks[1] += "\n" + "\n".join(top)
    return "\n\n".join(blocks) + "\n"


def keys() -> list[str]:
    """Every dotted key of a recipe."""
    found: list[str] = []
    for field in msgspec.structs.fields(Recipe):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += [f"{field.name}.{key}" for key, _, _ in _keys(field.type)]
        else:
            found.append(field.name)
    return found


def _keys(kind: type[msgspec.Struct]) -> list[tuple[str, Any, Any]]:
    return [
        (field.encode_name, field.type, field.default if field.default_factory is msgspec.NODEFAULT else [])
        for field in msgspec.structs.fields(kind)
    ]


def _row(key: str, value: str, allowed: str, table: str = "", active: bool = False) -> str:
    note = NOTES[f"{table}.{key}" if table else key]
    setting = f"{'' if active else '# '}{key} = {value}"
    return f"{setting:<32}  # {note}" + (f" ({allowed})" if allowed else "")


def _toml(value: Any) -> str:
    """A TOML value; JSON's spelling of text, numbers, booleans and lists is TOML's as well."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _allowed(annotation: Any) -> str:
    """The choices or bounds an annotation names, as a person reads them."""
    info = inspect.type_info(annotation)
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    for option in (annotation, *get_args(annotation)):  # msgspec's own list of the values is sorted
        if get_origin(option) is Literal and len(get_args(option)) > 1:
            return " | ".join(str(value) for value in get_args(option))
    if len(options) == 1 and isinstance(options[0], inspect.IntType | inspect.FloatType):
        low = options[0].ge if options[0].ge is not None else options[0].gt
        high = options[0].le
        if low is not None and high is not None and high < 2**31:
            return f"{low:g} to {high:g}"
    return ""
