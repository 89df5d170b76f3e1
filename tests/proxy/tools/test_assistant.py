"""Help on all four APIs, before an engine that says what we like: when it is given, what goes on, what comes back."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from abliterated.proxy.tools.assistant import Assist
from proxy.script import Running, until
from proxy.tools.double import MODEL, TEMPLATE, Double, engine, helped, write_gguf
from templates.asking import DIALECTS, Answer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = [
    "Let me",
    " see.\n<tool",
    '_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": "3"}}\n</tool',
    "_call>",
]
OSLO = {"city": "Oslo"}
HELLO = [{"role": "user", "content": "hello"}]
WAYS = [(api, stream) for api in DIALECTS for stream in (False, True)]


Stage = tuple[Double, Running, Assist]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One engine, and one proxy that helps where it is needed: starting them takes longer than a test."""
    with engine(tmp_path_factory.mktemp("engine")) as double, helped(url(double)) as (running, assist):
        yield double, running, assist


@pytest.fixture
def lamp(stage: Stage) -> Double:
    """The engine, as new."""
    double, running, assist = stage
    fresh = Double(str(Path(double.gguf).with_name("lamp.gguf")))
    names = ("gguf", "capabilities", "says", "status", "version", "system", "headers", "asked", "gone", "endless")
    for name in (*names, "breaks", "shuts"):
        setattr(double, name, getattr(fresh, name))
    assist.knowledge.forget()
    running.proxy.tally.series.clear()
    return double


@pytest.fixture
def front(stage: Stage) -> Running:
    return stage[1]


def url(double: Double) -> str:
    return f"http://127.0.0.1:{double.port}"


def client(running: Running) -> httpx.Client:
    return httpx.Client(base_url=f"http://{running.address}", trust_env=False, timeout=60)


def assisted(running: Running) -> int:
    return sum(series.assisted for series in running.proxy.tally.series.values())


@pytest.mark.parametrize(("api", "stream"), WAYS)
def test_a_call_comes_back_in_the_apis_own_shape(lamp: Double, front: Running, api: str, stream: bool) -> None:
    lamp.says = [*CALL]
    with client(front) as http:
        answer = DIALECTS[api](http, MODEL, HELLO, [TOOL], stream, None)
    assert answer == Answer("Let me see.", "", [("get_weather", {"city": "Paris", "days": 3})])
    (asked,) = lamp.bodies("/api/generate")
    assert asked["raw"] is True and '"get_weather"' in asked["prompt"] and asked["prompt"].endswith("assistant")


@pytest.mark.parametrize(("api", "stream"), WAYS)
def test_words_come_back_as_words_and_tokens_are_counted(lamp: Double, front: Running, api: str, stream: bool) -> None:
    with client(front) as http:
        assert DIALECTS[api](http, MODEL, HELLO, [TOOL], stream, None) == Answer("Hello there")
        until(lambda: (api, MODEL) in front.proxy.tally.series)
        series = front.proxy.tally.series[api, MODEL]
        usage_told = stream and api == "/v1/chat/completions"  # only on request there
        until(lambda: (series.assisted, series.tokens) == (1, 0 if usage_told else 5))


def test_who_needs_no_help_gets_none(lamp: Double, front: Running) -> None:
    lamp.capabilities = ["completion", "tools", "thinking"]
    with client(front) as http:
        body: dict[str, Any] = {"model": MODEL, "messages": HELLO, "stream": False}
        for more in ({}, {"tools": [TOOL]}, {"think": True}, {"tools": [], "options": {"seed": 1}}):
            assert http.post("/api/chat", json=body | more).json() == {"told": "as it is"}
            assert lamp.bodies("/api/chat")[-1] == body | more
        assert http.post("/api/chat", json=body | {"model": "lamp:1b", "tools": [TOOL]}).json() == {"told": "as it is"}
        assert assisted(front) == 0


def test_what_only_the_engine_can_do_is_left_to_it(lamp: Double, front: Running) -> None:
    with client(front) as http:
        body = {"model": MODEL, "messages": HELLO, "stream": False, "tools": [TOOL]}
        for more in ({"logprobs": True}, {"_debug_render_only": True}, {"messages": []}, {"messages": "nonsense"}):
            assert http.post("/api/chat", json=body | more).json() == {"told": "as it is"}
        body = {"model": MODEL, "input": "hi", "tools": [{"type": "web_search"}], "stream": False}
        assert http.post("/v1/responses", json=body).json() == {"told": "as it is"}
        assert assisted(front) == 0


