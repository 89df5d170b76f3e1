"""Chat and generate as the official `ollama` client sees them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ollama
import psutil
import pytest

from engine.conftest import LONG
from engine.running import Engine, until

HI = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_thinking_model_thinks_unless_told_otherwise(shared: Engine) -> None:
    answer = shared.ollama.chat("thoughtful", HI)
    assert answer.message.thinking == "I should ponder"
    assert answer.message.content == "the answer is 42"
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "thoughtful")
    assert answer.eval_count == 7  # six pieces and the end of turn, which llama.cpp counts too
    assert answer.prompt_eval_count and answer.prompt_eval_count > 10
    assert answer.total_duration and answer.total_duration >= (answer.eval_duration or 0) > 0
    rendered = shared.http.post(
        "/api/chat", json={"model": "thoughtful", "messages": HI, "think": False, "_debug_render_only": True}
    ).json()
    assert rendered["_debug_info"]["rendered_template"].endswith("<think>\n\n</think>\n\n")


def test_a_stream_ends_with_the_counters_and_adds_up_to_the_whole(shared: Engine) -> None:
    chunks = list(shared.ollama.chat("thoughtful", HI, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "the answer is 42"
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == "I should ponder"
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 7 and chunks[-1].load_duration is not None
    raw = shared.http.post("/api/chat", json={"model": "thoughtful", "messages": HI})
    assert raw.headers["content-type"] == "application/x-ndjson"
    assert all(json.loads(line)["model"] == "thoughtful" for line in raw.text.splitlines())


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_arrives_with_its_arguments_as_an_object(shared: Engine, stream: bool) -> None:
    answers = shared.ollama.chat("calling", HI, tools=[WEATHER], stream=stream, think=False)
    chunks = list(answers) if stream else [answers]
    calls = [call for chunk in chunks for call in chunk.message.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", {"city": "Paris"})]
    assert chunks[-1].done_reason == "stop"


def test_a_tool_round_trip_reaches_the_template(shared: Engine) -> None:
    body = {
        "model": "calling",
        "tools": [WEATHER],
        "_debug_render_only": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            *HI,
            {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]},
            {"role": "tool", "tool_name": "get_weather", "content": "snow"},
        ],
    }
    prompt = shared.http.post("/api/chat", json=body).json()["_debug_info"]["rendered_template"]
    assert "Be brief." in prompt and '"name": "get_weather", "arguments": {"city": "Oslo"}' in prompt.replace("\n", "")
    assert "<tool_response>\nsnow\n</tool_response>" in prompt


def test_what_a_model_cannot_do_is_refused_in_ollamas_words(shared: Engine) -> None:
    with pytest.raises(
        ollama.ResponseError, match=r"^registry.ollama.ai/library/plain:latest does not support tools"
    ) as no:
        shared.ollama.chat("plain", HI, tools=[WEATHER])
    assert no.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match=r'^"plain" does not support thinking') as no:
        shared.ollama.chat("plain", HI, think=True)
    assert no.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="does not support insert"):
        shared.ollama.generate("plain", "a", suffix="b")
    assert shared.ollama.chat("plain", HI, think=False).message.content == "a plain answer, nothing more"


def test_options_reach_the_sampler(shared: Engine) -> None:
    short = shared.ollama.chat("plain", HI, options={"num_predict": 3})
    assert (short.done_reason, short.eval_count) == ("length", 3)
    stopped = shared.ollama.chat("plain", HI, options={"stop": ["answer"]})
    assert (stopped.message.content, stopped.done_reason) == ("a plain ", "stop")
    warm = {"temperature": 1.5, "seed": 7, "top_k": 200, "top_p": 1.0, "min_p": 0.0}
    assert shared.ollama.chat("plain", HI, options=warm).message.content == "a plain answer, nothing more"
    with pytest.raises(ollama.ResponseError, match='option "temperature" must be a number'):
        shared.ollama.chat("plain", HI, options={"temperature": "hot"})
    answer = shared.ollama.chat("plain", HI, logprobs=True, top_logprobs=2)
    assert answer.logprobs and answer.logprobs[0].logprob == pytest.approx(0.0, abs=1e-3)


def test_format_constrains_the_answer(shared: Engine) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    for form in ("json", schema):
        answer = shared.ollama.chat("json", HI, format=form, options={"num_predict": 60})  # type: ignore[arg-type]
        assert json.loads(answer.message.content or "") == {"city": "Paris"}
    # The script would say something else: the grammar wins.
    forced = shared.ollama.generate("plain", "hi", format={"enum": ["maybe"]}, options={"num_predict": 30})
    assert json.loads(forced.response) == "maybe"
    no = shared.http.post("/api/generate", json={"model": "plain", "prompt": "hi", "format": "yaml"})
    assert no.status_code == 400 and no.json()["error"].startswith('invalid format: "yaml"')


def test_generate_uses_the_template_and_raw_does_not(shared: Engine) -> None:
    templated = shared.ollama.generate("thoughtful", "hi")
    assert (templated.response, templated.thinking) == ("the answer is 42", "I should ponder")
    raw = shared.ollama.generate("bare", "once", raw=True)
    assert raw.response == " upon a time" and raw.prompt_eval_count == 4
    assert shared.ollama.generate("bare", "once").response == " upon a time"  # no template to use
    chunks = list(shared.ollama.generate("bare", "once", raw=True, stream=True))
    assert "".join(chunk.response for chunk in chunks) == " upon a time" and chunks[-1].done_reason == "stop"
    with pytest.raises(ollama.ResponseError, match="raw mode does not support"):
        shared.ollama.generate("plain", "hi", raw=True, system="x")


def test_an_empty_prompt_loads_and_keep_alive_zero_unloads(shared: Engine) -> None:
    client = shared.ollama
    loaded = client.generate("plain", "", keep_alive="10m")
    assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
    [entry] = [model for model in client.ps().models if model.name == "plain:latest"]
    assert entry.context_length == 4096 and entry.size and entry.size > 3_000_000 and entry.expires_at
    assert client.chat("plain", [], keep_alive=0).done_reason == "unload"
    assert "plain:latest" not in [model.name for model in client.ps().models]
    client.chat("plain", HI, keep_alive=0.2)
    until(lambda: "plain:latest" not in [model.name for model in client.ps().models])
    with pytest.raises(ollama.ResponseError, match="invalid duration"):
        client.chat("plain", HI, keep_alive="soon")


def test_no_more_than_three_models_stay_loaded(shared: Engine) -> None:
    for name in ("plain", "json", "bare", "calling"):
        shared.ollama.generate(name, "")
    names = {model.name for model in shared.ollama.ps().models}
    assert names == {"json:latest", "bare:latest", "calling:latest"}
    assert len(shared.runners()) == 3


def test_another_num_ctx_loads_the_model_again(shared: Engine) -> None:
    shared.ollama.generate("plain", "")
    shared.ollama.generate("plain", "", options={"num_ctx": 512})
    assert [m.context_length for m in shared.ollama.ps().models if m.name == "plain:latest"] == [512]


def test_a_conversation_longer_than_the_context_loses_its_oldest_turns(shared: Engine) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": "word " * 30} for n in range(21)]
    answer = shared.ollama.chat("plain", turns, options={"num_ctx": 1024})
    assert answer.message.content == "a plain answer, nothing more"
    assert 100 < (answer.prompt_eval_count or 0) < 1024
    with pytest.raises(ollama.ResponseError, match="context size"):
        shared.ollama.chat("plain", [{"role": "user", "content": "word " * 900}], options={"num_ctx": 1024})


def test_requests_at_once_all_get_their_own_answer(shared: Engine) -> None:
    expected = {"plain": "a plain answer, nothing more", "thoughtful": "the answer is 42", "json": '{"city": "Paris"}'}
    names = list(expected) * 5
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: shared.ollama.chat(name, HI).message.content, names))
    assert answers == [expected[name] for name in names]


def test_a_client_that_leaves_stops_the_generation(shared: Engine) -> None:
    long = {"num_ctx": LONG}
    shared.ollama.generate("endless", "", options=long)
    runner = shared.holding("endless")
    connection = shared.stalled_talk("endless", options=long)
    while b"\n" not in connection.recv(1 << 16):
        pass
    connection.close()
    # There is one slot: whoever comes next is served only when the abandoned answer has let go of it.
    assert shared.ollama.chat("endless", HI, options=long | {"num_predict": 3}).eval_count == 3
    spent = sum(runner.cpu_times()[:2])
    assert until(lambda: _idle(runner)), f"still generating after {spent} s"
    assert runner.is_running()  # the same process: it was the generation that ended


def _idle(runner: psutil.Process) -> bool:
    before = sum(runner.cpu_times()[:2])
    threading.Event().wait(0.3)
    return sum(runner.cpu_times()[:2]) - before < 0.05


def test_embeddings_come_normalised_in_the_order_asked(shared: Engine) -> None:
    answer = shared.ollama.embed("plain", ["one", "two", "one"])
    first, second, third = answer.embeddings
    assert first == third != second
    assert sum(value * value for value in first) == pytest.approx(1.0, abs=1e-3)
    assert answer.prompt_eval_count == 9
    assert len(shared.ollama.embed("plain", "one", dimensions=16).embeddings[0]) == 16
    assert len(shared.ollama.embeddings("plain", "one").embedding) == 512
    assert shared.ollama.embed("plain", "word " * 3000, options={"num_ctx": 512}).prompt_eval_count == 510
    assert shared.ollama.embed("plain", []).embeddings == []
