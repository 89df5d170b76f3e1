"""OpenAI's Responses as the official client sees them, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from engine.running import Engine

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather somewhere",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def test_an_answer_comes_whole_with_its_thought(shared: Engine) -> None:
    answer = shared.openai.responses.create(model="thoughtful", input="hi")
    assert answer.output_text == "the answer is 42"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    thought: Any = answer.output[0]
    assert thought.summary[0].text == "I should ponder"
    assert thought.encrypted_content == "I should ponder"
    assert (answer.status, answer.model, answer.object) == ("completed", "thoughtful", "response")
    assert answer.usage and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_stream_tells_the_same_step_by_step(shared: Engine) -> None:
    with shared.openai.responses.stream(model="thoughtful", input="hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "the answer is 42"
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert (thought, text) == ("I should ponder", "the answer is 42")
    assert kinds.count("response.output_text.delta") > 1, "in pieces, as they come"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_an_item_of_its_own(shared: Engine, stream: bool) -> None:
    request: Any = {"model": "calling", "input": "hi", "tools": [WEATHER]}
    if stream:
        with shared.openai.responses.stream(**request) as running:
            events = list(running)
            answer: Any = running.get_final_response()
        [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert json.loads(done.arguments) == {"city": "Paris"}
    else:
        answer = shared.openai.responses.create(**request)
    [item] = answer.output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    assert item.call_id


def test_a_conversation_of_items_is_read(shared: Engine) -> None:
    """What an answer's items were is what the next request's items may be."""
    first = shared.openai.responses.create(model="thoughtful", input="hi")
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "b", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "a", "output": "snow"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    answer = shared.openai.responses.create(model="thoughtful", input=items, tools=[WEATHER], instructions="Be kind.")
    assert answer.output_text == "the answer is 42"


def test_the_end_of_the_budget_is_told(shared: Engine) -> None:
    answer = shared.openai.responses.create(model="endless", input="hi", max_output_tokens=5)
    assert answer.status == "incomplete"
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage and answer.usage.output_tokens == 5


def test_a_schema_bounds_the_answer(shared: Engine) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form: Any = {"format": {"type": "json_schema", "name": "place", "schema": schema}}
    answer = shared.openai.responses.create(model="json", input="hi", text=form, temperature=0, max_output_tokens=60)
    assert json.loads(answer.output_text) == {"city": "Paris"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "plain", "input": "hi", "tools": [WEATHER]}, "does not support tools"),
        ({"model": "plain", "input": []}, "too short"),
        ({"model": "plain", "input": [{"type": "song"}]}, "unknown input item"),
        ({"model": "plain", "input": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown content"),
        ({"model": "calling", "input": "hi", "tools": [{"type": "web_search"}]}, "unsupported tool"),
        ({"model": "plain", "input": "hi", "previous_response_id": "resp_1"}, "nothing is kept"),
        ({"model": "plain", "input": "hi", "reasoning": {"effort": "enormous"}}, "invalid reasoning value"),
    ],
)
def test_what_cannot_be_said_so(shared: Engine, request_: Any, message: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            shared.openai.responses.create(**request_, stream=stream)


def test_an_unknown_model_is_not_found(shared: Engine) -> None:
    with pytest.raises(openai.NotFoundError):
        shared.openai.responses.create(model="nothing", input="hi")