def test_format_options_keep_alive_and_the_models_own_system_go_on(lamp: Double, front: Running) -> None:
    lamp.system = "You are a lamp."
    body = {
        "model": MODEL, "messages": HELLO, "tools": [TOOL], "format": "json", "keep_alive": "7m",
        "options": {"seed": 4, "num_predict": 9}, "stream": False,
    }  # fmt: skip
    with client(front) as http:
        told = http.post("/api/chat", json=body).json()
    (asked,) = lamp.bodies("/api/generate")
    assert (asked["format"], asked["keep_alive"], asked["options"]) == ("json", "7m", {"seed": 4, "num_predict": 9})
    assert "You are a lamp." in asked["prompt"]
    assert (told["done_reason"], told["prompt_eval_count"], told["eval_count"], told["total_duration"]) == (
        "stop",
        7,
        5,
        11,
    )
    assert told["model"] == MODEL and told["message"] == {"role": "assistant", "content": "Hello there"}


def test_the_openai_shapes_have_usage_and_arguments_as_text(lamp: Double, front: Running) -> None:
    lamp.says = [*CALL]
    with client(front) as http:
        body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "max_tokens": 5}
        told = http.post("/v1/chat/completions", json=body).json()
        streamed = http.post(
            "/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
        ).text
    assert told["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    (choice,) = told["choices"]
    assert choice["finish_reason"] == "tool_calls"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, str) and json.loads(arguments) == {"city": "Paris", "days": 3}
    assert lamp.bodies("/api/generate")[0]["options"]["num_predict"] == 5
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["total_tokens"] == 12 and streamed.endswith("data: [DONE]\n\n")
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_two_calls_are_numbered_apart_in_a_stream(lamp: Double, front: Running) -> None:
    lamp.says = ['<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>\n' for _ in range(2)]
    with client(front) as http:
        told = http.post("/api/chat", json={"model": MODEL, "messages": HELLO, "tools": [TOOL]}).text
    lines = [json.loads(line) for line in told.splitlines()]
    calls = [call for line in lines for call in line["message"].get("tool_calls") or ()]
    assert [call["function"]["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2 and lines[-1]["done"] is True


@pytest.mark.parametrize(("api", "stream"), WAYS)
def test_an_engines_error_keeps_its_status_and_takes_the_apis_shape(
    lamp: Double, front: Running, api: str, stream: bool
) -> None:
    lamp.status, lamp.says = 503, ["server busy"]
    with client(front) as http:
        answer = DIALECTS[api](http, MODEL, HELLO, [TOOL], stream, None)
    assert answer.error == "503: server busy"


@pytest.mark.parametrize(("api", "stream"), WAYS)
@pytest.mark.parametrize("fault", [{"error": "out of memory"}, {"response": "and", "done": "yes"}])
def test_an_error_in_the_middle_is_told_and_never_looks_like_an_end(
    lamp: Double, front: Running, api: str, stream: bool, fault: dict[str, Any]
) -> None:
    lamp.says = ["Hello", fault]
    with client(front) as http:
        answer = DIALECTS[api](http, MODEL, HELLO, [TOOL], stream, None)
        assert any(words in answer.error for words in ("out of memory", "). Ask again; its log may tell why"))
        assert http.get("/api/version").status_code == 200


def test_an_engine_that_breaks_off_is_an_error_too(lamp: Double, front: Running) -> None:
    lamp.says = ["Hello", {"response": "there", "done": False}]  # and no last line
    with client(front) as http:
        answer = DIALECTS["/api/chat"](http, MODEL, HELLO, [TOOL], True, None)
    assert answer.error == "the engine's answer broke off. Ask again; its log may tell why"
    lamp.says, lamp.breaks = ["Hello"], True
    with client(front) as http:
        answer = DIALECTS["/api/chat"](http, MODEL, HELLO, [TOOL], True, None)
    assert "broke off" in answer.error and "See the engine's log" in answer.error


def test_where_the_engine_is_away_the_relay_answers(lamp: Double) -> None:
    with helped("http://127.0.0.1:1") as (running, _), client(running) as http:
        answer = http.post("/api/chat", json={"model": MODEL, "messages": HELLO, "tools": [TOOL]})
        assert answer.status_code == 502 and "127.0.0.1:1" in answer.json()["error"]


def test_the_engine_hears_at_once_that_the_client_has_left(lamp: Double) -> None:
    lamp.endless = True
    body = json.dumps({"model": MODEL, "messages": HELLO, "tools": [TOOL]}).encode()
    with helped(url(lamp)) as (running, _):
        host, _, port = running.address.rpartition(":")
        with socket.create_connection((host, int(port))) as mine:
            mine.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in mine.recv(1000)
        assert lamp.gone.wait(60)


def test_the_engines_guards_see_who_asks_and_its_words_on_origins_come_back(lamp: Double, front: Running) -> None:
    lamp.headers = {"Access-Control-Allow-Origin": "http://localhost:3000", "Vary": "Origin", "X-Other": "no"}
    sent = {"Origin": "http://localhost:3000", "Authorization": "Bearer x", "Host": "localhost:11434"}
    with client(front) as http:
        for stream in (True, False):
            answer = http.post(
                "/api/chat", json={"model": MODEL, "messages": HELLO, "tools": [TOOL], "stream": stream}, headers=sent
            )
            assert (
                answer.headers["access-control-allow-origin"] == sent["Origin"] and answer.headers["vary"] == "Origin"
            )
            assert "x-other" not in answer.headers
    headers = next(headers for path, _, headers in lamp.asked if path == "/api/generate")
    assert {name: headers[name] for name in sent} == sent


def test_what_one_client_is_refused_another_is_still_helped_with(lamp: Double, front: Running) -> None:
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "stream": False}
    with client(front) as http:
        lamp.shuts = True
        http.post("/api/chat", json=body, headers={"Origin": "http://elsewhere.example"})
        lamp.shuts = False
        assert http.post("/api/chat", json=body).json()["message"]["content"] == "Hello there"


def test_beyond_loopback_the_engine_hears_the_host_that_its_guard_lets_in(lamp: Double) -> None:
    more: dict[str, Any] = {"listen": "0.0.0.0:0", "allow_remote": True, "allowed_hosts": ["box.example.org"]}
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "stream": False}
    with helped(url(lamp), **more) as (running, _):
        address = running.address.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=60) as http:
            told = http.post("/api/chat", json=body, headers={"Host": "box.example.org:11434"}).json()
    assert told["message"]["content"] == "Hello there"
    assert {headers["Host"] for _, _, headers in lamp.asked} == {f"localhost:{lamp.port}"}


