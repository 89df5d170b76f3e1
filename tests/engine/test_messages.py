"""Anthropic's Messages as the official client sees them, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from engine.running import Engine

HI: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather somewhere",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def client(shared: Engine) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=shared.url, api_key="-", max_retries=0) as made:
        yield made


def test_an_answer_comes_whole_with_its_thought(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="thoughtful", max_tokens=100, messages=HI)
    assert [(block.type, getattr(block, block.type)) for block in answer.content] == [
        ("thinking", "I should ponder"),
        ("text", "the answer is 42"),
    ]
    assert (answer.role, answer.model, answer.stop_reason) == ("assistant", "thoughtful", "end_turn")
    assert answer.usage.output_tokens == 7 and answer.usage.input_tokens > 0


def test_a_stream_tells_the_same_step_by_step(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="thoughtful", max_tokens=100, messages=HI) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_message()
    assert [(block.type, getattr(block, block.type)) for block in answer.content] == [
        ("thinking", "I should ponder"),
        ("text", "the answer is 42"),
    ]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert answer.stop_reason == "end_turn" and answer.usage.output_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_a_block_of_its_own(client: anthropic.Anthropic, stream: bool) -> None:
    request: Any = {"model": "calling", "max_tokens": 100, "messages": HI, "tools": [WEATHER]}
    if stream:
        with client.messages.stream(**request) as running:
            answer = running.get_final_message()
    else:
        answer = client.messages.create(**request)
    [block] = answer.content
    assert block.type == "tool_use" and (block.name, block.input) == ("get_weather", {"city": "Paris"})
    assert block.id and answer.stop_reason == "tool_use"


def test_a_conversation_of_blocks_is_read(client: anthropic.Anthropic) -> None:
    talk: Any = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "snow"},
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    system: Any = [{"type": "text", "text": "Be brief."}]
    answer = client.messages.create(model="thoughtful", max_tokens=100, messages=talk, tools=[WEATHER], system=system)
    assert answer.content[-1].type == "text" and answer.content[-1].text == "the answer is 42"


def test_the_end_of_the_budget_is_told(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="endless", max_tokens=5, messages=HI)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 5)


def test_thinking_asked_of_a_model_that_cannot_is_let_be(client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(model="plain", max_tokens=2000, messages=HI, thinking=thinking)
    assert answer.content[0].type == "text" and answer.content[0].text == "a plain answer, nothing more"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "plain", "max_tokens": 9, "messages": HI, "tools": [WEATHER]}, "does not support tools"),
        ({"model": "plain", "max_tokens": 9, "messages": []}, "messages is required"),
        ({"model": "plain", "max_tokens": 0, "messages": HI}, "max_tokens"),
        ({"model": "plain", "max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "smell"),
        ({"model": "calling", "max_tokens": 9, "messages": HI, "tools": [{"type": "bash_20250124", "name": "bash"}]},
         "unsupported tool"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_anthropics_shape(client: anthropic.Anthropic, request_: Any, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as refused:
        client.messages.create(**request_)
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nothing", max_tokens=9, messages=HI)
