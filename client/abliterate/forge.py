"""ollama-forge's configuration as a recipe of ours: each of its 27 keys becomes a key here, or a comment that says why
it has no meaning with us. Unknown keys and wrong values are errors, all of them at once.

Their strengths for attention and MLP stand for themselves, ours are factors on `strength`: they are divided. Looks at
the model's folder, if it is one, for its depth; else pure. Does not know files' formats.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import parse_recipe

KERNELS: Final = {"constant": "constant", "linear_peak": "linear", "gaussian": "gaussian"}
_TEXT: Final = "a text"
_NUMBER: Final = "a number"
_WHOLE: Final = "a whole number"
_SWITCH: Final = "true or false"

KINDS: Final[dict[str, str]] = {
    "model": _TEXT, "output_dir": _TEXT, "llama_cpp_dir": _TEXT, "harmful": _TEXT, "harmless": _TEXT,
    "harmful_dir": _TEXT, "harmless_dir": _TEXT, "num_instructions": _WHOLE, "layer_fracs": "a list of numbers",
    "num_directions": _WHOLE, "per_layer_directions": _SWITCH, "load_in_8bit": _SWITCH, "no_verify": _SWITCH,
    "strength": _NUMBER, "atten_strength": _NUMBER, "mlp_strength": _NUMBER, "skip_begin_layers": _WHOLE,
    "skip_end_layers": _WHOLE, "norm_preserving": _SWITCH, "direction_index": _NUMBER, "strength_kernel": _TEXT,
    "kernel_center_frac": _NUMBER, "kernel_width_frac": _NUMBER, "no_requantize": _SWITCH, "quant": _TEXT,
    "template_from": _TEXT, "device": _TEXT,
}  # fmt: skip
_MEANINGLESS: Final = {
    "output_dir": "the product goes to Ollama; `abliterated work RECIPE --out DIR` writes it where you say",
    "llama_cpp_dir": "no llama.cpp is needed; a converter of yours is [tools] converter in config.toml",
    "load_in_8bit": "a model too large for the device is streamed through it, at full precision",
    "no_verify": "what is written is always checked; [evaluate] prompts = 0 leaves the questions out",
}


@dataclass
class _Page:
    """The recipe as it grows: values by table, comments by table; `notes` are said to the person too."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)

    def put(self, dotted: str, value: Any) -> None:
        table, _, key = dotted.rpartition(".")
        self.values.setdefault(table, {})[key] = value


def import_forge(table: Mapping[str, Any], source: str) -> tuple[str, list[str]]:
    """The recipe's TOML and what there is to say about it. Raises RecipeError that names every problem."""
    given = {str(key): value for key, value in table.items() if value is not None}
    problems = [problem for key, value in given.items() if (problem := _problem(key, value))]
    if "model" not in given:
        problems.append("model: missing")
    if problems:
        raise RecipeError("\n".join(f"{source}: {problem}" for problem in problems), remedy="Correct it and try again")
    page = _Page()
    for take in (_model, _prompts, _direction, _edit, _export):
        take(given, page)
    for key, why in _MEANINGLESS.items():
        if key in given:
            page.comments.append(f"{key} = {json.dumps(given[key])}: {why}")
    text = _toml(page, source)
    parse_recipe(text.encode(), f"{source}, as a recipe")
    return text, page.comments


def _model(given: Mapping[str, Any], page: _Page) -> None:
    model = given["model"]
    is_path = model.endswith(".gguf") or model.startswith(("/", "./", "../", "~")) or Path(model).exists()
    page.put("model", str(Path(model).expanduser().absolute()) if is_path else f"hf:{model}")


def _prompts(given: Mapping[str, Any], page: _Page) -> None:
    for kind in ("harmful", "harmless"):
        places = [given[key] for key in (kind, f"{kind}_dir") if given.get(key)]
        if places:
            found = [str(Path(place).expanduser().absolute()) for place in places]
            page.put(f"prompts.{kind}", found if len(found) > 1 else found[0])
    if "num_instructions" in given:
        page.put("prompts.count", given["num_instructions"])


