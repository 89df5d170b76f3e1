"""What models say in each dialect, and what must be read from it; and prose that only looks like a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abliterated.proxy.tools import dialects
from abliterated.proxy.tools.dialects import Dialect

THINK = ("<think>", "</think>")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather there",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "near": {"type": "number"},
                    "metric": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "where": {"type": "object"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {
        "type": "function",
        "function": {
            "name": "write_file",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
            },
        },
    },
]

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """`dialect` says `text`; read are these."""

    name: str
    dialect: Dialect
    text: str
    calls: list[Call]
    content: str = ""
    thinking: str = ""
    opened: bool = False
    thoughts: tuple[str, str] | None = field(default=THINK)


PARIS: Call = ("get_weather", {"city": "Paris"})
OSLO: Call = ("get_weather", {"city": "Oslo", "days": 3})
_PARIS, _OSLO = (
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    ('{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}'),
)
NESTED: Call = ("get_weather", {"where": {"a": [1, {"b": "}]"}], "c": 'say "hi" {'}, "tags": ["x", "[y"]})
_NESTED = (
    '{"name": "get_weather", "arguments": '
    '{"where": {"a": [1, {"b": "}]"}], "c": "say \\"hi\\" {"}, "tags": ["x", "[y"]}}'
)
FILE: Call = ("write_file", {"path": "a.txt", "text": 'it says </tool_call> and <tool_call>\nand "quotes"'})
_FILE = (
    '{"name": "write_file", "arguments": {"path": "a.txt", '
    '"text": "it says </tool_call> and <tool_call>\\nand \\"quotes\\""}}'
)

READ = [
    Said("hermes", dialects.HERMES, f"<tool_call>\n{_PARIS}\n</tool_call>", [PARIS]),
    Said("hermes two", dialects.HERMES, f"<tool_call>\n{_PARIS}\n</tool_call>\n<tool_call>\n{_OSLO}\n</tool_call>",
         [PARIS, OSLO]),
    Said("hermes two without a line between", dialects.HERMES,
         f"<tool_call>{_PARIS}</tool_call><tool_call>{_OSLO}</tool_call>", [PARIS, OSLO]),
    Said("hermes nested", dialects.HERMES, f"<tool_call>\n{_NESTED}\n</tool_call>", [NESTED]),
    Said("hermes with its own marks in a string", dialects.HERMES, f"<tool_call>\n{_FILE}\n</tool_call>", [FILE]),
    Said("hermes after words", dialects.HERMES, f"Let me see.\n\n<tool_call>\n{_PARIS}\n</tool_call>", [PARIS],
         "Let me see."),
    Said("hermes before words", dialects.HERMES, f"<tool_call>\n{_PARIS}\n</tool_call>\nWait for it.", [PARIS],
         "Wait for it."),
    Said("hermes after a thought", dialects.HERMES,
         f"<think>\nHm, <tool_call> or not?\n</think>\n\n<tool_call>\n{_PARIS}\n</tool_call>", [PARIS], "",
         "Hm, <tool_call> or not?"),
    Said("hermes, a thought the prompt began", dialects.HERMES,
         f"Hm.\n</think>\n\n<tool_call>\n{_PARIS}\n</tool_call>", [PARIS], "", "Hm.", opened=True),
    Said("hermes without its last mark", dialects.HERMES, f"<tool_call>\n{_PARIS}\n", [PARIS]),
    Said("hermes, arguments first", dialects.HERMES,
         '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', [PARIS]),
    Said("hermes, arguments as text", dialects.HERMES,
         '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', [PARIS]),
    Said("hermes, no arguments", dialects.HERMES, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
         [("now", {})]),
    Said("hermes, typed by schema", dialects.HERMES,
         '<tool_call>{"name": "get_weather", "arguments": {"days": "3", "metric": "true", "city": 75}}</tool_call>',
         [("get_weather", {"days": 3, "metric": True, "city": "75"})]),
    Said("parameters", dialects.PARAMETERS,
         "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
         "</parameter>\n<parameter=metric>\nTrue\n</parameter>\n</function>\n</tool_call>",
         [("get_weather", {"city": "Paris", "days": 3, "metric": True})]),
    Said("parameters of several lines", dialects.PARAMETERS,
         "<tool_call>\n<function=write_file>\n<parameter=path>\na\n</parameter>\n<parameter=text>\nx = 1\n\ny = 2\n"
         "</parameter>\n</function>\n</tool_call>", [("write_file", {"path": "a", "text": "x = 1\n\ny = 2"})]),
    Said("seed", dialects.SEED,
         "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
         [PARIS]),
    Said("key values", dialects.KEY_VALUES,
         "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
         "<arg_value>3</arg_value>\n</tool_call>", [OSLO]),
    Said("key values, none", dialects.KEY_VALUES, "<tool_call>now</tool_call>", [("now", {})]),
    Said("bracketed list", dialects.BRACKETED, f"[TOOL_CALLS][{_PARIS}, {_OSLO}]", [PARIS, OSLO]),
    Said("bracketed names", dialects.BRACKETED,
         '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 3}',
         [PARIS, OSLO]),
    Said("bracketed with an id", dialects.BRACKETED,
         '[TOOL_CALLS]get_weather[CALL_ID]abcdef123[ARGS]{"city": "Paris"}', [PARIS]),
    Said("bracketed nested", dialects.BRACKETED, f"[TOOL_CALLS][{_NESTED}]", [NESTED]),
    Said("wide bars", dialects.WIDE_BARS,
         '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
         '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}<｜tool▁call▁end｜>'
         "<｜tool▁calls▁end｜>", [PARIS, OSLO]),
    Said("wide bars, fenced", dialects.WIDE_BARS,
         "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
         '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [PARIS]),
    Said("listed", dialects.LISTED, f"<|tool_call|>[{_PARIS}, {_OSLO}]", [PARIS, OSLO]),
    Said("pythonic", dialects.PYTHONIC,
         "<|tool_call_start|>[get_weather(city='Paris'), get_weather(city=\"Oslo\", days=3)]<|tool_call_end|>",
         [PARIS, OSLO]),
    Said("pythonic with JSON's words", dialects.PYTHONIC,
         '<|tool_call_start|>[get_weather(metric=true, tags=["a", "b"], where={"a": null})]<|tool_call_end|>',
         [("get_weather", {"metric": True, "tags": ["a", "b"], "where": {"a": None}})]),
    Said("bare", dialects.BARE_JSON, '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    Said("bare behind a tag", dialects.BARE_JSON,
         '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    Said("bare, two", dialects.BARE_JSON,
         '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
         '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}', [PARIS, OSLO]),
    Said("toolcall", dialects.TOOLCALL, f"<TOOLCALL>[{_PARIS}]</TOOLCALL>", [PARIS]),
    Said("action", dialects.ACTION,
         '<|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]'
         "<|END_ACTION|>", [PARIS]),
]  # fmt: skip

# Texts that are no call in any dialect: they must come through to the letter.
PROSE = [
    "Hello.",
    "To call a tool, I would write <tool_call> and then JSON.",
    "The tags are `<tool_call>` and `</tool_call>`; so is '[TOOL_CALLS]' and \"<|tool_call|>\".",
    f"Write `<tool_call>{_PARIS}</tool_call>` and it is called.",
    f"Here is how it looks:\n\n```\n<tool_call>\n{_PARIS}\n</tool_call>\n```\n\nThat is all.",
    f"As documented:\n~~~xml\n<tool_call>{_PARIS}</tool_call>\n~~~\ndone",
    '{"name": "Ada", "parameters": {"city": "Paris"}}',
    '{"name": "get_weather", "version": "1.0", "dependencies": {}}',
    '[{"name": "get_weather"}, {"name": "now"}] are the tools.',
    '{"type": "object", "properties": {"city": {"type": "string"}}}',
    '{\n  "id": 1,\n  "title": "JSON"\n}',
    '<tool_call>\n{"name": "no_such_tool", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>\nsorry',
    "<tool_call>get weather in Paris</tool_call>",
    "<tool_call>\n<function=no_such>\n</function>\n</tool_call>",
    "<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>",
    "<tool_call",
    "a < b and <tool b",
    "[TOOL_CALLS] is Mistral's mark",
    "[TOOL_CALLS][1, 2, 3]",
    "x = [get_weather(city='Paris')]",
    "<|tool_call_start|>print('hi')<|tool_call_end|>",
    "print(f'{name}')  # {",
    "{}",
    "{",
    "}",
    "<TOOLCALL>nothing</TOOLCALL>",
    "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>",
    "  leading and trailing  \n\n",
    "```python\ndef f():\n    return {'name': 'get_weather'}\n```",
    'He said: {"name": "get_weather", "arguments": {"city": "Paris"}}',
    "| a | b |\n|---|---|\n| <tool_call> | {} |",
]  # fmt: skip
