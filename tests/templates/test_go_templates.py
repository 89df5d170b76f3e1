"""A Go template made of a Jinja template says the same: in our own rendering, and in a real Ollama's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from abliterated.templates import skeleton, worker
from abliterated.templates.go import go_template_for, speaks_of_tools, text
from abliterated.templates.rendering import TemplateRefuses
from abliterated.templates.variants import published, tool_variant
from engine.scripted_gguf import Model, write
from engines import RunningEngine
from templates.families import Family, own_families, published_families
from templates.matrix import create

WITH_TOOLS = {"hermes-json", "header-ids"}  # calls as JSON objects, which an old Ollama can parse
FAMILIES = [*own_families(), *published_families()]


def learnt(family: Family) -> skeleton.Skeleton:
    found = skeleton.learn(family.jinja)
    if found is None:
        pytest.skip(f"{family.name} is no template of the kind that can be told in Go")
    return found


@pytest.mark.parametrize("family", own_families(), ids=lambda family: family.name)
def test_every_kind_of_ours_is_learnt(family: Family) -> None:
    found = skeleton.learn(family.jinja)
    assert found is not None
    assert bool(found.calls) is (family.name in WITH_TOOLS)
    template = go_template_for(family.jinja)
    assert template is not None
    assert speaks_of_tools(template) is (family.name in WITH_TOOLS)


@pytest.mark.parametrize(
    "jinja",
    [
        "",
        "{% broken",
        "{{ messages[0].content | upper }}",  # not the words that went in
        "{% for message in messages | reverse %}<a>{{ message.content }}</a>{% endfor %}",
        "{% for message in messages %}{{ loop.index }}: {{ message.content }}\n{% endfor %}",
    ],
)
def test_what_is_no_skeleton_is_not_told(jinja: str) -> None:
    assert go_template_for(jinja) is None


@pytest.mark.parametrize("literal", ["plain", "{", 'a {"name": ', "a{{b", "{{", "}}", "x{{", 'é｜▁\n\t{{ "q" }}'])
def test_literal_text_survives_gos_braces(literal: str) -> None:
    said = text(literal) + "{{ .X }}"
    assert "{{{" not in said
    assert text("no braces } here") == "no braces } here"


@pytest.fixture
def ask(http: httpx.Client, ollama: RunningEngine, tmp_path: Path) -> Any:
    """What the engine's prompt is for a Go template, or (before 0.11.5) how many bytes it has."""

    def build(family: Family, template: str) -> str:
        # Its own key makes it a file of its own: two tags of one blob share a runner.
        gguf = write(
            tmp_path / "bare.gguf", Model(chat_template=None, context_length=16384, extra={"test.family": family.name})
        )
        create(http, "told", gguf, template=template)
        return "told"

    return build


def cases(found: skeleton.Skeleton, family: Family) -> Iterator[tuple[list[Any], list[Any], bool | None, str]]:
    for talk, tools in skeleton.conversations(tools=bool(found.calls)):
        switchable = found.thinks and found.prompt != found.prompt_unthinking
        for think in (True, False) if switchable else (None,):
            try:
                wanted = skeleton._render(family.jinja, talk, tools, think=think is not False)
            except TemplateRefuses:
                continue
            if len(wanted.encode()) < 7000:  # a published system prompt may not fit the test's context
                yield talk, tools, think, wanted


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_ollama_renders_what_the_jinja_says(
    family: Family, ask: Any, http: httpx.Client, ollama: RunningEngine
) -> None:
    found = learnt(family)
    template = go_template_for(family.jinja)
    assert template is not None
    name = ask(family, template)
    shows = (ollama.engine.version or (0, 0, 0)) >= (0, 11, 5)
    for talk, tools, think, wanted in cases(found, family):
        body: dict[str, Any] = {"model": name, "messages": [_plain(message) for message in talk], "tools": tools}
        body |= {"stream": False, "options": {"num_predict": 1}} | ({} if think is None else {"think": think})
        if not shows and found.thinks:
            body.pop("think", None)
        if shows:
            answer = http.post("/api/chat", json={**body, "_debug_render_only": True}).json()
            said = answer.get("_debug_info", answer).get("rendered_template")
            assert said is not None, answer
            assert same_json(said) == same_json(wanted)
        elif think is not False:
            answer = http.post("/api/chat", json=body).json()
            # Bytes are tokens in this model but for its six special ones: the count is the prompt's length.
            assert answer.get("prompt_eval_count") == tokens(in_go(wanted, found)), answer


def _plain(message: Any) -> dict[str, Any]:
    calls = [{"function": call["function"]} for call in message.get("tool_calls") or []]
    return {**message, "tool_calls": calls} if calls else dict(message)


def same_json(prompt: str) -> str:
    return rewritten(prompt, lambda value: json.dumps(value, sort_keys=True))


def in_go(prompt: str, found: skeleton.Skeleton) -> str:
    """The prompt with tools and arguments as Go writes them."""
    indent = found.calls.indent if found.calls else None
    for value in (skeleton._TOOL, skeleton._TOOL["function"]):
        prompt = prompt.replace(json.dumps(value, indent=indent), json.dumps(value, separators=(",", ":")))
    return prompt.replace(json.dumps(skeleton._ARGUMENTS), json.dumps(skeleton._ARGUMENTS, separators=(",", ":")))


def rewritten(prompt: str, spelling: Any) -> str:
    """The prompt with each JSON object in another spelling."""
    decoder, found, at = json.JSONDecoder(), "", 0
    while at < len(prompt):
        if prompt[at] == "{":
            try:
                value, length = decoder.raw_decode(prompt[at:])
            except ValueError:
                pass
            else:
                found += spelling(value)
                at += length
                continue
        found += prompt[at]
        at += 1
    return found


def tokens(prompt: str) -> int:
    for special in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"):
        prompt = prompt.replace(special, "\x00")
    return len(prompt.encode())


def test_a_mended_template_is_told_like_the_one_it_was_made_of() -> None:
    [family] = [family for family in own_families() if family.name == "header-ids"]
    variant = tool_variant(family.jinja)
    assert variant is not None and published(variant.jinja) == family.jinja
    assert go_template_for(variant.jinja) == go_template_for(family.jinja)


def test_a_template_that_never_ends_is_given_up() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
    assert worker.go_template_for(endless, deadline=1.0) is None


def test_the_process_says_what_the_function_says() -> None:
    [family] = [family for family in own_families() if family.name == "hermes-json"]
    assert worker.go_template_for(family.jinja) == go_template_for(family.jinja)
    assert worker.go_template_for("\x00{{ nonsense") is None
