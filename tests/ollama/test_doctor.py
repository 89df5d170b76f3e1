"""What the doctor says of each illness, from facts alone; and that it keeps quiet about healthy models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import ModelError, NotFound
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.doctor import diagnose, examine
from abliterated.ollama.facts import Facts, find_base, look_at
from abliterated.ollama.modelfile import Modelfile
from abliterated.ollama.request import shows_tools
from abliterated.ollama.version import read_version
from fake_ollama import FakeOllama, tiny_gguf

GO = "{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ .ToolCalls }}{{ end }}"
JINJA = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
MENTIONS = "{% for m in messages %}{% if m.tool_calls %}tools{% endif %}{{ m.content }}{% endfor %}"
OLD, NEW = read_version("0.20.0"), read_version("0.35.0")


def facts(version: Any = NEW, capabilities: str = "completion", **more: Any) -> Facts:
    said = {key: more.pop(key) for key in ("template", "renderer", "parser", "parameters", "system") if key in more}
    defaults: dict[str, Any] = {"architecture": "llama", "parameters": 8_000_000_000}
    return Facts("m:8b", version, Modelfile(models=("/x/blobs/sha256-" + "0" * 64,), **said),
                 frozenset(capabilities.split()), **{**defaults, **more})  # fmt: skip


BASE = facts(capabilities="completion tools", template=GO)

ILL: dict[str, tuple[Facts, Facts | None, str, str]] = {
    "no template, old engine": (facts(OLD, jinja=JINJA), None, "template-missing", "not read by this version"),
    "no template at all, new engine": (facts(jinja=""), None, "template-missing", "does not chat"),
    "the dummy beats the real one": (facts(jinja=JINJA, dummy=True), None, "template-dummy", "instead of the one"),
    "the dummy, and nobody can see more": (facts(dummy=True), None, "template-dummy", "can't be seen"),
    "tools lost on the way": (facts(jinja=JINJA), None, "tools-lost", "the model as registered does not"),
    "a marker among the stops": (
        facts(jinja=JINJA, capabilities="completion tools", parameters=(("stop", "<tool_call>"),)),
        None,
        "stop-markers",
        "<tool_call>",
    ),
    "tools claimed, the TEMPLATE has none": (
        facts(OLD, "completion tools", template="{{ range .Messages }}{{ .Content }}{{ end }}"),
        None,
        "tools-lie",
        "never shows them",
    ),
    "tools claimed, the Jinja only speaks of them": (
        facts(capabilities="completion tools", jinja=MENTIONS),
        None,
        "tools-lie",
        "only speaks of them",
    ),
    "calls are not shown again": (
        facts(capabilities="completion tools", template="{{ .Tools }}"),
        None,
        "tools-one-way",
        "calls made before",
    ),
    "a renderer without its parser": (facts(renderer="qwen3.5"), None, "renderer-unpaired", "no PARSER"),
    "lost RENDERER": (
        facts(template=GO, capabilities="completion tools"),
        facts(capabilities="completion tools", renderer="qwen3.5", parser="qwen3.5"),
        "renderer-lost",
        "lost RENDERER qwen3.5",
    ),
    "lost PARSER": (
        facts(template=GO, capabilities="completion tools", renderer="qwen3.5"),
        facts(capabilities="completion tools", renderer="qwen3.5", parser="qwen3.5"),
        "parser-lost",
        "lost PARSER qwen3.5",
    ),
    "a family that speaks through a renderer": (
        facts(architecture="gemma4", jinja=""),
        None,
        "renderer-lost",
        "RENDERER and PARSER gemma4",
    ),
    "lost TEMPLATE": (facts(), BASE, "template-lost", "lost the TEMPLATE"),
    "lost capability": (facts(jinja=JINJA), BASE, "capability-tools", "the base has it"),
    "lost chat template": (
        facts(template=GO, capabilities="completion tools", jinja=""),
        facts(template=GO, capabilities="completion tools", jinja=JINJA),
        "chat-template-lost",
        "lost the chat template",
    ),
    "another kind of base": (facts(jinja=JINJA), facts(architecture="qwen3"), "base-differs", "not of one kind"),
    "an engine with known holes": (facts(read_version("0.12.0"), template=GO), None, "engine", "vulnerabilities"),
    "a development build": (facts(read_version("0.0.0"), template=GO), None, "engine", "development build"),
}


@pytest.mark.parametrize("illness", ILL)
def test_each_illness_is_named(illness: str) -> None:
    found, base, key, words = ILL[illness]
    by_key = {finding.key: finding for finding in examine(found, base)}
    assert key in by_key, by_key
    assert words in by_key[key].text
    assert by_key[key].level in ("problem", "warning")


@pytest.mark.parametrize(
    "healthy",
    [
        facts(capabilities="completion tools", jinja=JINJA),
        facts(OLD, "completion tools", template=GO, jinja=JINJA),
        facts(OLD, "completion tools", renderer="qwen3-coder", parser="qwen3-coder", jinja=JINJA),
        facts(capabilities="completion", jinja="{% for m in messages %}{{ m.content }}{% endfor %}"),
        facts(OLD, "embedding"),
        facts(capabilities="completion tools", template=GO),
    ],
)
def test_a_healthy_model_has_nothing_said_against_it(healthy: Facts) -> None:
    assert [finding for finding in examine(healthy) if finding.level in ("problem", "warning")] == []
    assert [finding for finding in examine(healthy, healthy) if finding.level in ("problem", "warning")] == []


def test_the_worst_comes_first_and_each_thing_is_said_once() -> None:
    found = examine(facts(OLD, jinja=JINJA, parameters=(("stop", "</think>"),)), BASE)
    levels = [finding.level for finding in found]
    assert levels == sorted(levels, key=["problem", "warning", "note", "ok"].index)
    assert len({finding.text for finding in found}) == len(found)
    assert "template-lost" not in {finding.key for finding in found}, "said by template-missing already"


@pytest.mark.parametrize(
    ("jinja", "shows"),
    [
        (JINJA, True),
        (MENTIONS, False),
        ("{{ tools | tojson }}", True),
        ("{%- set x = tools[0] %}", True),
        ("{# tools | tojson #}", False),
        ("{% if tools is defined %}a tool{% endif %}", False),
        ("{{ message['tools'] }}", False),
        ("{{ render(tools) }}", True),
    ],
)
def test_a_template_that_only_speaks_of_tools_is_known(jinja: str, shows: bool) -> None:
    assert shows_tools(jinja) is shows


# -- asked of an engine ----------------------------------------------------------------------------------------------


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        keys = {"general.architecture": "llama", "tokenizer.chat_template": JINJA}
        for number, name in enumerate(("qwen3:8b", "other:8b", "somebody/qwen3-uncensored:8b")):
            file = tiny_gguf(tmp_path / f"{number}.gguf", {**keys, "n": str(number)})
            engine.add(name, file, **({"template": GO} if name == "qwen3:8b" else {}))
        yield engine


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(fake.url) as opened:
        yield opened


async def test_the_base_is_found_by_kind_ability_and_name(fake: FakeOllama, client: OllamaClient) -> None:
    theirs = await look_at(client, "somebody/qwen3-uncensored:8b")
    base = await find_base(client, theirs)
    assert base is not None and base.name == "qwen3:8b"
    told = await diagnose(client, theirs.name)
    assert told.base == "qwen3:8b" and told.broken and not told.healthy


async def test_what_a_model_says_it_was_made_from_comes_first(fake: FakeOllama, client: OllamaClient) -> None:
    theirs = fake.models["registry.ollama.ai/somebody/qwen3-uncensored:8b"]
    theirs["show"] = {"details": {"format": "gguf", "parent_model": "other:8b"}}
    base = await find_base(client, await look_at(client, "somebody/qwen3-uncensored:8b"))
    assert base is not None and base.name == "other:8b"


async def test_a_model_without_a_gguf_or_not_there_at_all_is_told(fake: FakeOllama, client: OllamaClient) -> None:
    with pytest.raises(NotFound):
        await diagnose(client, "gone:1")
    fake.models["registry.ollama.ai/library/other:8b"]["show"] = {"details": {"format": "safetensors"}}
    with pytest.raises(ModelError, match="safetensors"):
        await diagnose(client, "other:8b")
    fake.models["registry.ollama.ai/library/other:8b"]["show"] = {"remote_host": "https://ollama.com"}
    with pytest.raises(ModelError, match="cloud"):
        await diagnose(client, "other:8b")


async def test_deep_looks_at_what_really_reaches_the_prompt(fake: FakeOllama, client: OllamaClient) -> None:
    fake.models["registry.ollama.ai/library/qwen3:8b"]["show"] = {"capabilities": ["completion", "tools"]}
    healthy = await diagnose(client, "qwen3:8b", deep=True)
    assert any("reaches the prompt whole" in finding.text for finding in healthy.findings)

    async def forgets(request: Any) -> Any:
        from aiohttp import web

        return web.json_response({"_debug_info": {"rendered_template": "How many?"}})

    fake.answers["/api/chat"] = forgets
    told = await diagnose(client, "qwen3:8b", deep=True)
    assert {finding.text.split(":")[0] for finding in told.findings if finding.key == "rendered"} == {
        "system",
        "tools",
        "tool round trip",
    }
    assert fake.loaded == {}
