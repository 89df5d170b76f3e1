"""How families write calls and thoughts. Pure.

A dialect names the marks that open a call and the one that closes it; `begins` says of what follows an opening mark
whether it still can become a call, so that prose about a mark is let go early; `parse` reads what stands between.

Does not know: streaming, APIs, how a call is read (`calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from abliterated.proxy.tools.calls import (
    Calls,
    Names,
    begins_anyhow,
    begins_bracketed,
    begins_json,
    begins_key_values,
    begins_parameters,
    begins_pythonic,
    ends_in_a_string,
    parse_bracketed,
    parse_json,
    parse_key_values,
    parse_parameters,
    parse_pythonic,
    parse_wide_bars,
)

Parse = Callable[[str, Names], "Calls | None"]
Begins = Callable[[str, Names], "bool | None"]  # None: more must be seen


class Dialect(msgspec.Struct, frozen=True):
    """`close` is "" where a call ends with its JSON. `bare`: the whole answer may be a call, without marks.

    `later`: what stands before a closing mark is no call, but may become one with a later closing mark. `seed`: how a
    call of a named tool begins, behind the opening mark.
    """

    name: str
    opens: tuple[str, ...]
    close: str
    parse: Parse
    begins: Begins
    bare: bool = False
    later: Callable[[str], bool] = ends_in_a_string
    seed: str = ""


def _unclosed(mark: str) -> Callable[[str], bool]:
    return lambda text: not text.rstrip().endswith(mark)


_JSON_SEED: Final = '{"name": "%s", "arguments": '
HERMES: Final = Dialect("hermes", ("<tool_call>",), "</tool_call>", parse_json, begins_json, seed="\n" + _JSON_SEED)
PARAMETERS: Final = Dialect(
    "parameters", ("<tool_call>",), "</tool_call>", parse_parameters, begins_parameters,
    later=_unclosed("</function>"), seed="\n<function=%s>\n",
)  # fmt: skip
SEED: Final = Dialect(
    "seed", ("<seed:tool_call>",), "</seed:tool_call>", parse_parameters, begins_parameters,
    later=_unclosed("</function>"), seed="\n<function=%s>\n",
)  # fmt: skip
KEY_VALUES: Final = Dialect(
    "key-values", ("<tool_call>",), "</tool_call>", parse_key_values, begins_key_values,
    later=_unclosed("</arg_value>"), seed="%s\n",
)  # fmt: skip
BRACKETED: Final = Dialect("bracketed", ("[TOOL_CALLS]",), "", parse_bracketed, begins_bracketed)
WIDE_BARS: Final = Dialect(
    "wide-bars", ("<｜tool▁calls▁begin｜>",), "<｜tool▁calls▁end｜>", parse_wide_bars, begins_anyhow
)
LISTED: Final = Dialect("listed", ("<|tool_call|>",), "", parse_json, begins_json, seed="[" + _JSON_SEED)
PYTHONIC: Final = Dialect(
    "pythonic", ("<|tool_call_start|>",), "<|tool_call_end|>", parse_pythonic, begins_pythonic, seed="[%s("
)
BARE_JSON: Final = Dialect(
    "bare-json", ("<|python_tag|>",), "", parse_json, begins_json, bare=True,
    seed='{"name": "%s", "parameters": ',
)  # fmt: skip
TOOLCALL: Final = Dialect("toolcall", ("<TOOLCALL>",), "</TOOLCALL>", parse_json, begins_json, seed="[" + _JSON_SEED)
# Where the engine drops LISTED's mark on the way, and for who answers in JSON alone.
MARKLESS: Final = Dialect("markless", (), "", parse_json, begins_json, bare=True)
ACTION: Final = Dialect("action", ("<|START_ACTION|>",), "<|END_ACTION|>", parse_json, begins_json)

# (what its template holds, what it then speaks); the first that fits is it
_BY_MARKS: Final[tuple[tuple[tuple[str, ...], Dialect], ...]] = (
    (("<seed:tool_call>",), SEED),
    (("<｜tool▁sep｜>",), WIDE_BARS),
    (("[TOOL_CALLS]",), BRACKETED),
    (("<|tool_call_start|>",), PYTHONIC),
    (("List of tools: ", "<|im_start|>"), PYTHONIC),
    (("<TOOLCALL>",), TOOLCALL),
    (("<|START_ACTION|>",), ACTION),
    (("<function=", "<parameter="), PARAMETERS),
    (("<arg_key>",), KEY_VALUES),
    (("<tool_call>",), HERMES),
    (("<|tool_call|>",), LISTED),
    (("<|start_header_id|>", '"parameters"'), BARE_JSON),
)
_THOUGHTS: Final = (
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<think>", "</think>"),
)


def dialect_of(jinja: str) -> Dialect | None:
    """What a model with this chat template speaks; None where nobody here knows."""
    if "<|channel|>" in jinja:
        return None  # harmony: Ollama does it, and raw completions lose its marks
    return next((dialect for marks, dialect in _BY_MARKS if all(mark in jinja for mark in marks)), None)


def thought_marks(jinja: str) -> tuple[str, str] | None:
    return next((marks for marks in _THOUGHTS if marks[1] in jinja), None)


def by_mark(spoken: Iterable[Dialect]) -> tuple[dict[str, Dialect], Dialect | None]:
    """The dialect behind each opening mark, and the one that needs none. Those that share a mark are both tried."""
    marks: dict[str, Dialect] = {}
    bare: Dialect | None = None
    for dialect in spoken:
        for mark in dialect.opens:
            before = marks.get(mark)
            marks[mark] = dialect if before is None or before is dialect else _either(before, dialect)
        bare = bare or (dialect if dialect.bare else None)
    return marks, bare


def _either(first: Dialect, second: Dialect) -> Dialect:
    def begins(text: str, names: Names) -> bool | None:
        both = first.begins(text, names), second.begins(text, names)
        return True if True in both else None if None in both else False

    return msgspec.structs.replace(
        first,
        parse=lambda text, names: first.parse(text, names) or second.parse(text, names),
        begins=begins,
        later=lambda text: first.later(text) or second.later(text),
    )


def all_dialects() -> Iterable[Dialect]:
    return list(dict.fromkeys(dialect for _, dialect in _BY_MARKS))
