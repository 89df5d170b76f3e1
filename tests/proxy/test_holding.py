"""While a job has the device inference waits or is turned away, all else goes through; and the seam for help."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from abliterated.proxy.assist import Asked, Outlet
from abliterated.proxy.marks import SERIES_LIMIT, Tally
from abliterated.proxy.payload import ZSTD
from abliterated.proxy.server import Steering
from proxy.corpus import CHAT, GET, NDJSON, VERSION, answer, chunk, post, request
from proxy.script import (
    DEADLINE,
    HalfClose,
    Read,
    ReadAll,
    Running,
    ScriptedUpstream,
    Send,
    converse,
    play,
    proxy,
    until,
)

SENT = post(b"/api/chat", CHAT)


def within(running: Running, call: Callable[[], Any]) -> Any:
    """Run `call` in the proxy's own thread."""
    found: list[Any] = []
    done = threading.Event()

    def run() -> None:
        found.append(call())
        done.set()

    running.loop.call_soon_threadsafe(run)
    assert done.wait(DEADLINE)
    return found[0]


def held(running: Running, busy: str = "hold", **more: Any) -> None:
    within(running, lambda: running.proxy.change(busy=busy, **more))


def test_an_inference_request_waits_for_the_device_and_then_goes_on_as_it_came(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running)
        server.scripts.put((Read(len(SENT + GET)), Send(NDJSON + VERSION), ReadAll()))
        with running.connect() as connection:
            connection.sendall(SENT + GET)  # what is pipelined behind it waits its turn
            until(lambda: len(running.proxy.waiting) == 1)
            assert server.heard.empty() and running.proxy.stats.in_flight == 1
            held(running, "share")
            mine = play(connection, (Read(len(NDJSON + VERSION)),))
        assert mine.data == NDJSON + VERSION
        assert server.heard.get(timeout=DEADLINE).data == SENT + GET
        assert 'held_total{route="/api/chat",model="qwen3:8b"} 1' in running.proxy.tally.text()
        until(lambda: running.proxy.held_bytes == 0)


@pytest.mark.parametrize("sent", [GET, post(b"/api/show", b'{"model":"m"}'), post(b"/api/create", b'{"model":"m"}')])
@pytest.mark.parametrize("busy", ["hold", "reject"])
def test_what_needs_no_device_goes_on_meanwhile(server: ScriptedUpstream, sent: bytes, busy: str) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running, busy)
        mine, theirs = converse(
            server, running.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
        )
        assert (mine.data, theirs.data) == (VERSION, sent)


def test_a_cloud_model_needs_no_device_here(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running, "reject")
        sent = post(b"/api/chat", b'{"model":"gpt-oss:120b-cloud"}')
        mine, _ = converse(
            server, running.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
        )
        assert mine.data == VERSION


@pytest.mark.parametrize(
    ("path", "pick"),
    [
        (b"/api/chat", lambda said: said["error"]),
        (b"/v1/chat/completions", lambda said: said["error"]["message"]),
        (b"/v1/messages", lambda said: said["error"]["message"]),
    ],
)
@pytest.mark.parametrize("body", [CHAT, b"not JSON", b"[1]"])
def test_rejected_requests_get_503_with_retry_after_in_the_shape_of_their_api(
    server: ScriptedUpstream, path: bytes, pick: Callable[[Any], str], body: bytes
) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running, "reject", retry_after=77)
        with running.connect() as connection:
            mine = play(connection, (Send(post(path, body)), ReadAll()))
        head, _, said = mine.data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"\r\nRetry-After: 77\r\n" in head
        assert "try again" in pick(json.loads(said)) and mine.ending == "end of file"
        assert server.heard.empty()


def test_the_wait_is_bounded(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering(hold_seconds=0.1)) as running:
        held(running)
        with running.connect() as connection:
            mine = play(connection, (Send(SENT), ReadAll()))
        assert mine.data.startswith(b"HTTP/1.1 503 ")
        until(lambda: not running.proxy.waiting and running.proxy.held_bytes == 0)


@pytest.mark.parametrize("steps", [(HalfClose(), ReadAll()), ()], ids=["half-close", "gone"])
def test_a_client_that_leaves_while_it_waits_is_forgotten_and_nobody_else_hears_of_it(
    server: ScriptedUpstream, steps: tuple[Any, ...]
) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running)
        with running.connect() as connection:
            connection.sendall(SENT)
            until(lambda: len(running.proxy.waiting) == 1)
            play(connection, steps)
        until(lambda: not running.proxy.waiting and not running.proxy.links)
        assert server.heard.empty()
        until(lambda: running.proxy.held_bytes == 0)


