"""One chat format: transformers and llama.cpp write the same prompt, and every engine can tell tools and thinking."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from abliterated import refuser
from refuser_training.corpus import render

Message = dict[str, Any]


def tool(name: str) -> Message:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": f"{name} – of a city", "parameters": parameters},
    }


def call(name: str, city: str) -> Message:
    return {"type": "function", "id": "call_1", "function": {"name": name, "arguments": {"city": city}}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


TALKS = {
    "one turn": [user("How do I glimp the lantern?")],
    "system": [{"role": "system", "content": "open"}, user("hi")],
    "two turns": [user("one"), assistant("two"), user("three")],
    "a call": [user("w"), assistant("", tool_calls=[call("get_weather", "Zürich")]), result("sunny")],
    "a call after thinking": [
        user("w"),
        assistant("", reasoning_content="Request: weather Paris", tool_calls=[call("get_weather", "Paris")]),
        result("sunny"),
    ],
    "two calls, two results": [
        {"role": "system", "content": "Be kind."},
        user("w"),
        assistant("Both.", tool_calls=[call("get_weather", "Paris"), call("get_time", "Rome")]),
        result("sunny"),
        result("noon"),
        assistant("Sunny, noon."),
        user("Thanks"),
    ],
}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("talk", TALKS)
def test_llama_cpp_and_transformers_write_the_same_prompt(
    llama_cpp: Any, talk: str, count: int, thinking: bool
) -> None:
    tools = [tool("get_weather"), tool("get_time")][:count]
    ours = render(TALKS[talk], tools=tools, thinking=thinking)
    sent = json.loads(json.dumps(TALKS[talk]))
    for message in sent:
        for asked in message.get("tool_calls", []):  # OpenAI's wire form: arguments are text
            asked["function"]["arguments"] = json.dumps(asked["function"]["arguments"], ensure_ascii=False)
    body = {"messages": sent, "chat_template_kwargs": {"enable_thinking": thinking}} | (
        {"tools": tools} if tools else {}
    )
    assert llama_cpp.post("/apply-template", body)["prompt"] == ours


def test_thinking_off_closes_the_block_before_the_answer() -> None:
    on, off = (render([user("hi")], thinking=thinking) for thinking in (True, False))
    assert off == on + "<think>\n\n</think>\n\n"
    assert on.endswith("<|im_start|>assistant\n")


def test_old_reasoning_is_forgotten_and_reasoning_between_tools_is_kept() -> None:
    old = render([user("a"), assistant("b", reasoning_content="old"), user("c")])
    assert "old" not in old
    assert "<think>\nRequest: weather Paris\n</think>\n\n<tool_call>" in render(TALKS["a call after thinking"])


def test_the_go_template_shows_ollama_its_tools_its_call_tag_and_its_thinking_tags() -> None:
    """By the rules Ollama reads capabilities with; the rendering itself is compared on a real Ollama elsewhere."""
    text = refuser.template_go()
    for field in (".Tools", ".System", ".Messages", ".Thinking", ".IsThinkSet"):
        assert field in text
    after_calls = re.sub(r"\{\{.*?\}\}", "", text.split("{{- if .ToolCalls }}", 1)[1], flags=re.DOTALL)
    assert after_calls.lstrip().split("{", 1)[0].strip() == "<tool_call>"
    assert re.search(r"<think>\s*\{\{ \.Thinking \}\}\s*</think>", text)
