"""A Go template for an Ollama that does not read Jinja (before 0.30), made of a Jinja template's own words.

Nothing is translated: what the Jinja says is learnt (`skeleton`), and the Go template says the same pieces of text in
the same places. Two things differ, for Go writes JSON in its own way: no blanks after `:` and `,`, and tools with their
keys in the order Ollama has them. Where calls are no JSON, such an Ollama could not parse them, and tools are left out.

Does not know Ollama's API. Pure; how long it takes is up to the Jinja template, a stranger's program.
"""

from __future__ import annotations

import json

from abliterated.templates.skeleton import Calls, Head, Skeleton, learn
from abliterated.templates.variants import published


def go_template_for(jinja: str) -> str | None:
    """A Go template that renders what this Jinja renders; None where it is of a kind we can't tell.

    For a variant of ours what it was made of, where that says more: calls made at once are no trouble in Go.
    """
    texts = dict.fromkeys((jinja, published(jinja)))
    learnt = [skeleton for text in texts if (skeleton := learn(text))]
    best = next((skeleton for skeleton in learnt if skeleton.calls), learnt[0] if learnt else None)
    return go_template(best) if best else None


def speaks_of_tools(template: str) -> bool:
    """Whether a Go template of ours does tools too."""
    return ".ToolCalls" in template


def go_template(skeleton: Skeleton) -> str:
    """The text of the template. `.Role` and the like, not `$message.Role`: Ollama reads tags off such fields."""
    turns = [
        "{{ if eq .Role \"user\" }}", _question(skeleton), text(skeleton.user[1]),
        "{{ else if eq .Role \"assistant\" }}", _answer(skeleton),
    ]  # fmt: skip
    closing = ""
    if calls := skeleton.calls:
        before, joint = text(calls.result_before), text(calls.result_joint)
        closing = '{{ if and (eq $previous "tool") (ne .Role "tool") }}' + _after_result(calls) + "{{ end }}"
        content = "{{ .Content }}"
        if calls.json_result:  # Go's JSON brings the quotes along
            before, joint, content = before[:-1], joint[:-1], "{{ json .Content }}"
        turns += [
            '{{ else if eq .Role "tool" }}{{ if eq $previous "tool" }}', joint, "{{ else }}", before,
            "{{ end }}" + content,
        ]  # fmt: skip
    opening = (
        '{{ $first := -1 }}{{ $last := -1 }}{{ $previous := "" }}{{ range $place, $message := .Messages }}'
        '{{ if eq .Role "user" }}{{ if lt $first 0 }}{{ $first = $place }}{{ end }}{{ $last = $place }}'
        "{{ end }}{{ end }}"
    )
    each = "{{ range $place, $message := .Messages }}" + closing + "".join(turns) + "{{ end }}"
    each += "{{ $previous = .Role }}{{ end }}"
    after = '{{ if eq $previous "tool" }}' + _after_result(skeleton.calls) + "{{ end }}" if skeleton.calls else ""
    return opening + _heads(skeleton) + each + after + _prompt(skeleton)


def _after_result(calls: Calls) -> str:
    return text(calls.result_after[1:] if calls.json_result else calls.result_after)


def text(literal: str) -> str:
    """Literal text; braces that would open an action are said by one."""
    if "{{" not in literal:
        return literal if not literal.endswith("{") else literal[:-1] + '{{ "{" }}'
    return "{{ " + json.dumps(literal, ensure_ascii=False) + " }}"


def _heads(skeleton: Skeleton) -> str:
    def heads(tools: bool) -> str:
        with_system, without = (_head(skeleton.heads[system, tools], skeleton.calls) for system in (True, False))
        return "{{ if .System }}" + with_system + "{{ else }}" + without + "{{ end }}"

    if skeleton.calls is None:
        return heads(False)
    return "{{ if .Tools }}" + heads(True) + "{{ else }}" + heads(False) + "{{ end }}"


def _head(head: Head, calls: Calls | None) -> str:
    tool = "{{ json . }}" if calls and calls.whole_tool else "{{ json .Function }}"
    joint = "{{ if $number }}" + text(head.joint) + "{{ end }}"
    said = {
        "system": "{{ .System }}",
        "tools": "{{ range $number, $tool := .Tools }}" + joint + tool + "{{ end }}",
    }
    after = zip(head.parts, head.texts[1:], strict=True)
    return text(head.texts[0]) + "".join(said[part] + text(literal) for part, literal in after)


def _question(skeleton: Skeleton) -> str:
    """What opens a user's message, unless the head has opened it."""
    before = text(skeleton.user[0])
    if not skeleton.swallows:
        return before + "{{ .Content }}"
    # An engine takes a template that as much as names tools for one that does them.
    without_tools = "$.System" if skeleton.calls is None else "(and $.System (not $.Tools))"
    conditions = {
        (True, True): "(and $.System $.Tools)",
        (False, True): "(and (not $.System) $.Tools)",
        (True, False): without_tools,
    }
    where = " ".join(conditions[key] for key in sorted(skeleton.swallows))
    return "{{ if not (and (eq $place $first) (or " + where + " false)) }}" + before + "{{ end }}{{ .Content }}"


def _answer(skeleton: Skeleton) -> str:
    parts = [text(skeleton.assistant[0])]
    if skeleton.thought:
        before, after = map(text, skeleton.thought)
        parts.append("{{ if and .Thinking (gt $place $last) }}" + before + "{{ .Thinking }}" + after + "{{ end }}")
    elif skeleton.thinks:  # never said: there so that Ollama knows the tags it has to split at
        parts.append('{{ if and .Thinking (eq .Role "") }}<think>{{ .Thinking }}</think>{{ end }}')
    parts.append("{{ .Content }}")
    after = text(skeleton.assistant[1])
    if skeleton.calls is None:
        return "".join([*parts, after])
    calls = skeleton.calls
    each = (
        "{{ range $number, $call := .ToolCalls }}{{ if not $number }}" + text(calls.first) + "{{ else }}"
        + text(calls.joint) + "{{ end }}{{ .Function.Name }}" + text(calls.mid)
        + "{{ json .Function.Arguments }}{{ end }}"
    )  # fmt: skip
    return "".join([*parts, "{{ if .ToolCalls }}", each, text(calls.last), "{{ else }}", after, "{{ end }}"])


def _prompt(skeleton: Skeleton) -> str:
    if skeleton.prompt == skeleton.prompt_unthinking:
        return text(skeleton.prompt)
    off = "{{ if and .IsThinkSet (not .Think) }}" + text(skeleton.prompt_unthinking)
    return off + "{{ else }}" + text(skeleton.prompt) + "{{ end }}"
