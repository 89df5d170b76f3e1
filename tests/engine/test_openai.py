"""The `/v1` routes as the official `openai` client sees them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from engine.running import Engine
from engine.test_chat import HI, WEATHER


def test_models_are_listed_and_told(shared: Engine) -> None:
    ids = {model.id for model in shared.openai.models.list()}
    assert {"plain:latest", "thoughtful:latest"} <= ids
    assert shared.openai.models.retrieve("plain").id == "plain:latest"
    with pytest.raises(openai.NotFoundError, match="model 'nothing' not found"):
        shared.openai.models.retrieve("nothing")


def test_a_chat_completion_carries_reasoning_and_usage(shared: Engine) -> None:
    answer = shared.openai.chat.completions.create(model="thoughtful", messages=HI)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "the answer is 42"
    assert answer.choices[0].message.reasoning == "I should ponder"  # type: ignore[attr-defined]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_ends_in_done_with_usage_where_asked(shared: Engine) -> None:
    options = {"include_usage": True}
    chunks = list(
        shared.openai.chat.completions.create(model="thoughtful", messages=HI, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the answer is 42"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 7 and not chunks[-1].choices
    body = {"model": "plain", "messages": HI, "stream": True}
    raw = shared.http.post("/v1/chat/completions", json=body)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n") and '"usage"' not in raw.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_arrives_with_its_arguments_as_text(shared: Engine, stream: bool) -> None:
    request: Any = {"model": "calling", "messages": HI, "tools": [WEATHER], "stream": stream}
    answer: Any = shared.openai.chat.completions.create(**request)
    if stream:
        chunks = list(answer)
        [call] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        [call] = answer.choices[0].message.tool_calls
        reason = answer.choices[0].finish_reason
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert reason == "tool_calls" and call.id


def test_a_conversation_with_calls_and_parts_is_understood(shared: Engine) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "snow"},
    ]
    answer = shared.openai.chat.completions.create(model="thoughtful", messages=messages, reasoning_effort="low")
    assert answer.choices[0].message.content == "the answer is 42"


def test_refusals_have_openais_shape(shared: Engine) -> None:
    with pytest.raises(openai.BadRequestError) as no:
        shared.openai.chat.completions.create(model="plain", messages=HI, tools=[WEATHER])  # type: ignore[call-overload]
    assert no.value.body == {
        "message": "registry.ollama.ai/library/plain:latest does not support tools",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    with pytest.raises(openai.BadRequestError, match="too short"):
        shared.openai.chat.completions.create(model="plain", messages=[])
    with pytest.raises(openai.NotFoundError):
        shared.openai.completions.create(model="nothing", prompt="hi")


def test_completions_and_a_json_schema(shared: Engine) -> None:
    done = shared.openai.completions.create(model="plain", prompt="hi", max_tokens=100)
    assert done.choices[0].text == "a plain answer, nothing more"
    chunks = list(shared.openai.completions.create(model="plain", prompt="hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a plain answer, nothing more"
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = shared.openai.chat.completions.create(
        model="json",
        messages=HI,  # type: ignore[arg-type]
        response_format=form,
        temperature=0,
        max_tokens=60,
    )
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}


def test_embeddings_are_the_same_packed_or_plain(shared: Engine) -> None:
    plain = shared.openai.embeddings.create(model="plain", input=["one", "two"], encoding_format="float")
    packed = shared.openai.embeddings.create(model="plain", input=["one", "two"])  # base64 on the wire
    for left, right in zip(plain.data, packed.data, strict=True):
        assert left.embedding == pytest.approx(right.embedding, abs=1e-6)
    assert plain.usage.prompt_tokens == 6
