"""From what a person typed to the recipe that is sent: a file, a model's name or stdin, `--set`, `--name`, paths made
absolute. Validated before anybody else sees it.

Looks at the local files a recipe names; does not talk to the daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from abliterate.contract.config import local_path
from abliterate.contract.errors import NotFound, RecipeError
from abliterate.contract.names import parse_name
from abliterate.contract.recipe import Recipe, recipe_from_table
from abliterate.contract.toml_source import MAX_BYTES, parse_toml

_PREFIXES: Final = ("ollama:", "hf:")
# Keys that may hold a path, and the words in their place that are none.
_PATHS: Final = {"model", "prompts.harmful", "prompts.harmless", "direction.file", "run.from_checkpoint"}
_MAYBE_PATHS: Final = {"prompts.atoms", "evaluate.suites"}


@dataclass(frozen=True)
class Wish:
    """A valid recipe, its text as it is sent, and what to call it."""

    recipe: Recipe
    text: str
    label: str


def read_wish(asked: str, *, name: str = "", settings: Sequence[str] = (), must_exist: bool = True) -> Wish:
    """The recipe that `asked` means: `-`, a recipe's path, or a model. Raises RecipeError or NotFound."""
    if asked == "-":
        data, source, label, base = read_recipe(asked), "stdin", "stdin", Path.cwd()
    elif is_recipe_file(asked):
        path = local_path(asked)
        data, source, label, base = read_recipe(asked), asked, path.stem, path.absolute().parent
    else:
        data, source, label, base = b"", asked, _label(asked), Path.cwd()
    table, text = parse_toml(data, source)
    changed = False
    if not data and asked != "-" and not is_recipe_file(asked):
        table["model"], changed = model_reference(asked), True
    here = {key: value for key, value in [("name", name)] if value} | dict(map(_setting, settings))
    # Relative paths in a file mean beside that file, those on the command line mean from here.
    changed |= _absolute(table, base, must_exist)
    for key, value in here.items():
        _put(table, key, _resolve(key, value, Path.cwd(), must_exist), key)
        changed = True
    recipe = recipe_from_table(table, source, text)
    if changed:
        import tomli_w

        text = tomli_w.dumps(table)
    return Wish(recipe, text, label)


def read_recipe(asked: str) -> bytes:
    """The bytes of a recipe's file, or of stdin for `-`; never more than a recipe may have, and one."""
    if asked == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        with local_path(asked).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFound(f"{asked}: no such recipe", remedy="`abliterate new > recipe.toml` writes one") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{asked}: can't be read ({error})", remedy="Name a recipe's file") from error


def is_recipe_file(asked: str) -> bool:
    """Whether `asked` names a recipe rather than a model."""
    if asked.startswith(_PREFIXES) or asked.endswith(".gguf"):
        return False
    if asked.endswith(".toml"):
        return True
    return _is_path(asked) and local_path(asked).is_file()


def model_reference(asked: str) -> str:
    """A model as a recipe writes it: `qwen3:8b` is one of Ollama's, `./folder` and `x.gguf` are files."""
    if asked.startswith(_PREFIXES):
        return asked
    if asked.endswith(".gguf") or _is_path(asked):
        return str(local_path(asked).absolute())
    parse_name(asked)
    return f"ollama:{asked}"


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or ("/" in text and Path(text).exists())


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise RecipeError(f"--set {text}: no key=value", remedy="As in --set edit.strength=0.8")
    try:
        parsed, _ = parse_toml(f"v = {value}".encode(), "--set")
    except RecipeError:
        return key, value  # no TOML: the plain text it is, as in --set edit.layers=2-30
    return key, parsed["v"] if len(parsed) == 1 else value


def _put(table: dict[str, Any], dotted: str, value: Any, whole: str) -> None:
    first, _, rest = dotted.partition(".")
    if not rest or first == "matrix":
        if first == "matrix" and rest:
            table, first = table.setdefault("matrix", {}), rest
            if not isinstance(table, dict):
                raise RecipeError(f"--set {whole}: matrix is no table", remedy="`abliterate new` shows every key")
        table[first] = value
        return
    inner = table.setdefault(first, {})
    if not isinstance(inner, dict):
        raise RecipeError(f"--set {whole}: {first} is no table", remedy="`abliterate new` shows every key")
    _put(inner, rest, value, whole)


def _absolute(table: dict[str, Any], base: Path, must_exist: bool) -> bool:
    """Make the paths in `table` absolute, in place; returns whether anything changed."""
    changed = False
    for dotted in (*_PATHS, *_MAYBE_PATHS):
        *parents, last = dotted.split(".")
        inner: Any = table
        for parent in parents:
            inner = inner.get(parent, {}) if isinstance(inner, dict) else {}
        for place, key in ((inner, last), (table.get("matrix"), dotted)):
            if isinstance(place, dict) and key in place:
                resolved = _resolve(dotted, place[key], base, must_exist)
                changed |= resolved != place[key]
                place[key] = resolved
    return changed


def _label(model: str) -> str:
    """What a job for a bare model is called: of a path its last part."""
    return (
        model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".", "~")) or model.endswith(".gguf") else model
    )


def _resolve(key: str, value: Any, base: Path, must_exist: bool) -> Any:
    key = key.removeprefix("matrix.")
    if isinstance(value, list):
        return [_resolve(key, item, base, must_exist) for item in value]
    if not isinstance(value, str) or not value or value == "builtin" or value.startswith(_PREFIXES):
        return value
    if key in _MAYBE_PATHS:
        return _if_exists(base, value)
    if key not in _PATHS:
        return value
    path = base / local_path(value)
    if must_exist and not _may_exist(path):
        hint = f"did you mean ollama:{value}?" if key == "model" and _quiet(parse_name, value) else ""
        raise RecipeError(
            f"{key}: {value}: no such file or folder", remedy=hint or f"Correct the path: it was looked for at {path}"
        )
    return str(path)


def _if_exists(base: Path, value: str) -> str:
    path = base / local_path(value)
    return str(path) if _quiet(path.stat) else value


def _may_exist(path: Path) -> bool:
    """False only where we can see that it isn't there: the daemon may see what its client can't."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _quiet(ask: Callable[..., object], *args: object) -> bool:
    try:
        ask(*args)
    except (OSError, ValueError, RecipeError):
        return False
    return True