def _direction(given: Mapping[str, Any], page: _Page) -> None:
    if fractions := given.get("layer_fracs"):
        page.put("direction.method", "layer")
        page.put("direction.layer", [float(one) for one in fractions] if len(fractions) > 1 else float(fractions[0]))
    if given.get("per_layer_directions"):
        page.put("direction.method", "per-layer")
        page.values["direction"].pop("layer", None)
        if given.get("layer_fracs"):
            page.comments.append("layer_fracs: every layer has its own direction, so there is none to choose")
    if "direction_index" in given:
        page.put("direction.index", float(given["direction_index"]))
    if "num_directions" in given:
        page.put("direction.rank", given["num_directions"])


def _edit(given: Mapping[str, Any], page: _Page) -> None:
    strength = float(given.get("strength", 1.0))
    parts = {
        key: float(given.get(f"{name}_strength", strength)) for key, name in (("attention", "atten"), ("mlp", "mlp"))
    }
    scale = strength or (1.0 if any(parts.values()) else 0.0)
    if "strength" in given or scale != 1.0:
        page.put("edit.strength", scale)
    for key, value in parts.items():
        if scale and value != scale:
            page.put(f"edit.{key}", round(value / scale, 12))
    if given.get("norm_preserving") is False:
        page.put("edit.norm", "none")
    _layers(given, page)
    for theirs, ours in (("center", "center"), ("width", "width")):
        if (key := f"kernel_{theirs}_frac") in given:
            page.put(f"edit.{ours}", float(given[key]))
    if "strength_kernel" in given:
        page.put("edit.kernel", KERNELS[given["strength_kernel"]])


def _layers(given: Mapping[str, Any], page: _Page) -> None:
    first, last = given.get("skip_begin_layers", 0), given.get("skip_end_layers", 0)
    depth = _depth(str(page.values[""]["model"]))
    if last and depth and depth - 1 - last >= first:
        page.put("edit.layers", f"{first}-{depth - 1 - last}")
        return
    if first:
        page.put("edit.layers", f"{first}-")
    if last:
        page.comments.append(
            f"skip_end_layers = {last}: how many layers the model has isn't known here; with N of them write "
            f'[edit] layers = "{first}-M", M = N - {last + 1}'
        )


def _depth(model: str) -> int:
    """How many layers a folder's configuration tells of; 0 where it tells of none."""
    try:
        told = json.loads((Path(model) / "config.json").read_bytes())
        return int((told.get("text_config") or told)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _export(given: Mapping[str, Any], page: _Page) -> None:
    if given.get("no_requantize"):
        page.put("export.quantize", "F16")
        if "quant" in given:
            page.comments.append(f"quant = {json.dumps(given['quant'])}: no_requantize leaves it out")
    elif "quant" in given:
        page.put("export.quantize", given["quant"])
    if given.get("template_from"):
        page.put("export.template_from", given["template_from"])
    if given.get("device", "auto") != "auto":
        page.put("run.device", given["device"])


def _toml(page: _Page, source: str) -> str:
    lines = [f"# From {json.dumps(source, ensure_ascii=False)[1:-1]}, written for ollama-forge."]
    lines += [f"# {comment}" for comment in page.comments]
    for table in ("", "prompts", "direction", "edit", "export", "run"):
        if values := page.values.get(table):
            lines += ["", *([f"[{table}]"] if table else [])]
            lines += [f"{key} = {_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """TOML; JSON's spelling of texts, numbers and lists is TOML's as well."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _problem(key: str, value: Any) -> str:
    """What is wrong with a key or its value; nothing where it is good."""
    if key not in KINDS:
        near = difflib.get_close_matches(key, KINDS, n=1, cutoff=0.6)
        return f"{key}: unknown key" + (f" (did you mean `{near[0]}`?)" if near else "")
    kind = KINDS[key]
    if not _TESTS[kind](value):
        return f"{key}: must be {kind}, and is {json.dumps(value, default=str)[:60]}"
    if key == "strength_kernel" and value not in KERNELS:
        near = difflib.get_close_matches(value, KERNELS, n=1)
        return f"{key}: {value!r} is none of {', '.join(KERNELS)}" + (f" (did you mean `{near[0]}`?)" if near else "")
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


_TESTS: Final[dict[str, Callable[[Any], bool]]] = {
    _TEXT: lambda value: isinstance(value, str) and value.isprintable(),
    _NUMBER: _is_number,
    _WHOLE: lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6,
    _SWITCH: lambda value: isinstance(value, bool),
    "a list of numbers": lambda value: isinstance(value, list) and bool(value) and all(map(_is_number, value)),
}