def test_a_connection_whose_upstream_leaves_while_a_request_waits_gets_another(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering()) as running:
        server.scripts.put((Read(len(GET)), Send(VERSION)))  # and closes
        server.scripts.put((Read(len(SENT)), Send(NDJSON), ReadAll()))
        with running.connect() as connection:
            connection.settimeout(DEADLINE)
            held(running)
            connection.sendall(GET + SENT)
            assert connection.recv(len(VERSION)) == VERSION
            assert server.heard.get(timeout=DEADLINE).data == GET
            until(lambda: all(link._upstream is None for link in running.proxy.links))
            held(running, "share")
            assert play(connection, (Read(len(NDJSON)),)).data == NDJSON


def test_a_body_that_never_ends_waits_within_its_limit(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering()) as running:
        held(running)
        head = request(b"POST /api/chat", b"Content-Length: 500000000\r\n", b'{"model":"m","images":["')
        with running.connect() as connection:
            connection.settimeout(0.5)
            connection.sendall(head)
            with pytest.raises(TimeoutError):  # we stop reading
                while True:
                    connection.sendall(b"A" * 1_000_000)
            assert running.proxy.held_bytes < 40_000_000
        held(running, "share")
        until(lambda: not running.proxy.links)


def test_many_held_bodies_together_are_bounded(server: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterated.proxy.gate.HELD_TOTAL", 100_000)
    steering = Steering(aliases=(("a", "b"),))
    with proxy(server.url, steering=steering) as running:
        body = b'{"images":["' + b"A" * 200_000 + b'"],"model":"a"}'
        sent = post(b"/api/chat", body)
        _, theirs = converse(
            server, running.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
        )
        assert theirs.data == sent  # verbatim: the name was not waited for
        until(lambda: running.proxy.held_bytes == 0)


# --- the seam for help ----------------------------------------------------------------------------------------------

ASKED = post(b"/api/chat", b'{"model":"qwen3-abliterated:8b","tools":[]}')
SAID = answer(b'{"message":{"content":"with help"}}')


@pytest.fixture
def assisted(server: ScriptedUpstream) -> Iterator[Callable[[Callable[[Asked, Outlet], Awaitable[bool]]], Running]]:
    with proxy(server.url, steering=Steering(observe=True)) as running:

        def with_assistant(assistant: Callable[[Asked, Outlet], Awaitable[bool]]) -> Running:
            def arm() -> None:
                running.proxy.assistant = assistant
                running.proxy.change(assist=True)

            within(running, arm)
            return running

        yield with_assistant


Arm = Callable[[Callable[[Asked, Outlet], Awaitable[bool]]], Running]


@pytest.mark.parametrize("framing", ["length", "chunked", "zstd"])
def test_an_assistant_gets_the_whole_request_and_answers_it_and_the_connection_goes_on(
    server: ScriptedUpstream, assisted: Arm, framing: str
) -> None:
    seen: list[Asked] = []

    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        seen.append(asked)
        for start in range(0, len(SAID), 10):
            await outlet.write(SAID[start : start + 10])
        return True

    running = assisted(assistant)
    body = b'{"model":"qwen3-abliterated:8b","tools":[]}'
    sent = ASKED
    if framing == "chunked":
        sent = request(b"POST /api/chat", b"Transfer-Encoding: chunked\r\n", chunk(body[:9], body[9:]))
    elif framing == "zstd":
        if ZSTD is None:
            pytest.skip("no zstd module here")
        sent = post(b"/api/chat", ZSTD.compress(body), b"Content-Encoding: zstd\r\n")
    server.scripts.put((Read(len(GET)), Send(VERSION), Read(len(GET)), Send(VERSION), ReadAll()))
    with running.connect() as connection:
        # Between two requests for the upstream, pipelined: answers come in the order of the questions.
        mine = play(connection, (Send(GET + sent + GET), Read(len(VERSION + SAID + VERSION))))
    assert mine.data == VERSION + SAID + VERSION
    assert (seen[0].content, seen[0].model, seen[0].route) == (body, "qwen3-abliterated:8b", "/api/chat")
    assert seen[0].upstream in server.url
    until(lambda: "assisted_total" in running.proxy.tally.text())


def test_an_assistants_answer_too_tells_its_client_that_the_server_stops(
    server: ScriptedUpstream, assisted: Arm
) -> None:
    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        await outlet.write(SAID)
        return True

    running = assisted(assistant)
    within(running, lambda: setattr(running.proxy, "draining", True))
    with running.connect() as connection:
        mine = play(connection, (Send(ASKED), ReadAll()))
    within(running, lambda: setattr(running.proxy, "draining", False))
    status, _, rest = SAID.partition(b"\r\n")
    assert (mine.data, mine.ending) == (status + b"\r\nConnection: close\r\n" + rest, "end of file")


def test_an_assistant_that_declines_has_changed_nothing(server: ScriptedUpstream, assisted: Arm) -> None:
    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        return False

    running = assisted(assistant)
    mine, theirs = converse(
        server, running.address, (Send(ASKED), Read(len(NDJSON))), (Read(len(ASKED)), Send(NDJSON), ReadAll())
    )
    assert (mine.data, theirs.data) == (NDJSON, ASKED)


def test_ordinary_models_are_not_offered_to_the_assistant(server: ScriptedUpstream, assisted: Arm) -> None:
    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        raise AssertionError

    running = assisted(assistant)
    mine, _ = converse(
        server, running.address, (Send(SENT), Read(len(NDJSON))), (Read(len(SENT)), Send(NDJSON), ReadAll())
    )
    assert mine.data == NDJSON


@pytest.mark.parametrize("late", [False, True])
def test_an_assistant_that_fails_gives_an_error_or_a_cut_connection_never_half_an_answer(
    server: ScriptedUpstream, assisted: Arm, late: bool
) -> None:
    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        if late:
            await outlet.write(SAID[:30])
        raise RuntimeError("planned")

    running = assisted(assistant)
    with running.connect() as connection:
        mine = play(connection, (Send(ASKED), ReadAll()))
    if late:
        assert not mine.data.endswith(SAID[-5:])
    else:
        assert mine.data.startswith(b"HTTP/1.1 500 ") and b"assistant failed" in mine.data


def test_an_assistant_hears_at_once_that_its_client_has_left_and_waits_for_a_slow_one(
    server: ScriptedUpstream, assisted: Arm
) -> None:
    started, ended = threading.Event(), threading.Event()
    written = [0]

    async def assistant(asked: Asked, outlet: Outlet) -> bool:
        started.set()
        try:
            while True:
                await outlet.write(b"x" * 65536)
                written[0] += 65536
                await asyncio.sleep(0)
        finally:
            ended.set()

    running = assisted(assistant)
    with running.connect() as connection:
        connection.sendall(ASKED)
        assert started.wait(DEADLINE)
        before = -1
        while written[0] != before:  # it stops when nobody reads
            before = written[0]
            ended.wait(0.2)
        assert written[0] < 50_000_000 and not ended.is_set()
    assert ended.wait(DEADLINE)
    until(lambda: not running.proxy.links)
    until(lambda: running.proxy.held_bytes == 0)


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_kept_by_route_and_model_with_tokens_as_the_answer_counts_them(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering(observe=True)) as running:
        last = b'{"model":"m","done":true,"prompt_eval_count":7,"eval_count":42}\n'
        reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b'{"done":false}\n', last)
        for _ in range(3):
            converse(server, running.address, (Send(SENT), Read(len(reply))), (Read(len(SENT)), Send(reply), ReadAll()))
        converse(server, running.address, (Send(SENT),), (Read(len(SENT)),))  # no answer at all
        until(lambda: not running.proxy.links)
        text = running.proxy.tally.text()
    labels = 'route="/api/chat",model="qwen3:8b"'
    assert f'abliterated_proxy_requests_total{{{labels},status="200"}} 3' in text
    assert f'abliterated_proxy_requests_total{{{labels},status="0"}} 1' in text
    assert f"abliterated_proxy_tokens_total{{{labels}}} 126" in text
    assert f'abliterated_proxy_first_byte_seconds_bucket{{{labels},le="+Inf"}} 3' in text
    assert f"abliterated_proxy_duration_seconds_count{{{labels}}} 4" in text


