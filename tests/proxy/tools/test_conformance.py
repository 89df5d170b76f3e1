"""Scripted models of every kind of dialect through the helping proxy, in front of real engines: on all four APIs,
streamed and whole, tools and thinking do what the engine alone does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from engine.scripted_gguf import write
from engines import Engine, RunningEngine, engine_parameters, require
from proxy.script import Running
from proxy.tools.double import helped
from templates.asking import DIALECTS
from templates.families import ONE, PLACE, TOOL, Family, own_families, scripted
from templates.matrix import YES, cells, create, does_not_apply, run_family

# Marks that are control tokens are lost on the way from raw completions, so these are told of tools in words there:
# what the scripted model then finds last in its prompt is the tools, and it answers to that.
TOLD = {"bracketed": {"call rendered", "two calls rendered"}}
NOT_OURS = {"channels", "plain"}  # engines speak harmony themselves; the other's model was taught no tools


@pytest.fixture(scope="module", params=engine_parameters())
def engine(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    given: Engine = require(request.param)
    with given.start() as running:
        yield running


@pytest.fixture(scope="module")
def forced(engine: RunningEngine) -> Iterator[Running]:
    """Help for everybody, needed or not."""
    with helped(engine.base_url, help="always", patterns=("*",)) as (running, _):
        yield running


EVERY_API = tuple(DIALECTS)
# Ollama before 0.30 is where help is needed; elsewhere one dialect of each way (told, rendered, by a variant of ours).
FEW = ("bracketed", "hermes-json", "header-ids")
FAMILIES = [family for family in own_families() if family.name not in NOT_OURS]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_dialect_makes_calls_and_reads_results_with_help(
    engine: RunningEngine, forced: Running, family: Family, tmp_path: Path
) -> None:
    old = engine.engine.version is not None and engine.engine.version < (0, 30, 0)
    if not old and family.name not in FEW:
        pytest.skip("asked of Ollama before 0.30, which needs the help")
    all_of_them = engine.engine.embedded and family.name == "hermes-json"
    apis = EVERY_API if all_of_them else (EVERY_API[FAMILIES.index(family) % len(EVERY_API)],)
    with httpx.Client(base_url=f"http://{forced.address}", timeout=60, trust_env=False) as http:
        found = cells(run_family(http, family, tmp_path, dialects=apis))
    excused = set() if old else TOLD.get(family.name, set())
    wrong = {check: cell for check, cell in found.items() if cell["cell"] != YES and check not in excused}
    assert not wrong
    assert set(found) >= {"call parsed", "two results rendered"}


def test_help_is_given_where_the_engine_says_no_and_only_there(engine: RunningEngine, tmp_path: Path) -> None:
    """A dialect that Ollama before 0.30 has no template for, and every later engine does by itself."""
    family = next(family for family in own_families() if family.name == "key-value-tags")
    old = engine.engine.version is not None and engine.engine.version < (0, 30, 0)
    with (
        helped(engine.base_url, patterns=("*",)) as (running, _),
        httpx.Client(base_url=f"http://{running.address}", timeout=60, trust_env=False) as http,
    ):
        found = cells(run_family(http, family, tmp_path, dialects=("/api/chat",)))
        given = sum(series.assisted for series in running.proxy.tally.series.values())
    assert {cell["cell"] for cell in found.values()} == {YES}
    assert bool(given) == old


@pytest.fixture(scope="module")
def model(engine: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    family = next(family for family in own_families() if family.name == "hermes-json")
    with httpx.Client(base_url=engine.base_url, timeout=60, trust_env=False) as http:
        create(http, "hermes-abliterated:1b", write(tmp_path_factory.mktemp("gguf") / "h.gguf", scripted(family)))
    assert "two calls parsed" not in does_not_apply(family)
    return "hermes-abliterated:1b"


ASK: list[Any] = [{"role": "user", "content": "Is it raining?"}]
WANTED = {PLACE: ONE[0]}


def test_ollamas_own_client_calls_a_tool_with_help(forced: Running, model: str) -> None:
    client = ollama.Client(host=f"http://{forced.address}", trust_env=False, timeout=60)
    call = (client.chat(model, ASK, tools=[TOOL]).message.tool_calls or [])[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", WANTED)
    parts = list(client.chat(model, ASK, tools=[TOOL], stream=True))
    assert [one.function.arguments for part in parts for one in part.message.tool_calls or ()] == [WANTED]
    assert parts[-1].done and (parts[-1].eval_count or 0) > 0
    client._client.close()


def test_openais_client_calls_a_tool_with_help(forced: Running, model: str) -> None:
    with openai.OpenAI(base_url=f"http://{forced.address}/v1", api_key="x", max_retries=0, timeout=60) as client:
        tools: Any = [TOOL]
        whole = client.chat.completions.create(model=model, messages=ASK, tools=tools)
        call: Any = (whole.choices[0].message.tool_calls or [])[0]
        assert json.loads(call.function.arguments) == WANTED and whole.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(model=model, messages=ASK, tools=tools) as stream:
            last: Any = stream.get_final_completion()
        assert json.loads(last.choices[0].message.tool_calls[0].function.arguments) == WANTED
        flat: Any = [{"type": "function", **TOOL["function"]}]
        response: Any = client.responses.create(model=model, input=ASK[0]["content"], tools=flat)
        assert [json.loads(item.arguments) for item in response.output if item.type == "function_call"] == [WANTED]
        with client.responses.stream(model=model, input=ASK[0]["content"], tools=flat) as events:
            final: Any = events.get_final_response()
        assert [json.loads(item.arguments) for item in final.output if item.type == "function_call"] == [WANTED]


def test_anthropics_client_calls_a_tool_with_help(forced: Running, model: str) -> None:
    function = TOOL["function"]
    tools: Any = [
        {"name": function["name"], "input_schema": function["parameters"], "description": function["description"]}
    ]
    with anthropic.Anthropic(base_url=f"http://{forced.address}", api_key="x", max_retries=0, timeout=60) as client:
        whole: Any = client.messages.create(model=model, max_tokens=200, messages=ASK, tools=tools)
        assert [block.input for block in whole.content if block.type == "tool_use"] == [WANTED]
        assert whole.stop_reason == "tool_use"
        with client.messages.stream(model=model, max_tokens=200, messages=ASK, tools=tools) as stream:
            final: Any = stream.get_final_message()
        assert [block.input for block in final.content if block.type == "tool_use"] == [WANTED]
        assert final.usage.output_tokens > 0
