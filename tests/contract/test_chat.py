"""Answers: chat and generate, streamed and whole, through the official client; tools refused; loaded and unloaded."""

from __future__ import annotations

import time
from typing import Any

import httpx
import ollama
import pytest

from contract.cases import HELLO, PARAMETERS, TOOL
from contract.differences import Expected
from contract.scripted_model import ANSWER


def test_a_chat_is_answered_whole(ollama_client: ollama.Client, lamp: str) -> None:
    answer = ollama_client.chat(lamp, HELLO)
    assert (answer.message.role, answer.message.content) == ("assistant", ANSWER)
    assert (answer.model, answer.done, answer.done_reason) == (lamp, True, "stop")
    assert answer.eval_count == 6
    assert answer.prompt_eval_count
    assert answer.total_duration
    assert answer.created_at


def test_a_chat_is_streamed_piece_by_piece(ollama_client: ollama.Client, lamp: str) -> None:
    parts = list(ollama_client.chat(lamp, HELLO, stream=True))
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert len(parts) > 3, "more than one piece before the end"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == 6


def test_a_stream_is_ndjson(http: httpx.Client, lamp: str) -> None:
    answer = http.post("/api/chat", json={"model": lamp, "messages": HELLO})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("}\n")


def test_the_template_and_the_system_prompt_are_rendered(ollama_client: ollama.Client, lamp: str) -> None:
    """Counted, for the scripted model can't tell: the model's system prompt is in, unless the messages bring one."""
    own = ollama_client.chat(lamp, HELLO).prompt_eval_count
    given = ollama_client.chat(lamp, [{"role": "system", "content": "x"}, *HELLO]).prompt_eval_count
    assert own is not None
    assert given is not None
    assert own > given + 5


def test_a_gguf_alone_chats_where_the_engine_reads_jinja(
    ollama_client: ollama.Client, jinja_lamp: str, expect: Expected
) -> None:
    answer = ollama_client.chat(jinja_lamp, HELLO).message.content
    assert answer == (ANSWER if expect.reads_jinja else "")


def test_options_bound_an_answer(ollama_client: ollama.Client, lamp: str) -> None:
    short = ollama_client.chat(lamp, HELLO, options={"num_predict": 2})
    assert (short.message.content, short.done_reason) == ("The lamp", "length")
    stopped = ollama_client.chat(lamp, HELLO, options={"stop": [" on"]})
    assert (stopped.message.content, stopped.done_reason) == ("The lamp is", "stop")


def test_generate_raw_goes_on_from_the_prompt(ollama_client: ollama.Client, lamp: str) -> None:
    answer = ollama_client.generate(lamp, "count from one", raw=True)
    assert (answer.response, answer.done_reason) == (" two three four five", "stop")
    parts = list(ollama_client.generate(lamp, "count from one", raw=True, stream=True))
    assert "".join(part.response for part in parts) == " two three four five"


def test_generate_renders_the_template(ollama_client: ollama.Client, lamp: str) -> None:
    assert ollama_client.generate(lamp, "count from one").response == ANSWER


def test_tools_are_refused_by_a_model_without_them(ollama_client: ollama.Client, lamp: str) -> None:
    """The very text: the proxy's repair begins with it."""
    with pytest.raises(ollama.ResponseError) as refused:
        ollama_client.chat(lamp, HELLO, tools=[TOOL])
    assert refused.value.status_code == 400
    assert refused.value.error == "registry.ollama.ai/library/lamp:latest does not support tools"


def test_thinking_is_refused_by_a_model_without_it(http: httpx.Client, lamp: str) -> None:
    answer = http.post("/api/chat", json={"model": lamp, "messages": HELLO, "think": True})
    assert answer.status_code == 400
    assert answer.json()["error"].endswith(" does not support thinking")


def test_tools_are_taken_by_a_model_whose_template_has_them(ollama_client: ollama.Client, tools_lamp: str) -> None:
    answer = ollama_client.chat(tools_lamp, HELLO, tools=[TOOL])
    without = ollama_client.chat(tools_lamp, HELLO)
    assert answer.message.content == ANSWER
    assert (answer.prompt_eval_count or 0) > (without.prompt_eval_count or 0) + 50, "the tool stands in the prompt"


def test_a_gguf_alone_takes_tools_where_the_engine_reads_jinja(
    ollama_client: ollama.Client, jinja_lamp: str, expect: Expected
) -> None:
    if expect.reads_jinja:
        assert ollama_client.chat(jinja_lamp, HELLO, tools=[TOOL]).message.content == ANSWER
    else:
        with pytest.raises(ollama.ResponseError, match="does not support tools"):
            ollama_client.chat(jinja_lamp, HELLO, tools=[TOOL])


def loaded(client: ollama.Client) -> set[str]:
    return {model.name or "" for model in client.ps().models}


def wait_until_unloaded(client: ollama.Client, name: str) -> None:
    deadline = time.monotonic() + 60
    while name in loaded(client):
        assert time.monotonic() < deadline, f"{name} is still loaded"


@pytest.mark.parametrize("way", ["generate", "chat"])
def test_a_model_is_loaded_by_use_and_unloaded_by_keep_alive_zero(
    http: httpx.Client, ollama_client: ollama.Client, lamp: str, way: str
) -> None:
    ollama_client.chat(lamp, HELLO)
    (entry,) = [model for model in ollama_client.ps().models if model.name == "lamp:latest"]
    assert entry.size
    assert entry.expires_at is not None
    assert entry.context_length == PARAMETERS["num_ctx"]
    body: dict[str, Any] = {"model": lamp, "keep_alive": 0} | ({"messages": []} if way == "chat" else {})
    answer = http.post(f"/api/{way}", json=body).json()
    assert (answer["done"], answer["done_reason"]) == (True, "unload")
    wait_until_unloaded(ollama_client, "lamp:latest")


def test_an_empty_prompt_loads_the_model(http: httpx.Client, ollama_client: ollama.Client, lamp: str) -> None:
    answer = http.post("/api/generate", json={"model": lamp, "stream": False}).json()
    assert (answer["response"], answer["done"], answer["done_reason"]) == ("", True, "load")
    assert "lamp:latest" in loaded(ollama_client)


def test_embeddings_come_from_any_model_where_the_engine_allows_it(
    http: httpx.Client, lamp: str, expect: Expected
) -> None:
    answer = http.post("/api/embed", json={"model": lamp, "input": ["one", "two"]})
    if expect.embeds_any_model:
        assert answer.status_code == 200
        vectors = answer.json()["embeddings"]
        assert [len(vector) for vector in vectors] == [512, 512]
        assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors), "of length one"
    else:
        assert answer.status_code == 501
        assert "does not support embeddings" in answer.json()["error"]
