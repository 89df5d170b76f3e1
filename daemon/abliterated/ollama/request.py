"""What a registration sends and how its outcome is judged: pure rules over modelfiles and capabilities.

Never a Jinja text as TEMPLATE, never a tool marker as a stop string, never a template the base does not really have.

Does not know the network, nor whether a digest is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from abliterated.ollama.modelfile import NO_TEMPLATE, Modelfile

# Strings that open or close a tool call or a block of thought. As a stop string each cuts the call off before it is
# parsed. Those that end a *turn* (gpt-oss's <|call|>, Llama's <|eom_id|>) are left alone.
MARKERS = frozenset(
    {
        "<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<|tool_call|>", "<|tool_call>", "<tool_call|>",
        "<|tool_call_start|>", "<|tool_call_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
        "<function_calls>", "</function_calls>", "<function=", "</function>", "<TOOLCALL>", "</TOOLCALL>",
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>", "<｜DSML｜function_calls>", "<minimax:tool_call>", "</minimax:tool_call>", "<seed:tool_call>",
        "</seed:tool_call>", "<|START_ACTION|>", "<|END_ACTION|>", "<|tools_prefix|>", "<|tools_suffix|>",
        "<start_function_call>", "<end_function_call>", "<think>", "</think>", "[THINK]", "[/THINK]",
        "<seed:think>", "</seed:think>",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Digests:
    """The blobs a model is made of, `sha256:…` each."""

    model: str
    projectors: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()


def is_jinja(template: str) -> bool:
    """Is this a Jinja template rather than one of Go's?"""
    return re.search(r"\{%[-+]?\s*\w+", template) is not None


def shows_tools(jinja: str) -> bool:
    """Does a Jinja template print the tools it is given, or only speak of them? Judged by its text."""
    bare = re.sub(r"\{#.*?#\}", "", jinja, flags=re.DOTALL)
    used = r"(?<![\w.'\"])(?:available_)?tools\b(?!['\"])\s*[|\[]|\bin\s+(?:available_)?tools\b|\{\{-?\s*tools\b"
    used += r"|\(\s*tools\b(?!\s*(?:is|and|or))"
    return any(re.search(used, part) for part in re.findall(r"\{[{%].*?[%}]\}", bare, flags=re.DOTALL))


def carried(base: Modelfile) -> tuple[Modelfile, list[str]]:
    """What of the base's modelfile the product keeps, and a note for everything that is left out."""
    notes: list[str] = []
    template = base.template
    if template is not None and is_jinja(template):
        template = None
        notes.append("the base's template is shown as Jinja: it stays in the GGUF and is not sent as TEMPLATE")
    elif template is not None and template.strip() == NO_TEMPLATE and not (base.renderer or base.parser):
        template = None  # what Ollama prints where there is none
    parameters = tuple(
        (name, value) for name, value in base.parameters if not (name == "stop" and str(value).strip() in MARKERS)
    )
    dropped = [str(value) for name, value in base.parameters if (name, value) not in parameters]
    if dropped:
        notes.append(f"stop strings that would cut tool calls or thoughts off were left out: {', '.join(dropped)}")
    if len(base.adapters) > 1:
        notes.append("the base has several adapters; Ollama takes one in a creation, so they were left out")
    notes += [f"{command}: unknown to us, left out" for command, _ in base.others]
    return replace(base, template=template, parameters=parameters, others=()), notes


def create_request(target: str, modelfile: Modelfile, digests: Digests) -> dict[str, Any]:
    """The body of `POST /api/create`: every field said outright, because `files` inherits nothing."""
    files = {"model.gguf": digests.model}
    for number, digest in enumerate(digests.projectors):
        files["mmproj.gguf" if not number else f"mmproj-{number + 1}.gguf"] = digest
    request: dict[str, Any] = {"model": target, "files": files, "stream": True}
    if len(digests.adapters) == 1:
        request["adapters"] = {"adapter.gguf": digests.adapters[0]}
    if digests.drafts:
        request["draft_files"] = {"draft.gguf": digests.drafts[0]}
    if modelfile.template is not None:
        request["template"] = modelfile.template
    for field in ("system", "renderer", "parser", "requires"):
        if value := getattr(modelfile, field):
            request[field] = value
    if modelfile.parameters:
        request["parameters"] = modelfile.parameter_map()
    if modelfile.licenses:
        request["license"] = list(modelfile.licenses)
    if modelfile.messages:
        request["messages"] = [{"role": said.role, "content": said.content} for said in modelfile.messages]
    return request


def differences(wanted: Modelfile, found: Modelfile) -> list[str]:
    """How what the engine now shows differs from what was sent; empty: not at all."""
    notes: list[str] = []
    wanted_template, found_template = _real_template(wanted), _real_template(found)
    if wanted_template != found_template:
        if wanted_template is None:
            notes.append("TEMPLATE: the engine added one of its own (see `ollama show --template`)")
        else:
            lost = found_template is None
            notes.append(f"TEMPLATE: the base's was {'lost' if lost else 'changed'}")
    for field in ("system", "renderer", "parser", "requires"):
        before, after = getattr(wanted, field), getattr(found, field)
        if before != after:
            notes.append(f"{field.upper()}: {_short(after)} instead of {_short(before)}")
    before, after = wanted.parameter_map(), found.parameter_map()
    for name in sorted(before.keys() | after.keys()):
        if not _same(before.get(name), after.get(name)):
            notes.append(f"PARAMETER {name}: {_short(after.get(name))} instead of {_short(before.get(name))}")
    if not _same_licenses(wanted.licenses, found.licenses):
        notes.append("LICENSE: not the base's")
    if wanted.messages != found.messages:
        notes.append("MESSAGE: not the base's")
    if len(wanted.models) > 1 and len(found.models) != len(wanted.models):
        notes.append("the projector was lost: images will not be understood")
    return notes


def capability_notes(base: Iterable[str], found: Iterable[str]) -> list[str]:
    """A note for each capability the base has and the product lacks, or the other way round."""
    before, after = set(base), set(found)
    notes = [f"capability {name}: the base has it, the new model does not" for name in sorted(before - after)]
    return notes + [f"capability {name}: the engine claims it, the base has it not" for name in sorted(after - before)]


def blob_digest(path: str) -> str:
    """`sha256:…` of a blob's path as `/api/show` prints it, on whatever system; "" where it is no blob."""
    match = re.search(r"(?:^|[\\/])sha256[-:]([0-9a-f]{64})$", path)
    return f"sha256:{match.group(1)}" if match else ""


def content_of(show: Mapping[str, Any]) -> str:
    """The value of the key by which we know our own models; "" for others'."""
    info = show.get("model_info")
    return str(info.get("abliterated.content") or "") if isinstance(info, Mapping) else ""


def _real_template(modelfile: Modelfile) -> str | None:
    template = modelfile.template
    if template is None or is_jinja(template) or template.strip() in (NO_TEMPLATE, ""):
        return None
    return template


def _same(before: object, after: object) -> bool:
    if isinstance(before, list) and isinstance(after, list):
        return sorted(map(str, before)) == sorted(map(str, after))
    return before == after


def _same_licenses(before: Sequence[str], after: Sequence[str]) -> bool:
    def flat(texts: Sequence[str]) -> str:
        return "\n".join(sorted(text.strip() for text in texts))

    return flat(before) == flat(after)


def _short(value: object) -> str:
    text = repr(value) if value not in (None, "") else "none"
    return text if len(text) <= 60 else text[:57] + "…"
