"""Runners that say nonsense, break off or are gone: what the engine says then, and that it goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from abliterated.engine import completion, options
from abliterated.engine.errors import RunnerGone
from abliterated.engine.service import Clock, Question, Service
from abliterated.shapes.talk import Message, Piece
from engine.conftest import LONG
from engine.running import Engine, engine, until, whole_answer

HI = [{"role": "user", "content": "hi"}]


@contextmanager
def instead(hurt: Engine, said: bytes) -> Iterator[None]:
    """Where the runner of `base` listens, somebody who says this, once, and hangs up."""
    hurt.ollama.generate("base", "")
    path = Path(json.loads(hurt.holding("base").cmdline()[-1])["socket"])
    aside = path.with_suffix(".aside")
    path.rename(aside)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(60)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            heard = b""
            while b"\r\n\r\n" not in heard:
                heard += connection.recv(1 << 16)
            head, _, body = heard.partition(b"\r\n\r\n")
            [length] = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            while len(body) < length:
                body += connection.recv(1 << 16)
            connection.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        listener.close()
        path.unlink()
        aside.rename(path)


def http(status: int, body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\n\r\n" % (status, length or len(body)) + body


def events(*told: bytes) -> bytes:
    return b"".join(b"data: " + event + b"\n\n" for event in told)


HELLO = b'{"choices": [{"delta": {"content": "hello"}}]}'
LISTED = b'{"choices": [{"delta": {"tool_calls": [{"function": {"name": "look", "arguments": "[1]"}}]}}]}'
STAYS = "Ask again; if it stays so, unload the model with keep_alive 0 first"


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (http(502, b"<html>"), 500, f"llama.cpp answered 502 without JSON. {STAYS}"),
        (http(503, b'{"error": "Loading model"}'), 503, "Loading model"),
        (http(200, events(LISTED, b'{"choices": [], "usage": {}}')), 500,
         "the model returned invalid tool call arguments for 'look': not an object. Ask again, or give the tool an "
         "object as its parameters"),
        (http(200, events(b"{broken")), 500, "internal error of the embedded engine. See its log"),
        (http(200, b""), 500, f"the answer broke off. {STAYS}"),
    ],
    ids=["no JSON", "a sentence", "a list for an object", "half an event", "nothing"],
)  # fmt: skip
def test_a_runner_that_says_nonsense(hurt: Engine, said: bytes, status: int, words: str) -> None:
    with instead(hurt, said):
        answer = hurt.http.post("/api/chat", json={"model": "base", "messages": HI})
    assert (answer.status_code, answer.json()) == (status, {"error": words})
    if "log" in words:
        until(lambda: "Traceback" in "".join(hurt.log) and "JSONDecodeError" in "".join(hurt.log))
    assert hurt.ollama.chat("base", HI).message.content == "a plain answer, nothing more"


def test_an_answer_that_breaks_off_ends_in_a_line_that_says_so(hurt: Engine) -> None:
    with instead(hurt, http(200, events(HELLO), length=5000)):
        answer = hurt.http.post("/api/chat", json={"model": "base", "messages": HI})
    first, last = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.status_code == 200 and first["message"]["content"] == "hello"
    assert last["error"].startswith("the answer broke off: ") and last["error"].endswith(STAYS)


def test_one_who_waits_as_the_engine_ends_is_told(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    with engine(tmp_path / "models") as ending:
        ending.create("endless", ggufs["endless"])
        with (
            ending.stalled_talk("endless", options={"num_ctx": LONG}),
            # Another context: the model must be loaded anew, which waits for the one that talks.
            ending.stalled_request("endless", options={"num_ctx": 512}) as waiting,
        ):
            assert ending.http.get("/api/version").status_code == 200
            ending.process.terminate()
            answer = whole_answer(waiting)
    assert b" 503 " in answer.splitlines()[0]
    assert b"the engine is shutting down. Ask again once it is back" in answer


@pytest.fixture
async def service(tmp_path: Path, hurt: Engine) -> Any:
    """What the engine's process is made of, here: so that a runner dies at a chosen moment."""
    shutil.copytree(hurt.models / "blobs", tmp_path / "models/blobs")
    folder = "manifests/registry.ollama.ai/library/base"
    shutil.copytree(hurt.models / folder, tmp_path / "models" / folder)
    made = Service(tmp_path / "models")
    yield made
    await made.pool.close()


async def test_a_runner_that_ended_before_it_was_asked(service: Service) -> None:
    model = service.model("base")
    async with service.pool.lease(service.want(model, {}), 0) as runner:
        assert runner.process
        runner.process.kill()
        await runner.ended.wait()
        with pytest.raises(RunnerGone) as gone:
            await completion.ask(runner, "/tokenize", {"content": "hi"})
    assert str(gone.value) == "llama runner process has terminated: signal: SIGKILL"


async def test_one_that_dies_as_it_is_asked_is_replaced_where_nothing_was_said(service: Service) -> None:
    model = service.model("base")
    await service.load(model, {}, None)

    async def ask() -> str:
        question = Question(model, "base", messages=[Message("user", "hi")], settings={"temperature": 0})
        events = [event async for event in service.answer(question, Clock())]
        return "".join(event.content for event in events if isinstance(event, Piece))

    async def embed() -> Any:
        return await service.embed(model, ["hi"], {}, options.KEEP_ALIVE, clock=Clock())

    async def killed(slot: bool, work: asyncio.Task[Any]) -> None:
        runner = service.pool.runners[model.path, slot]
        runner.socket.unlink()  # it can't be reached, and is not known to be dead
        async with asyncio.timeout(60):
            while not runner.users:
                await asyncio.sleep(0)
        assert runner.process
        runner.process.kill()

    asked = asyncio.create_task(ask())
    await killed(False, asked)
    assert await asked == "a plain answer, nothing more"

    await embed()
    asked = asyncio.create_task(embed())
    await killed(True, asked)
    with pytest.raises(RunnerGone, match=r"^llama runner process has terminated: signal: SIGKILL$"):
        await asked