def test_a_connection_serves_on_after_help_and_closes_where_that_was_asked(lamp: Double, front: Running) -> None:
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "stream": False}
    before = front.proxy.stats.accepted
    with client(front) as http:
        for _ in range(3):
            assert http.post("/api/chat", json=body).json()["message"]["content"] == "Hello there"
            assert http.get("/api/version").json() == {"version": "0.11.0"}
        assert front.proxy.stats.accepted == before + 1
        assert http.post("/api/chat", json=body, headers={"Connection": "close"}).status_code == 200
        assert http.get("/api/version").status_code == 200
        assert front.proxy.stats.accepted == before + 2
    assert len(lamp.bodies("/api/show")) == 1, "what is known of a model is kept"


@pytest.mark.parametrize(("api", "stream"), WAYS)
def test_thinking_is_split_where_the_engine_does_not_know_that_the_model_thinks(
    lamp: Double, front: Running, api: str, stream: bool
) -> None:
    thinks = Path(lamp.gguf).with_name("thinks.gguf")
    lamp.gguf = str(write_gguf(thinks, TEMPLATE + "{% if false %}<think></think>{% endif %}"))
    lamp.says = ["<thi", "nk>\nHm", "m.\n</think>", "\n\nHello"]
    with client(front) as http:
        assert DIALECTS[api](http, MODEL, HELLO, [], stream, True) == Answer("Hello", "Hmm.")
        assert DIALECTS[api](http, MODEL, HELLO, [TOOL], stream, True) == Answer("Hello", "Hmm.")


def test_a_choice_of_tools_is_kept_only_where_a_person_has_opted_for_it(lamp: Double) -> None:
    lamp.says = ['{"city": "Paris"}}\n</tool_call>']
    named = {"type": "function", "function": {"name": "get_weather"}}
    with helped(url(lamp), more=frozenset({"tool_choice"})) as (running, _), client(running) as http:
        body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": named}
        told = http.post("/v1/chat/completions", json=body).json()
        call = told["choices"][0]["message"]["tool_calls"][0]["function"]
        assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})
        assert lamp.bodies("/api/generate")[-1]["prompt"].endswith('<tool_call>\n{"name": "get_weather", "arguments": ')
        lamp.says = ["Hello"]
        http.post("/v1/chat/completions", json=body | {"tool_choice": "none"})
        assert "get_weather" not in lamp.bodies("/api/generate")[-1]["prompt"]
    with helped(url(lamp)) as (running, _), client(running) as http:
        http.post("/v1/chat/completions", json=body)
        assert lamp.bodies("/api/generate")[-1]["prompt"].endswith("assistant")


