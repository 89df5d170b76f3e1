"""Slow readers, large bodies and sudden departures: bounded memory, nothing lost, and the other side hears at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from abliterated.proxy.wiring import Timing
from proxy.corpus import GET, NDJSON, VERSION, answer, request
from proxy.script import (
    DEADLINE,
    Heard,
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
from strangers import crowding

MIB = 1 << 20


@pytest.fixture
def relay(server: ScriptedUpstream) -> Iterator[Running]:
    with proxy(server.url) as running:
        yield running


def fill(connection: socket.socket) -> int:
    """Send until nothing more is taken for a while."""
    connection.setblocking(False)
    sent, block = 0, b"z" * MIB
    while select.select([], [connection], [], 0.5)[1]:
        sent += connection.send(block)
    return sent


def test_a_client_that_does_not_read_stops_the_upstream(server: ScriptedUpstream, relay: Running) -> None:
    taken: list[int] = []

    def flood(connection: socket.socket) -> Heard:
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            taken.append(fill(connection))
        return Heard()

    server.scripts.put(flood)
    before = psutil.Process().memory_info().rss
    with relay.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(GET)
        server.heard.get(timeout=DEADLINE)
        (link,) = relay.proxy.links
        assert link.client.get_write_buffer_size() < MIB
    assert taken[0] < 64 * MIB  # the kernel's buffers, not ours
    assert psutil.Process().memory_info().rss - before < 16 * MIB


def test_an_upstream_that_does_not_read_stops_the_client(server: ScriptedUpstream, relay: Running) -> None:
    done = threading.Event()

    def deaf(connection: socket.socket) -> Heard:
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            done.wait(DEADLINE)
        return Heard()

    server.scripts.put(deaf)
    with relay.connect() as connection:
        connection.sendall(request(b"POST /b", b"Content-Length: 1000000000\r\n"))
        assert fill(connection) < 64 * MIB
        (link,) = relay.proxy.links
        assert link._upstream is not None and link._upstream.get_write_buffer_size() < MIB
        done.set()


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_64_mib_go_up_whole_in_bounded_memory(server: ScriptedUpstream, relay: Running, framing: str) -> None:
    block = os.urandom(MIB)
    piece = block if framing == "length" else b"%x\r\n" % MIB + block + b"\r\n"
    tail = b"" if framing == "length" else b"0\r\n\r\n"
    field = b"Content-Length: %d\r\n" % (64 * MIB) if framing == "length" else b"Transfer-Encoding: chunked\r\n"
    head = request(b"POST /api/blobs/sha256:0", field)
    expected = hashlib.sha256(head + piece * 64 + tail).hexdigest()
    total = len(head) + 64 * len(piece) + len(tail)

    def digest(connection: socket.socket) -> Heard:
        seen, count = hashlib.sha256(), 0
        with connection:
            while count < total and (data := connection.recv(MIB)):
                seen.update(data)
                count += len(data)
            connection.sendall(answer(b"", status=b"201 Created"))
        return Heard(seen.hexdigest().encode())

    server.scripts.put(digest)
    before = psutil.Process().memory_info().rss
    with relay.connect() as connection:
        connection.sendall(head)
        for _ in range(64):
            connection.sendall(piece)
        connection.sendall(tail)
        assert connection.recv(100).startswith(b"HTTP/1.1 201")
    assert server.heard.get(timeout=DEADLINE).data.decode() == expected
    assert psutil.Process().memory_info().rss - before < 32 * MIB


@pytest.mark.parametrize("farewell", ["half-close first, as Go", "close at once"])
def test_an_early_answer_to_a_64_mib_upload_reaches_the_client(
    server: ScriptedUpstream, relay: Running, farewell: str
) -> None:
    reply = answer(b'{"error":"exists"}', b"Connection: close\r\n")

    def early(connection: socket.socket) -> Heard:
        with connection:
            connection.settimeout(DEADLINE)
            connection.recv(65536)
            connection.sendall(reply)
            if farewell != "close at once":
                connection.shutdown(socket.SHUT_WR)
                select.select([], [], [], 0.2)
        return Heard()

    server.scripts.put(early)
    heard = Heard()
    with relay.connect() as connection:
        connection.settimeout(DEADLINE)
        connection.sendall(request(b"POST /api/blobs/sha256:0", b"Content-Length: %d\r\n" % (64 * MIB)))
        sent = 0
        try:
            while sent < 64 * MIB:
                if select.select([connection], [], [], 0)[0]:
                    break  # as clients do that watch for an early answer
                sent += connection.send(b"u" * MIB)
            heard = play(connection.dup(), (Read(len(reply)),))
        except ConnectionError:
            pass
    assert heard.data == reply
    assert sent < 64 * MIB


def test_the_upstream_hears_at_once_that_a_client_has_gone(server: ScriptedUpstream, relay: Running) -> None:
    delays: list[float] = []
    for kind in ("close", "reset") * 20:
        times: list[float] = []

        def listen(connection: socket.socket, times: list[float] = times) -> Heard:
            with connection:
                connection.settimeout(DEADLINE)
                connection.recv(65536)
                connection.sendall(NDJSON[:150])
                with contextlib.suppress(ConnectionError):
                    connection.recv(1)
                times.append(time.perf_counter())
            return Heard()

        server.scripts.put(listen)
        connection = relay.connect()
        connection.sendall(GET)
        play_until(connection, 150)
        if kind == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone = time.perf_counter()
        connection.close()
        server.heard.get(timeout=DEADLINE)
        delays.append(times[0] - gone)
    assert statistics.median(delays) < 0.02 * crowding(), delays  # how few milliseconds it is, `make bench` tells


def play_until(connection: socket.socket, count: int) -> None:
    connection.settimeout(DEADLINE)
    while count > 0:
        count -= len(connection.recv(count))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the kernel does not tell")
def test_a_client_that_closed_its_half_and_then_left_is_let_go_though_the_upstream_is_silent(
    server: ScriptedUpstream,
) -> None:
    heard, done = threading.Event(), threading.Event()

    def silent(connection: socket.socket) -> Heard:
        connection.settimeout(DEADLINE)
        while connection.recv(65536):
            pass
        heard.set()
        done.wait()
        connection.close()
        return Heard()

    server.scripts.put(silent)
    try:
        with proxy(server.url, timing=Timing(look_seconds=0.05)) as running:
            connection = running.connect()
            connection.sendall(GET)
            connection.shutdown(socket.SHUT_WR)
            assert heard.wait(DEADLINE) and running.proxy.links
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
            until(lambda: not running.proxy.links)
    finally:
        done.set()


def test_the_client_hears_a_reset_as_a_reset(server: ScriptedUpstream, relay: Running) -> None:
    """An answer that ends with the connection would else look whole."""

    def vanish(connection: socket.socket) -> Heard:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhalf of it")
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        return Heard()

    server.scripts.put(vanish)
    body = request(b"POST /x", b"Content-Length: 2\r\n", b"a")
    heard = play(relay.connect(), (Send(body), Read(29), Send(b"b"), ReadAll()))
    assert heard.ending == "reset" and heard.data.endswith(b"half of it")


def test_hundreds_of_connections_leave_nothing_behind(server: ScriptedUpstream, relay: Running) -> None:
    descriptors = psutil.Process().num_fds()
    for _ in range(300):
        mine, _ = converse(
            server, relay.address, (Send(GET), Read(len(VERSION))), (Read(len(GET)), Send(VERSION), ReadAll())
        )
        assert mine.data == VERSION
    deadline = time.monotonic() + DEADLINE
    while (relay.proxy.links or psutil.Process().num_fds() > descriptors + 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not relay.proxy.links
    assert psutil.Process().num_fds() <= descriptors + 2
    stats = relay.proxy.stats
    assert (stats.accepted, stats.requests, stats.in_flight) == (300, 300, 0)
    assert (stats.bytes_up, stats.bytes_down) == (300 * len(GET), 300 * len(VERSION))
