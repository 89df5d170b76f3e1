"""A tool-capable variant of a published chat template that drops tools though its model was trained for them.

The published text stays whole, behind a prelude of ours that rewrites the conversation before it is rendered: tools go
into the system message, calls into the assistant's words, in the dialect the model knows; calls made at once are told
one after the other where a template knows only one. A variant is given only where rendering proves that it does more
than the published one and changes nothing in a conversation without tools. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from abliterated.templates.abilities import ASK, SYSTEM, Ability, abilities
from abliterated.templates.rendering import TemplateRefuses, render

_HEADER: Final = "{#- Tools by abliterated. -#}\n"
_PUBLISHED: Final = "{#- The published template. -#}\n"
_COLLECT: Final = "{%- set given = namespace(messages=[], text='', skip=0) -%}\n"
_DONE: Final = "{%- set messages = given.messages -%}\n"

# Tools that the template never prints, told in the system message. Slots: how one tool reads, and what goes around.
_TELL: Final = """\
{{%- if tools -%}}
{{%- for tool in tools -%}}
{{%- set function = tool.function or tool -%}}
{{%- set given.text = given.text + {one} -%}}
{{%- endfor -%}}
{{%- set given.text = {before} + given.text + {after} -%}}
{{%- if messages[0].role == 'system' -%}}
{{%- set messages = [{{'role': 'system', 'content': messages[0].content + '\\n\\n' + given.text}}] + messages[1:] -%}}
{{%- else -%}}
{{%- set messages = [{{'role': 'system', 'content': given.text}}] + messages -%}}
{{%- endif -%}}
{{%- endif -%}}
"""
# Calls that the template never prints, told in the assistant's words. Slots: how one call reads, what is between.
_SAY: Final = """\
{{%- for message in messages -%}}
{{%- if message.role == 'assistant' and message.tool_calls -%}}
{{%- set given.text = (message.content or '') + {begin} -%}}
{{%- for call in message.tool_calls -%}}
{{%- set arguments = call.function.arguments -%}}
{call}
{{%- endfor -%}}
{{%- set given.messages = given.messages + [{{'role': 'assistant', 'content': given.text + {end}}}] -%}}
{{%- elif message.role == 'tool' -%}}
{{%- set given.messages = given.messages + [{{'role': 'tool', 'content': {result}}}] -%}}
{{%- else -%}}
{{%- set given.messages = given.messages + [message] -%}}
{{%- endif -%}}
{{%- endfor -%}}
"""
# Calls made at once, each told with its own result: the template raises on more than one, or drops all but the first.
_SINGLY: Final = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.tool_calls and message.tool_calls | length > 1 -%}
{%- set place = loop.index0 -%}
{%- for call in message.tool_calls -%}
{%- set given.messages = given.messages + [{'role': 'assistant', 'content': '', 'tool_calls': [call]}] -%}
{%- if place + loop.index < messages | length and messages[place + loop.index].role == 'tool' -%}
{%- set given.messages = given.messages + [messages[place + loop.index]] -%}
{%- set given.skip = given.skip + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- elif message.role == 'tool' and given.skip > 0 -%}
{%- set given.skip = given.skip - 1 -%}
{%- else -%}
{%- set given.messages = given.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
"""
_AS_TEXT: Final = "(arguments if arguments is string else arguments | tojson)"


def _call(text: str, between: str = "''") -> str:
    return f"{{%- set given.text = given.text + ('' if loop.first else {between}) + {text} -%}}"


@dataclass(frozen=True)
class _Dialect:
    """How a family speaks of tools. `marks`: what its template or name holds; `tell`: how tools are told to it."""

    name: str
    marks: tuple[str, ...]
    call: str
    begin: str = "''"
    end: str = "''"
    result: str = "message.content"
    tell: tuple[str, str, str] | None = None  # one tool, before, after

    def prelude(self, lacking: frozenset[Ability]) -> str | None:
        """What makes up for what is lacking; None where this dialect can't."""
        parts = [_COLLECT]
        if "tools" in lacking:
            if self.tell is None:
                return None
            one, before, after = self.tell
            parts.append(_TELL.format(one=one, before=before, after=after))
        if lacking & {"calls", "results"}:
            parts.append(_SAY.format(begin=self.begin, call=self.call, end=self.end, result=self.result) + _DONE)
        return "".join(parts) if len(parts) > 1 else None