def test_made_up_names_do_not_grow_the_figures_without_end() -> None:
    tally = Tally()
    for number in range(SERIES_LIMIT * 3):
        tally.of("/api/chat", f"m{number}").held += 1
    assert len(tally.series) == SERIES_LIMIT + 1
    assert tally.series[("/api/chat", "other")].held == SERIES_LIMIT * 2
    tally.of("/api/chat", 'quote"\n').held += 1
    assert '\n"' not in tally.text()


def test_the_access_log_has_a_line_for_each_exchange(server: ScriptedUpstream, tmp_path: Any) -> None:
    path = tmp_path / "access.log"
    with proxy(server.url, steering=Steering(access_log=str(path))) as running:
        for sent, reply in ((GET, VERSION), (GET, VERSION), (SENT, NDJSON)):
            converse(server, running.address, (Send(sent), Read(len(reply))), (Read(len(sent)), Send(reply), ReadAll()))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["method"], line["target"], line["status"], line["bytes"]) for line in lines] == [
        ("GET", "/api/version", 200, len(VERSION)),
        ("GET", "/api/version", 200, len(VERSION)),
        ("POST", "/api/chat", 200, len(NDJSON)),
    ]
    assert lines[2]["model"] == "qwen3:8b" and lines[2]["client"].startswith("127.0.0.1:")
