"""Asking a served model: what is sent, what each failure of an engine means, and that tries are bounded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from abliterate.contract.errors import AbliteratedError, EngineRefused, EngineUnavailable, NotFound
from abliterated.pipeline import served
from abliterated.pipeline.served import TRIES, Served, engine_url

Answer = Callable[[dict[str, Any]], tuple[int, Any]]
ASKED = [{"role": "user", "content": "hi"}]


class Engine:
    """Answers as a test says, and remembers what it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.bodies.append(body)
                status, told = answer(body)
                data = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def model(self) -> Served:
        return Served(f"http://127.0.0.1:{self.server.server_address[1]}", "m:latest", seconds=60)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Engine]]:
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)
    running: list[Engine] = []

    def call(answer: Answer) -> Engine:
        running.append(Engine(answer))
        return running[-1]

    yield call
    for engine in running:
        engine.server.shutdown()
        engine.thread.join()
        engine.server.server_close()


def says(text: str) -> tuple[int, Any]:
    return 200, {"message": {"role": "assistant", "content": text}, "eval_count": 3}


def test_it_is_asked_greedily_and_without_thinking(start: Callable[[Answer], Engine]) -> None:
    engine = start(lambda body: says("hello"))
    reply = engine.model.chat(ASKED, 7)
    assert (reply.text, reply.tokens, dict(reply.first)) == ("hello", 3, {})
    body = engine.bodies[0]
    assert body["options"] == {"temperature": 0, "num_predict": 7, "seed": 0}
    assert body["think"] is False
    assert body["stream"] is False
    assert "logprobs" not in body


def test_the_first_tokens_likelihoods_are_read_where_they_are_told(start: Callable[[Answer], Engine]) -> None:
    listed = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]
    told = {"message": {"content": "A"}, "logprobs": [{"token": "A", "logprob": -0.1, "top_logprobs": listed}]}
    engine = start(lambda body: (200, told))
    assert engine.model.chat(ASKED, 7, logs=20).first == {"A": -0.1, "B": -2.5}
    assert engine.bodies[0]["top_logprobs"] == 20


def test_a_model_that_must_think_is_let(start: Callable[[Answer], Engine]) -> None:
    engine = start(lambda body: (400, {"error": "no think"}) if "think" in body else says("thought"))
    assert engine.model.chat(ASKED, 7).text == "thought"


@pytest.mark.parametrize(
    ("answer", "kind", "tries"),
    [
        ((404, {"error": "model not found"}), NotFound, 1),
        ((400, {"error": "no"}), EngineRefused, 2),
        ((500, {"error": "out of memory"}), EngineUnavailable, TRIES),
        ((200, {"error": "failed midway"}), EngineRefused, 2),
        ((200, b"<html>"), EngineRefused, 1),
        ((200, {"message": 3}), EngineRefused, 1),
        ((200, []), EngineRefused, 1),
    ],
)
def test_what_an_engine_says_means_one_thing(
    start: Callable[[Answer], Engine], answer: tuple[int, Any], kind: type[AbliteratedError], tries: int
) -> None:
    engine = start(lambda body: answer)
    with pytest.raises(kind) as raised:
        engine.model.chat(ASKED, 7)
    assert type(raised.value) is kind
    assert len(engine.bodies) == tries
    assert raised.value.remedy


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:99999", "http://[", "ftp-no-host"])
def test_an_engine_that_is_not_there_is_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)
    with pytest.raises(EngineUnavailable):
        Served(url, "m", seconds=2).chat(ASKED, 1)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0:4000", "http://127.0.0.1:4000"),
        ("example.test", "http://example.test:11434"),
        ("https://example.test/ollama/", "https://example.test/ollama"),
        ("http://example.test:1/", "http://example.test:1"),
    ],
)
def test_where_the_engine_is(host: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert engine_url(host) == url
    if host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        assert engine_url() == url
