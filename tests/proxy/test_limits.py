"""Floods, trickles, bombs and lies: bounded in memory and time, and nobody else notices."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from abliterated.proxy.framing import Head, read_head
from abliterated.proxy.payload import ZSTD, Payload
from abliterated.proxy.server import Steering
from abliterated.proxy.wiring import Timing
from engines import free_port
from proxy.corpus import CHAT, GET, NDJSON, VERSION, answer, post, request
from proxy.script import (
    DEADLINE,
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
from proxy.test_refusals import MALFORMED, status_of
from strangers import within

EVERYTHING = Steering(aliases=(("a", "b"),), observe=True)


def still_serves(server: ScriptedUpstream, running: Running) -> None:
    with within(1.0):
        mine, _ = converse(
            server, running.address, (Send(GET), Read(len(VERSION))), (Read(len(GET)), Send(VERSION), ReadAll())
        )
    assert mine.data == VERSION


@contextlib.contextmanager
def descriptors(wanted: int) -> Iterator[int]:
    """Raise the limit of open files as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield max(soft, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def apart(url: str, setting: str = "") -> Iterator[tuple[tuple[str, int], psutil.Process]]:
    """A proxy in a process of its own."""
    script = f"import resource, sys; {setting}\nfrom abliterated.proxy.alone import Proxy, run\n"
    script += "sys.exit(run(Proxy(*sys.argv[1:])))"
    address = ("127.0.0.1", free_port())
    process = subprocess.Popen([sys.executable, "-c", script, "{}:{}".format(*address), url])
    try:
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(address, DEADLINE).close()
                break
            assert time.monotonic() < deadline
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_10_000_idle_connections_cost_little_and_nobody_calls_the_upstream(server: ScriptedUpstream) -> None:
    raised = "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)"
    with descriptors(10_500) as most, apart(server.url, raised) as (address, process):
        if most < 10_500:
            pytest.skip(f"only {most} open files are allowed here")
        before = process.memory_info().rss
        clients: list[socket.socket] = []
        try:
            for _ in range(10_000):
                clients.append(socket.create_connection(address, DEADLINE))
            server.scripts.put((Read(len(GET)), Send(VERSION), ReadAll()))
            clients[0].sendall(GET)
            clients[0].settimeout(DEADLINE)
            with within(2):
                assert clients[0].recv(len(VERSION)) == VERSION
            assert (process.memory_info().rss - before) / len(clients) < 4_000
            assert server.heard.empty() and len(server.servers) == 1
        finally:
            for client in clients:
                client.close()


def test_slowloris_gets_408_in_time_and_the_others_notice_nothing(server: ScriptedUpstream) -> None:
    with proxy(server.url, timing=Timing(head_seconds=1.0, linger_seconds=DEADLINE)) as running:
        clients = [running.connect() for _ in range(300)]
        try:
            for beat in range(4):  # a byte now and then does not buy more time
                for client in clients:
                    with contextlib.suppress(OSError):
                        client.sendall((GET[:-2] + b"X: aaaa")[beat : beat + 1])
                still_serves(server, running)
            for client in clients:
                client.settimeout(DEADLINE)
                assert status_of(client.recv(4096)) == 408
        finally:
            for client in clients:
                client.close()


def test_out_of_descriptors_the_proxy_lives_and_serves_again(server: ScriptedUpstream) -> None:
    with apart(server.url, "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))") as (address, process):
        flood = [socket.create_connection(address, DEADLINE) for _ in range(150)]
        assert process.is_running()
        for client in flood:
            client.close()
        server.scripts.put((Read(len(GET)), Send(VERSION), ReadAll()))
        deadline = time.monotonic() + DEADLINE
        while True:  # those it closed for want of descriptors are gone; a new one is served
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError), socket.create_connection(address, DEADLINE) as client:
                client.settimeout(DEADLINE)
                client.sendall(GET)
                if client.recv(len(VERSION)) == VERSION:
                    break


