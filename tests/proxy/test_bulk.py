"""Long bodies go by unseen, through one buffer: whole, in order, and nothing behind them is taken for theirs."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from abliterated.proxy import bulk
from abliterated.proxy.server import new_event_loop
from proxy.corpus import GET, NDJSON, VERSION, answer, chunk, post, request
from proxy.script import (
    DEADLINE,
    HalfClose,
    Heard,
    Read,
    ReadAll,
    Reset,
    Running,
    ScriptedUpstream,
    Send,
    converse,
    play,
    proxy,
    until,
)

BODY = random.Random(1).randbytes(bulk.LEAST * 3 + 12_345)
UPLOAD = post(b"/api/blobs/sha256:00", BODY)
CREATED = answer(b"", status=b"201 Created")


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def factory(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return asyncio.new_event_loop if request.param == "asyncio" else new_event_loop


@pytest.fixture
def relay(server: ScriptedUpstream, factory: Callable[[], Any]) -> Iterator[Running]:
    with proxy(server.url, factory=factory) as running:
        yield running


CONVERSATIONS = {
    "an upload and what follows": (
        [Send(UPLOAD), Read(len(CREATED)), Send(GET), Read(len(VERSION)), Send(UPLOAD), Read(len(CREATED))],
        [Read(len(UPLOAD)), Send(CREATED), Read(len(GET)), Send(VERSION), Read(len(UPLOAD)), Send(CREATED), ReadAll()],
    ),
    "all sent at once": (
        [Send(UPLOAD + GET + UPLOAD), Read(2 * len(CREATED) + len(VERSION))],
        [Read(2 * len(UPLOAD) + len(GET)), Send(CREATED + VERSION + CREATED), ReadAll()],
    ),
    "in small pieces": (
        [Send(UPLOAD, 10_007), Read(len(CREATED))],
        [Read(len(UPLOAD)), Send(CREATED), ReadAll()],
    ),
    "an answer that comes while it is sent": (
        [Send(UPLOAD[:-9]), Read(len(NDJSON)), Send(UPLOAD[-9:]), Read(len(VERSION))],
        [Read(len(UPLOAD) - 9), Send(NDJSON), Read(9), Send(VERSION), ReadAll()],
    ),
    "a body that never comes whole": (
        [Send(UPLOAD[:-9]), HalfClose(), ReadAll()],
        [Read(len(UPLOAD) - 9), ReadAll()],
    ),
    "a client that breaks off": ([Send(UPLOAD[:-9]), Read(1), Reset()], [Read(len(UPLOAD) - 9), Send(b"H"), ReadAll()]),
    "in chunks": (
        [Send(request(b"POST /api/blobs/a", b"Transfer-Encoding: chunked\r\n", chunk(BODY)) + GET), Read(len(VERSION))],
        [Read(len(request(b"POST /api/blobs/a", b"Transfer-Encoding: chunked\r\n", chunk(BODY)) + GET)), Send(VERSION)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_long_body_is_the_same_directly_and_through_the_proxy(
    server: ScriptedUpstream, relay: Running, name: str
) -> None:
    client, behind = CONVERSATIONS[name]
    direct = converse(server, server.url, client, behind)
    relayed = converse(server, relay.address, client, behind)
    for one, other in zip(relayed, direct, strict=True):
        assert (len(one.data), one.ending) == (len(other.data), other.ending)
        assert hashlib.sha256(one.data).digest() == hashlib.sha256(other.data).digest()


def test_an_upstream_that_takes_little_at_a_time_gets_it_unspoiled(server: ScriptedUpstream, relay: Running) -> None:
    def slow(connection: socket.socket) -> Heard:
        heard, digest = 0, hashlib.sha256()
        with connection:
            while heard < len(UPLOAD):
                piece = connection.recv(min(8_191, len(UPLOAD) - heard))
                heard += len(piece)
                digest.update(piece)
            connection.sendall(CREATED)
            return Heard(digest.digest(), str(len(connection.recv(1))))

    server.scripts.put(slow)
    mine = play(relay.connect(), [Send(UPLOAD), Read(len(CREATED)), HalfClose()])
    assert mine.data == CREATED
    assert server.heard.get(timeout=DEADLINE) == Heard(hashlib.sha256(UPLOAD).digest(), "0")
    until(lambda: relay.proxy.stats.connections == 0)
    assert relay.proxy.stats.bytes_up == len(UPLOAD)


def test_an_upstream_that_dies_within_it_is_heard_of(server: ScriptedUpstream, relay: Running) -> None:
    server.scripts.put([Read(len(UPLOAD) // 2), Reset()])
    mine = play(relay.connect(), [Send(UPLOAD[:-9]), ReadAll()])
    assert mine.ending == "reset" and mine.data == b""
    until(lambda: relay.proxy.stats.connections == 0)