_DEEPSEEK_TOOL: Final = (
    "'\\n### ' + function.name + '\\n' + (function.description or '') + '\\n\\nParameters: '"
    " + function.parameters | tojson + '\\n'"
)
_HERMES_TOOLS: Final = (
    "'\\n' + tool | tojson",
    "'### Tools\\n\\nYou may call functions. Each is described here as JSON:\\n<tools>'",
    "'\\n</tools>\\n\\nA call is its name and arguments as JSON between tags:\\n"
    '<tool_call>\\n{"name": function name, "arguments": object}\\n</tool_call>\'',
)
_HERMES: Final = _Dialect(
    "JSON between tool_call tags",
    ("smollm3", "qwen2.5", "qwen3"),
    _call(
        '\'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \''
        f" + {_AS_TEXT} + '}}\\n</tool_call>'",
        "'\\n'",
    ),
    result="'<tool_response>\\n' + message.content + '\\n</tool_response>'",
    tell=_HERMES_TOOLS,
)
_DIALECTS: Final = (
    _Dialect(
        "DeepSeek's marks",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>' + tool['function']['arguments']"),
        _call(f"'<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + {_AS_TEXT} + '<｜tool▁call▁end｜>'"),
        begin="'<｜tool▁calls▁begin｜>'",
        end="'<｜tool▁calls▁end｜>'",
        tell=(
            _DEEPSEEK_TOOL,
            "'## Tools\\nThese can be called:\\n'",
            "'\\nWrite a call as <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>OBJECT<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>, several calls side by side'",
        ),
    ),
    _Dialect(
        "a list behind <|tool_call|>",
        ("<|start_of_role|>", "available_tools"),
        _call(f"'{{\"name\": \"' + call.function.name + '\", \"arguments\": ' + {_AS_TEXT} + '}}'", "', '"),
        begin="'<|tool_call|>['",
        end="']'",
    ),
    _Dialect(
        "Python's way",
        ("List of tools: ", "<|im_start|>"),
        "{%- set given.text = given.text + ('' if loop.first else ', ') + call.function.name + '(' -%}\n"
        "{%- for key in arguments -%}\n"
        "{%- set given.text = given.text + ('' if loop.first else ', ') + key + '=' + arguments[key] | tojson -%}\n"
        "{%- endfor -%}\n"
        "{%- set given.text = given.text + ')' -%}",
        begin="'<|tool_call_start|>['",
        end="']<|tool_call_end|>'",
    ),
)


@dataclass(frozen=True)
class Variant:
    """`jinja`: the whole template; `reason`: for the report, what the published one drops and what this one does."""

    jinja: str
    reason: str


def tool_variant(jinja: str, *, architecture: str = "", name: str = "") -> Variant | None:
    """A template that does with tools what `jinja` doesn't, for a model of this architecture and name; None where there
    is nothing to mend, or nobody knows how."""
    if not jinja.strip():
        return None
    wanted: frozenset[Ability] = frozenset({"tools", "calls", "results", "several calls"})
    lacking = wanted - abilities(jinja)
    if not lacking:
        return None
    if lacking == {"several calls"}:
        return _proven(jinja, _COLLECT + _SINGLY + _DONE, lacking, "calls made at once are told one after the other")
    for dialect in _dialects(jinja, f"{architecture} {name}".lower()):
        prelude = dialect.prelude(lacking)
        if prelude and (found := _proven(jinja, prelude, lacking, f"in the model's own dialect: {dialect.name}")):
            return found
    return None


def published(jinja: str) -> str:
    """The published template of a variant of ours; any other template as it is."""
    return jinja.partition(_PUBLISHED)[2] if jinja.startswith(_HEADER) and _PUBLISHED in jinja else jinja


def _dialects(jinja: str, model: str) -> list[_Dialect]:
    """Those this model may speak, by its template's marks; for the one that has none, by its name."""
    found = [dialect for dialect in _DIALECTS if all(mark in jinja for mark in dialect.marks)]
    if "<|im_start|>" in jinja and any(mark in model or mark in jinja.lower() for mark in _HERMES.marks):
        found.append(_HERMES)
    return found


def _proven(jinja: str, prelude: str, lacking: frozenset[Ability], how: str) -> Variant | None:
    """The variant, if it does all that was lacking and says the same as before where no tool is spoken of."""
    whole = _HEADER + prelude + _PUBLISHED + jinja
    if lacking & (frozenset(lacking) - abilities(whole)):
        return None
    answer = {"role": "assistant", "content": "Some."}
    for talk in ([ASK], [SYSTEM, ASK], [SYSTEM, ASK, answer, ASK], [ASK, answer, ASK]):
        for thinks in (True, False):
            if _or_refusal(jinja, talk, thinks) != _or_refusal(whole, talk, thinks):
                return None
    dropped = ", ".join(sorted(lacking))
    return Variant(
        whole,
        f"the published chat template loses {dropped} on the way to the model; a variant of ours tells them, {how}",
    )


def _or_refusal(jinja: str, talk: list[dict[str, str]], thinks: bool) -> str:
    try:
        return render(jinja, talk, enable_thinking=thinks)
    except TemplateRefuses:
        return "refused"