@pytest.mark.parametrize("name", [name for name in MALFORMED if name.startswith(("chunk", "trailer", "last"))])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_malformed_body_that_is_held_never_goes_upstream(server: ScriptedUpstream, name: str, cut: int) -> None:
    sent = MALFORMED[name].replace(b"POST / ", b"POST /api/chat ")
    with proxy(server.url, steering=EVERYTHING) as running:
        heard = play(running.connect(), (Send(sent, cut), ReadAll()))
        assert status_of(heard.data) == 400 and heard.data.count(b"HTTP/1.1 ") == 1
        assert server.heard.empty()
        until(lambda: running.proxy.held_bytes == 0)


BOMBS = {
    "arrays": b"[" * 3_000_000,
    "objects": b'{"a":' * 700_000,
    "numbers": b"9" * 3_000_000,
    "quotes": b'"",' * 1_000_000,
    "escapes": b'"' + b"\\u0041" * 500_000,
    "spaces": b" " * 3_000_000,
    "keys": b'{"a":1,' + b'"a":1,' * 500_000,
    "names": b'{"model":"' + b"a" * 3_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_json_bomb_goes_on_as_it_came_and_holds_up_nobody(server: ScriptedUpstream, name: str) -> None:
    body = BOMBS[name] if BOMBS[name].startswith(b"{") else b'{"x":' + BOMBS[name]
    sent = post(b"/api/chat", body)
    with proxy(server.url, steering=EVERYTHING) as running:
        with within(5):
            _, theirs = converse(
                server, running.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
            )
        assert theirs.data == sent
        still_serves(server, running)
        until(lambda: running.proxy.held_bytes == 0)


@pytest.mark.skipif(ZSTD is None, reason="no zstd module here")
def test_a_zstd_bomb_is_not_unpacked_to_its_end(server: ScriptedUpstream) -> None:
    packed = ZSTD.compress(b'{"x":"' + bytes(1 << 27) + b'","model":"a"}')  # 128 MiB in some 4 kB
    sent = post(b"/v1/responses", packed, b"Content-Encoding: zstd\r\n")
    head = read_head(sent[: sent.index(b"\r\n\r\n") + 4])
    assert isinstance(head, Head)
    payload = Payload(head, 1000)
    assert len(payload.feed(packed)) <= 1001 and payload.overflowed
    with proxy(server.url, steering=EVERYTHING) as running:
        before = psutil.Process().memory_info().rss
        _, theirs = converse(
            server, running.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
        )
        assert theirs.data == sent
        assert psutil.Process().memory_info().rss - before < 120_000_000


LIES = {
    "longer than said": answer(b'{"error":"model not found"}', status=b"404 Not Found") + b"and more",
    "shorter than said": b"HTTP/1.1 404 Not Found\r\nContent-Length: 90\r\n\r\n" + b'{"error":"model not found"}',
    "two lengths": b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "no head at all": b'{"error":"model not found"}',
    "a head without end": b"HTTP/1.1 404 Not Found\r\nX: " + b"a" * 100_000,
    "an answer before the question": NDJSON,
    "not JSON": answer(b'{"error":"model not found"', status=b"404 Not Found"),
    "a negative length": b"HTTP/1.1 404 Not Found\r\nContent-Length: -5\r\n\r\n",
    "nonsense": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("cut", [0, 11])
def test_an_upstream_that_lies_about_a_missing_model_is_relayed_as_it_spoke(
    server: ScriptedUpstream, name: str, cut: int
) -> None:
    if cut and len(LIES[name]) > 20_000:
        cut = 4001
    sent = post(b"/api/chat", b'{"model":"qwen3-abliterated:8b"}')
    with proxy(server.url, steering=EVERYTHING) as running:
        mine, _ = converse(server, running.address, (Send(sent), ReadAll()), (Read(len(sent)), Send(LIES[name], cut)))
        assert mine.data == LIES[name]
        still_serves(server, running)


def test_a_body_longer_than_its_length_is_another_request_and_no_good_one(server: ScriptedUpstream) -> None:
    sent = request(b"POST /api/chat", b"Content-Length: %d\r\n" % len(CHAT), CHAT)
    with proxy(server.url, steering=EVERYTHING) as running:
        mine, theirs = converse(
            server,
            running.address,
            (Send(sent + b"surplus\r\n\r\n"), ReadAll()),
            (Read(len(sent)), Send(VERSION), ReadAll()),
        )
        assert theirs.data == sent and mine.data.startswith(VERSION + b"HTTP/1.1 400 ")
