"""What certification says when the new model talks otherwise than its base, and when nobody can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from abliterate.contract.errors import EngineUnavailable, NotFound
from abliterated.ollama.certification import certify_apart
from abliterated.ollama.certify import certify, sentinels
from abliterated.ollama.client import EngineFailed, OllamaClient
from fake_ollama import FakeOllama, reset, status, tiny_gguf

GO = "{{ .Tools }}{{ range .Messages }}{{ .Thinking }}{{ end }}"


@pytest.fixture
async def fake(tmp_path: Path):
    async with FakeOllama(tmp_path / "store") as engine:
        shown = {"show": {"capabilities": ["completion", "tools", "thinking"]}}
        engine.add("base:1", tiny_gguf(tmp_path / "base.gguf", {}), template=GO, **shown)
        engine.add("new:1", tiny_gguf(tmp_path / "new.gguf", {"abliterated.content": "c"}), template=GO, **shown)
        yield engine


@pytest.fixture
async def client(fake: FakeOllama):
    async with OllamaClient(fake.url) as opened:
        yield opened


def able(fake: FakeOllama, name: str, *capabilities: str) -> None:
    fake.models[f"registry.ollama.ai/library/{name}"]["show"] = {"capabilities": list(capabilities)}


def renders_otherwise(fake: FakeOllama, model: str, wrong: str, *, when: str = "") -> None:
    """From now on `model` renders `wrong`, for conversations that hold `when`."""
    real = fake.post_chat

    async def post_chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] == model and body.get("_debug_render_only") and when in json.dumps(body):
            return web.json_response({"_debug_info": {"rendered_template": wrong}})
        return await real(request)

    fake.answers["/api/chat"] = post_chat


def test_what_a_model_can_do_decides_what_is_asked() -> None:
    assert [sentinel.name for sentinel in sentinels({"completion"})] == ["plain", "system"]
    assert len(sentinels({"completion", "tools", "thinking"})) == 6
    assert sentinels({"embedding"}) == []


async def test_the_same_prompts_and_an_answer_are_a_certificate(client: OllamaClient) -> None:
    proof = await certify(client, "new:1", "base:1")
    assert len(proof.compared) == 6 and proof.differences == [] and proof.notes == []
    assert (proof.answer, proof.content, proof.reference) == ("a quiet answer", "c", "base:1")


async def test_a_prompt_that_differs_is_named_with_its_diff(fake: FakeOllama, client: OllamaClient) -> None:
    renders_otherwise(fake, "new:1", "no turns at all", when="Now?")
    (failure,) = (await certify(client, "new:1", "base:1")).failures
    assert failure.what == "plain" and "+no turns at all" in failure.diff


async def test_a_difference_that_is_gone_the_second_time_was_none(fake: FakeOllama, client: OllamaClient) -> None:
    async def pass_on(*_: object) -> None:
        return None

    async def yesterday(*_: object) -> web.Response:
        return web.json_response({"_debug_info": {"rendered_template": "Today is the 1st"}})

    fake.faults["POST /api/chat"] = [yesterday, *[pass_on] * 20]
    assert (await certify(client, "new:1", "base:1")).differences == []


async def test_a_template_baked_in_may_render_tools_otherwise_and_nothing_else(
    fake: FakeOllama, client: OllamaClient
) -> None:
    able(fake, "base:1", "completion", "tools")
    renders_otherwise(fake, "new:1", "better tools", when="count_ducks")
    proof = await certify(client, "new:1", "base:1", baked=True)
    assert proof.failures == [] and {one.what for one in proof.warnings} >= {"tools", "tool round trip"}
    renders_otherwise(fake, "new:1", "another system", when="You count ducks")
    assert {one.what for one in (await certify(client, "new:1", "base:1", baked=True)).failures} == {"system"}


async def test_a_lost_capability_is_a_failure_and_a_gained_one_a_warning(
    fake: FakeOllama, client: OllamaClient
) -> None:
    able(fake, "new:1", "completion", "tools", "vision")
    proof = await certify(client, "new:1", "base:1")
    assert [one.what for one in proof.failures] == ["capability thinking"]
    assert [one.what for one in proof.warnings] == ["capability vision"]


async def test_a_conversation_only_the_base_takes_is_a_failure(fake: FakeOllama, client: OllamaClient) -> None:
    real = fake.post_chat

    async def no_tools(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] == "new:1" and body.get("tools"):
            return web.json_response({"error": "new:1 does not support tools"}, status=400)
        return await real(request)

    fake.answers["/api/chat"] = no_tools
    proof = await certify(client, "new:1", "base:1")
    assert [one.what for one in proof.failures] == ["tools", "tool round trip"]
    assert "the base takes it, the new model does not" in proof.failures[0].text


async def test_what_the_base_itself_refuses_is_a_note(fake: FakeOllama, client: OllamaClient) -> None:
    fake.faults["POST /api/chat"] = [status(400, "no such role")] * 12
    proof = await certify(client, "new:1", "base:1")
    assert proof.failures == [] and proof.compared == []
    assert "plain: the base itself refuses it" in proof.notes


async def test_an_engine_that_shows_no_prompts_is_noted_once(fake: FakeOllama, client: OllamaClient) -> None:
    async def plain(*_: object) -> web.Response:
        answer: dict[str, Any] = {"message": {"role": "assistant", "content": "x"}, "done": True}
        return web.json_response(answer)

    fake.faults["POST /api/chat"] = [plain] * 2
    proof = await certify(client, "new:1", "base:1")
    assert proof.compared == [] and len(proof.notes) == 1
    fake.version, fake.requests[:] = "0.11.0", []
    proof = await certify(client, "new:1", "base:1")
    assert proof.notes == ["Ollama 0.11.0 does not show rendered prompts, so they were not compared"]
    assert fake.requests.count("POST /api/chat") == 1, "the base is not loaded for nothing"


async def test_a_base_that_is_gone_leaves_a_note_and_the_model_still_has_to_speak(
    fake: FakeOllama, client: OllamaClient
) -> None:
    for reference in ("", "gone:1"):
        proof = await certify(client, "new:1", reference)
        assert proof.answer == "a quiet answer" and proof.compared == [] and proof.failures == []
        assert bool(proof.notes) is bool(reference)


async def test_a_model_that_does_not_load_where_its_base_does_has_failed(
    fake: FakeOllama, client: OllamaClient
) -> None:
    real = fake.post_chat

    async def broken(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] == "new:1" and not body.get("_debug_render_only"):
            return web.json_response({"error": "llama runner process has terminated"}, status=500)
        return await real(request)

    fake.answers["/api/chat"] = broken
    assert [one.what for one in (await certify(client, "new:1", "base:1")).failures] == ["answer"]
    assert [one.what for one in (await certify(client, "new:1")).failures] == ["answer"]


async def test_an_engine_that_fails_at_both_is_asked_again_later(fake: FakeOllama, client: OllamaClient) -> None:
    fake.faults["POST /api/chat"] = [status(500, "requires more system memory")] * 40
    with pytest.raises(EngineFailed):
        await certify(client, "new:1", "base:1")


async def test_nothing_stays_loaded_that_was_not(fake: FakeOllama, client: OllamaClient) -> None:
    real = fake.post_chat

    async def post_chat(request: web.Request) -> web.StreamResponse:
        fake.loaded.setdefault((await request.json())["model"], {})
        return await real(request)

    fake.answers["/api/chat"] = post_chat
    for before in ({"other:1"}, {"base:1", "other:1"}, {"new:1"}):
        fake.loaded = {name: {} for name in before}
        await certify(client, "new:1", "base:1")
        assert set(fake.loaded) == before


async def test_in_a_process_of_its_own_it_says_the_same(fake: FakeOllama) -> None:
    proof = await certify_apart(fake.url, "new:1", "base:1")
    assert len(proof.compared) == 6 and proof.seconds < 30  # the bar is make bench's business
    with pytest.raises(NotFound):
        await certify_apart(fake.url, "none:1")
    fake.faults["GET /api/version"] = [reset] * 4
    with pytest.raises(EngineUnavailable):
        await certify_apart(fake.url, "new:1", "base:1")


async def test_a_certification_that_hangs_is_ended_with_its_process(fake: FakeOllama) -> None:
    async def hangs(request: web.Request, engine: FakeOllama) -> web.StreamResponse | None:
        await engine.stopped.wait()
        return None

    fake.faults["POST /api/show"] = [hangs]
    with pytest.raises(EngineUnavailable, match="did not end"):
        await certify_apart(fake.url, "new:1", "base:1", seconds=1.5)
    fake.stopped.set()
