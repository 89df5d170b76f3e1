"""The OpenAI side of an engine, through the official client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from contract.cases import HELLO, TOOL
from contract.differences import Expected
from contract.scripted_model import ANSWER


def test_a_chat_is_answered_whole_unless_a_stream_is_asked_for(openai_client: openai.OpenAI, lamp: str) -> None:
    answer = openai_client.chat.completions.create(model=lamp, messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_chat_is_streamed_and_ends_with_its_usage(openai_client: openai.OpenAI, lamp: str) -> None:
    stream = openai_client.chat.completions.create(
        model=lamp, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_a_stream_is_server_sent_events_and_says_done(http: httpx.Client, lamp: str) -> None:
    answer = http.post("/v1/chat/completions", json={"model": lamp, "messages": HELLO, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith("data: {")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_completions_render_the_template(openai_client: openai.OpenAI, lamp: str) -> None:
    assert openai_client.completions.create(model=lamp, prompt="count").choices[0].text == ANSWER


def test_max_tokens_bounds_the_answer(openai_client: openai.OpenAI, lamp: str) -> None:
    (choice,) = openai_client.chat.completions.create(model=lamp, messages=HELLO, max_tokens=2).choices
    assert (choice.message.content, choice.finish_reason) == ("The lamp", "length")


def test_models_are_listed_and_found(openai_client: openai.OpenAI, lamp: str) -> None:
    assert "lamp:latest" in {model.id for model in openai_client.models.list()}
    assert openai_client.models.retrieve(lamp).owned_by == "library"


def test_tools_are_refused_in_openais_shape(openai_client: openai.OpenAI, lamp: str, expect: Expected) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.chat.completions.create(model=lamp, messages=HELLO, tools=[TOOL])
    assert refused.value.body == {
        "message": "registry.ollama.ai/library/lamp:latest does not support tools",
        "type": "invalid_request_error" if expect.openai_error_types else "api_error",
        "param": None,
        "code": None,
    }


def test_an_unknown_model_is_404_in_openais_shape(openai_client: openai.OpenAI, expect: Expected) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.chat.completions.create(model="missing", messages=HELLO)
    body: Any = missing.value.body
    assert body["type"] == ("not_found_error" if expect.openai_error_types else "api_error")
    assert "missing" in body["message"]
    assert "not found" in body["message"]