def test_the_proxy_alone_is_told_so_by_a_flag(lamp: Double, tmp_path: Path) -> None:
    lamp.says = ['{"city": "Paris"}}\n</tool_call>']
    log = tmp_path / "log"
    command = [sys.executable, "-m", "abliterated.cli", "proxy", "--listen", "127.0.0.1:0", "--upstream", url(lamp)]
    with log.open("wb") as out:
        alone = subprocess.Popen([*command, "--assist-more", "tool_choice"], stderr=out, stdin=subprocess.DEVNULL)
    try:
        until(lambda: "listening on" in log.read_text())
        port = re.search(r"127\.0\.0\.1:(\d+)", log.read_text().partition("listening on")[2])
        assert port is not None
        named = {"type": "function", "function": {"name": "get_weather"}}
        body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": named}
        with httpx.Client(base_url=f"http://127.0.0.1:{port[1]}", trust_env=False, timeout=60) as http:
            # Once it has heard that such a model exists.
            until(lambda: '"tool_calls"' in http.post("/v1/chat/completions", json=body).text)
        assert lamp.bodies("/api/generate")[-1]["prompt"].endswith('"arguments": ')
    finally:
        alone.terminate()
        alone.wait(60)


def test_one_call_at_a_time_where_that_is_opted_for(lamp: Double) -> None:
    lamp.says = ['<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>\n' for _ in range(2)]
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "parallel_tool_calls": False}
    for more, count in ((frozenset({"parallel_tool_calls"}), 1), (frozenset(), 2)):
        with helped(url(lamp), more=more) as (running, _), client(running) as http:  # type: ignore[arg-type]
            told = http.post("/v1/chat/completions", json=body).json()
        assert len(told["choices"][0]["message"]["tool_calls"]) == count


def test_without_a_template_tools_are_told_in_words_only_where_a_person_wants_that(lamp: Double) -> None:
    lamp.gguf = str(Path(lamp.gguf).with_name("not-here.gguf"))
    lamp.says = ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>']
    talk = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather", "arguments": OSLO}}]},
        {"role": "tool", "content": "rain"},
    ]  # fmt: skip
    body = {"model": MODEL, "messages": talk, "tools": [TOOL], "stream": False, "think": None}
    with helped(url(lamp)) as (running, _), client(running) as http:
        assert http.post("/api/chat", json=body).json() == {"told": "as it is"}
    with helped(url(lamp), help="any") as (running, _), client(running) as http:
        told = http.post("/api/chat", json=body).json()
    assert told["message"]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    asked = lamp.bodies("/api/chat")[-1]
    assert "tools" not in asked and [message["role"] for message in asked["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert asked["messages"][0]["content"].startswith("Be brief.\n\nYou can call tools.")
    assert '"city": "Oslo"' in asked["messages"][2]["content"] and "rain" in asked["messages"][3]["content"]


def test_images_go_on_in_a_chat(lamp: Double, front: Running) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "see", "images": ["aGk="]}], "tools": [TOOL]}
    with client(front) as http:
        http.post("/api/chat", json=body)
    (asked,) = lamp.bodies("/api/chat")
    assert asked["messages"][-1] == {"role": "user", "content": "see", "images": ["aGk="]}


def test_a_certificate_that_says_tools_are_lost_is_believed(lamp: Double) -> None:
    lamp.capabilities = ["completion", "tools"]
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "stream": False}
    with helped(url(lamp)) as (running, assist), client(running) as http:
        assert http.post("/api/chat", json=body).json() == {"told": "as it is"}
        assist.trust(MODEL, tools=False)
        assert http.post("/api/chat", json=body).json()["message"]["content"] == "Hello there"


def test_thoughts_in_the_history_reach_the_prompt_only_where_that_is_opted_for(lamp: Double) -> None:
    template = TEMPLATE.replace("{{ message.content }}", "{{ message.reasoning_content or '' }}{{ message.content }}")
    lamp.gguf = str(write_gguf(Path(lamp.gguf).with_name("remembers.gguf"), template))
    lamp.capabilities = ["completion", "tools", "thinking"]
    talk = [*HELLO, {"role": "assistant", "content": "Hm.", "thinking": "Deep thought"}, *HELLO]
    body = {"model": MODEL, "messages": talk, "stream": False}
    with helped(url(lamp), more=frozenset({"thinking_history"})) as (running, _), client(running) as http:
        assert http.post("/api/chat", json=body).json()["message"]["content"] == "Hello there"
    assert "Deep thoughtHm." in lamp.bodies("/api/generate")[-1]["prompt"]
    with helped(url(lamp)) as (running, _), client(running) as http:
        assert http.post("/api/chat", json=body).json() == {"told": "as it is"}


def test_forty_requests_at_once_each_get_their_own_answer(lamp: Double, front: Running) -> None:
    lamp.says = [*CALL]
    with client(front) as http, concurrent.futures.ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(DIALECTS[api], http, MODEL, HELLO, [TOOL], stream, None) for api, stream in WAYS * 5]
        answers = [one.result(60) for one in asked]
    assert answers == [Answer("Let me see.", "", [("get_weather", {"city": "Paris", "days": 3})])] * 40
