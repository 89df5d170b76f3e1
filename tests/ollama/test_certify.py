"""What certification says when the new model talks otherwise than its base, and when nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from abliterated.ollama.certify import certify, sentinels
from abliterated.ollama.client import OllamaClient
from fake_ollama import FakeOllama, status, tiny_gguf

ALL = frozenset({"completion", "tools", "thinking"})


@pytest.fixture
async def fake(tmp_path: Path):
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("base:1", tiny_gguf(tmp_path / "base.gguf", {}))
        engine.add("new:1", tiny_gguf(tmp_path / "new.gguf", {"abliterated.content": "c"}))
        yield engine


@pytest.fixture
async def client(fake: FakeOllama):
    async with OllamaClient(fake.url) as opened:
        yield opened


def test_what_a_model_can_do_decides_what_is_asked() -> None:
    assert [sentinel.name for sentinel in sentinels({"completion"})] == ["plain", "system"]
    assert len(sentinels(ALL)) == 6


async def test_the_same_prompts_and_an_answer_are_a_certificate(client: OllamaClient) -> None:
    proof = await certify(client, "new:1", "base:1", ALL)
    assert len(proof.compared) == 6 and proof.failures == () and proof.notes == ()
    assert proof.answer == "a quiet answer"


async def pass_on(*_: object) -> None:
    return None


async def test_a_prompt_that_differs_is_named_with_its_diff(fake: FakeOllama, client: OllamaClient) -> None:
    async def other(*_: object) -> web.Response:
        return web.json_response({"_debug_info": {"rendered_template": "no turns at all"}})

    fake.faults["POST /api/chat"] = [pass_on, other]
    proof = await certify(client, "new:1", "base:1", ALL)
    assert len(proof.failures) == 1
    assert proof.failures[0].startswith("plain: the prompt differs") and "+no turns at all" in proof.failures[0]


async def test_a_conversation_only_the_base_takes_is_a_failure(fake: FakeOllama, client: OllamaClient) -> None:
    refusal = status(400, "new:1 does not support tools")
    fake.faults["POST /api/chat"] = [pass_on] * 5 + [refusal]
    proof = await certify(client, "new:1", "base:1", ALL)
    assert "tools: the base takes it, the new model does not" in proof.failures[0]
    fake.faults["POST /api/chat"] = [refusal, refusal]
    proof = await certify(client, "new:1", "base:1", ALL)
    assert proof.notes == ("plain: the base itself refuses it",) and proof.failures == ()


async def test_an_engine_that_shows_no_prompts_is_noted_once(fake: FakeOllama, client: OllamaClient) -> None:
    async def plain(*_: object) -> web.Response:
        answer: dict[str, Any] = {"message": {"role": "assistant", "content": "x"}, "done": True}
        return web.json_response(answer)

    fake.faults["POST /api/chat"] = [plain] * 2
    proof = await certify(client, "new:1", "base:1", ALL)
    assert proof.compared == () and len(proof.notes) == 1


async def test_a_model_without_a_base_still_has_to_speak(fake: FakeOllama, client: OllamaClient) -> None:
    proof = await certify(client, "new:1", "", ALL)
    assert proof.answer == "a quiet answer" and proof.compared == ()
