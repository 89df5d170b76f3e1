"""The commented recipe `new` writes: keys, defaults, types and bounds come from the contract, the words stand here.

A test holds the words to the contract's keys, neither more nor fewer. Pure.
"""

from __future__ import annotations

from typing import Any, Final

from abliterate import keys as contract
from abliterate.contract.recipe import QUANTISATIONS, SUITES, Recipe, recipe_from_table, target_name

NOTES: Final[dict[str, str]] = {
    "model": "ollama:NAME, hf:ORG/REPO[@COMMIT], a folder, or a .gguf file",
    "name": "what the product is called in Ollama; if empty, as its base, with -abliterated",
    "replace": "overwrite a model of that name that abliterated did not make",
    "force": "run again though the same recipe and base already succeeded",
    "prompts.harmful": "builtin, a text file (a prompt a line, # comments), a folder, hf:DATASET#COLUMN, or a list",
    "prompts.harmless": "the same, for prompts the model answers anyway",
    "prompts.atoms": "prompts of harmless concepts, whose directions are protected",
    "prompts.count": "how many of each are measured",
    "prompts.seed": "draws them: the same seed, the same prompts",
    "prompts.system": "system prompt while measuring",
    "direction.method": "auto tries candidates by layer and position on held-out prompts; file takes a measured one",
    "direction.layer": "for method layer: a fraction of the depth or an index; a list is tried in turn",
    "direction.index": "which layer's direction is taken; a number between two layers mixes theirs",
    "direction.position": "which token is read, counted from the end",
    "direction.rank": "how many directions are removed",
    "direction.convention": "which side of a layer is read (ollama-forge: its output; Sumandora: its input)",
    "direction.orthogonalize": "remove the harmless mean's component first",
    "direction.winsorize": "clip each prompt's activations at that quantile of their size (GeGLU: 0.995); 1: off",
    "direction.file": "for method file: .pt or .safetensors",
    "edit.strength": "1 takes the direction out wholly",
    "edit.attention": "factor on strength for the attention's writers",
    "edit.mlp": "factor on strength for the MLP's writers",
    "edit.norm": "which lengths within a matrix are kept as they were",
    "edit.layers": '"all", "2-30", "1-", "-30", or a list',
    "edit.kernel": "how strength runs over the depth",
    "edit.center": "the kernel's middle, as a fraction of the depth",
    "edit.width": "the kernel's width, as a fraction of the depth",
    "edit.floor": "the kernel's least factor",
    "edit.post_norm": "correct for norms between writer and stream",
    "edit.embeddings": "edit the token embeddings too",
    "edit.invert": "strengthen the refusal instead",
    "search.trials": "0 searches nothing",
    "search.refusal_target": "good enough: no more than this share is refused",
    "evaluate.prompts": "how many of each kind are asked; 0 asks none",
    "evaluate.tokens": "longest answer",
    "evaluate.judge": "a model Ollama serves, to judge the answers",
    "evaluate.keep_answers": "store the answers in the report",
    "evaluate.suites": f"further checks: {', '.join(SUITES)}, or files",
    "export.format": "its form",
    "export.quantize": f"keep the base's types, or {', '.join(QUANTISATIONS[1:])}",
    "export.template_from": "take the chat template of this model in Ollama",
    "export.tool_template": "mend a chat template that drops the tools its model knows (of ollama: it is kept)",
    "export.register": "give the product to Ollama",
    "export.allow_partial": "go on though not every writer could be edited",
    "run.device": "auto, cpu, mps, cuda, or cuda:N",
    "run.dtype": "precision while measuring",
    "run.from_checkpoint": "start at the export, from an edited folder",
    "schedule.window": 'only between these local times: "01:00-07:00"',
    "schedule.not_before": 'not before this local time: "2030-01-31T22:00"',
    "schedule.after": "names of recipes that must have succeeded first",
    "schedule.when": "gpu-idle waits until nobody else uses the GPU",
    "schedule.priority": "higher goes first",
    "schedule.hold": "wait for `abliterate release`",
    "matrix": "one recipe, many jobs: every combination of the lists",
}

_MATRIX_EXAMPLE: Final = '# "edit.strength" = [0.8, 1.0]'


def commented_recipe(model: str) -> str:
    """A recipe for `model`: every other key commented out, with its default, its choices and what it is for."""
    name = target_name(recipe_from_table({"model": model}, "new")).short()
    values = {"model": model, "name": name}
    rows = [_row(key, values.get(key.name, key.default)) for key in contract.keys(Recipe) if key.name != "matrix"]
    blocks = [
        "# A recipe for abliterated. Only `model` is needed: every other line shows its default; uncomment to change.",
        "\n".join(rows),
    ]
    for table in contract.tables(Recipe):
        inner = [_row(key, key.default, f"{table.name}.") for key in contract.keys(table.kind)]
        blocks.append("\n".join([f"{table.heading}  # {table.about}", *inner]))
    blocks.append(f"[matrix]  # {NOTES['matrix']}\n{_MATRIX_EXAMPLE}")
    return "\n\n".join(blocks) + "\n"


def keys() -> list[str]:
    """Every dotted key of a recipe."""
    return contract.dotted(Recipe)


def _row(key: contract.Key, value: Any, table: str = "") -> str:
    setting = f"{'' if key.default is None else '# '}{key.name} = {contract.toml(value)}"
    return f"{setting:<32}  # {NOTES[table + key.name]}" + (f" ({key.takes})" if key.takes else "")
