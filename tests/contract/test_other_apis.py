"""Responses and Messages, through the official clients; on an engine that lacks them, no such route. Prompts shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from contract.cases import HELLO, TOOL
from contract.differences import Expected
from contract.scripted_model import ANSWER, PLAIN_CHAT_TEMPLATE, write_scripted_model
from engines import RunningEngine

PROMPT = "<|turn|>system You are a lamp.<|end|><|turn|>user hello<|end|><|assistant|>"


@pytest.fixture(scope="module")
def anthropic_client(running: RunningEngine) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.base_url, api_key="-", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_an_engine_without_the_route_says_so(http: httpx.Client, expect: Expected, path: str) -> None:
    there = {"/v1/responses": expect.has_responses, "/v1/messages": expect.has_messages}[path]
    answer = http.post(path, json={})
    assert (answer.text == "404 page not found") is not there


def test_a_response_is_answered_whole_and_streamed(openai_client: openai.OpenAI, lamp: str, expect: Expected) -> None:
    if not expect.has_responses:
        pytest.skip("no /v1/responses at this version")
    answer = openai_client.responses.create(model=lamp, input="hello")
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    assert answer.usage is not None and answer.usage.output_tokens == 6
    with openai_client.responses.stream(model=lamp, input="hello") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == ANSWER
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 1


def test_a_message_is_answered_whole_and_streamed(
    anthropic_client: anthropic.Anthropic, lamp: str, expect: Expected
) -> None:
    if not expect.has_messages:
        pytest.skip("no /v1/messages at this version")
    request: Any = {"model": lamp, "max_tokens": 50, "messages": HELLO}
    answer = anthropic_client.messages.create(**request)
    assert [(block.type, block.text) for block in answer.content if block.type == "text"] == [("text", ANSWER)]
    assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 6)
    with anthropic_client.messages.stream(**request) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "".join(block.text for block in final.content if block.type == "text") == ANSWER
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_tools_are_refused_in_each_apis_shape(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, lamp: str, expect: Expected
) -> None:
    function = TOOL["function"]
    if expect.has_responses:
        with pytest.raises(openai.BadRequestError, match="lamp:latest does not support tools"):
            openai_client.responses.create(model=lamp, input="hello", tools=[{"type": "function", **function}])
    if expect.has_messages:
        tool: Any = {
            "name": function["name"],
            "description": function["description"],
            "input_schema": function["parameters"],
        }
        with pytest.raises(anthropic.BadRequestError, match="lamp:latest does not support tools") as refused:
            anthropic_client.messages.create(model=lamp, max_tokens=50, messages=HELLO, tools=[tool])
        body: Any = refused.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


def test_the_rendered_prompt_is_shown(http: httpx.Client, lamp: str, expect: Expected) -> None:
    body = {"model": lamp, "messages": HELLO, "stream": False, "_debug_render_only": True}
    answer = http.post("/api/chat", json=body).json()
    if expect.shows_prompts:
        assert answer["_debug_info"]["rendered_template"].removeprefix("<s>") == PROMPT
    else:
        assert answer["message"]["content"] == ANSWER, "the field is not known, and the model answers"


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_thinking_is_told_of_a_template_that_has_its_marks(
    http: httpx.Client, tmp_path: Path, scratch: str, expect: Expected, marks: tuple[str, str]
) -> None:
    """The capability of a GGUF alone, where its Jinja counts."""
    opening, closing = marks
    template = f"{PLAIN_CHAT_TEMPLATE}{{%- if thought %}}{opening}{{{{ thought }}}}{closing}{{% endif %}}"
    gguf = write_scripted_model(tmp_path / "thinker.gguf", chat_template=template, name=f"thinks {opening}")
    digest = f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    assert http.post(f"/api/blobs/{digest}", content=gguf.read_bytes()).status_code == 201
    body = {"model": scratch, "files": {"model.gguf": digest}, "stream": False}
    assert http.post("/api/create", json=body).json() == {"status": "success"}
    found = http.post("/api/show", json={"model": scratch}).json()["capabilities"]
    told = expect.reads_jinja and (opening == "<think>" or not expect.thinks_in_tags_alone)
    assert ("thinking" in found) is told
