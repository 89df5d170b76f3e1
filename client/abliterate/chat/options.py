"""Ollama's options as a person types them: `num_ctx=4096` becomes a typed value, a misspelt one is named. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Final

from abliterate.contract.errors import RecipeError

_WHOLE: Final = (
    "num_ctx num_predict num_keep num_batch num_gpu main_gpu num_thread seed top_k repeat_last_n "
    "draft_num_predict mirostat"
)
_NUMBERS: Final = (
    "temperature top_p min_p typical_p tfs_z repeat_penalty presence_penalty frequency_penalty "
    "mirostat_tau mirostat_eta"
)
KINDS: Final[dict[str, type]] = (
    dict.fromkeys(_WHOLE.split(), int)
    | dict.fromkeys(_NUMBERS.split(), float)
    | {"use_mmap": bool, "numa": bool, "penalize_newline": bool, "stop": list}
)
_SPELT: Final = {int: "a whole number", float: "a number", bool: "true or false"}


def parse_options(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as the options of a request; `stop` may come again and again. Raises RecipeError."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {setting}: no key=value", remedy="As in --set num_ctx=8192")
        add_option(found, key.strip(), value)
    return found


def add_option(options: dict[str, Any], key: str, value: str) -> None:
    """Set one option in `options`. Raises RecipeError."""
    kind = KINDS.get(key)
    if kind is None:
        near = difflib.get_close_matches(key, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "Known are: " + ", ".join(sorted(KINDS))
        raise RecipeError(f"{key}: no option of an engine", remedy=hint)
    if kind is list:
        options[key] = [*options.get(key, []), value]
        return
    text = value.strip().lower()
    try:
        if kind is bool:
            options[key] = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text]
        else:
            options[key] = number = kind(text)
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError(text)
    except (KeyError, ValueError, OverflowError) as error:
        options.pop(key, None)
        raise RecipeError(f"{key}={value}: not {_SPELT[kind]}", remedy=f"As in {key}={_example(kind)}") from error


def _example(kind: type) -> str:
    return {int: "4096", float: "0.7"}.get(kind, "true")
