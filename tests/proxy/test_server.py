"""Starting, stopping and refusing to start; a restart loses nothing that was under way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from abliterate.contract.errors import AlreadyRunning, RecipeError
from abliterated.proxy.listen import Address, parse_listen, parse_upstream
from abliterated.proxy.server import Proxy, new_event_loop
from engines import free_port
from proxy.corpus import GET, NDJSON, VERSION, request
from proxy.script import (
    DEADLINE,
    Heard,
    Read,
    ReadAll,
    Running,
    ScriptedUpstream,
    Send,
    connect,
    converse,
    play,
    proxy,
)


def test_addresses_are_read_as_people_write_them() -> None:
    assert parse_listen("127.0.0.1:11434") == Address("127.0.0.1", 11434)
    assert parse_listen("[::1]:11434") == Address("::1", 11434)
    assert parse_listen(":11434") == Address("", 11434)
    assert parse_listen("unix:/run/x") == Address(path="/run/x")
    assert parse_upstream("http://127.0.0.1:11435/") == Address("127.0.0.1", 11435)
    assert parse_upstream("http://[::1]:11435") == Address("::1", 11435)
    assert parse_upstream("http://ollama.lan") == Address("ollama.lan", 80)
    assert parse_upstream("unix:/run/y") == Address(path="/run/y")
    assert [str(parse_listen(text)) for text in ("[::1]:1", ":1", "unix:/x")] == ["[::1]:1", ":1", "unix:/x"]
    assert parse_listen("localhost:1").loopback and parse_listen("127.9.9.9:1").loopback
    assert not parse_listen(":1").loopback and not parse_listen("0.0.0.0:1").loopback
    assert not parse_listen("box.lan:1").loopback


@pytest.mark.parametrize(
    "text", ["", "11434", "127.0.0.1", "::1:80", "a b:1", "x:99999", "unix:", "unix:rel", "http://x:1"]
)
def test_what_is_no_listen_address_says_how_to_write_one(text: str) -> None:
    with pytest.raises(RecipeError, match=r"127\.0\.0\.1:11434|unix:/"):
        parse_listen(text)


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1:1", "https://x:1", "http://", "http://x:0", "http://x:1/path", "http://u@x:1"]
)
def test_what_is_no_upstream_says_how_to_write_one(text: str) -> None:
    with pytest.raises(RecipeError, match=r"http://127\.0\.0\.1:11435"):
        parse_upstream(text)


@pytest.mark.parametrize("listen", [":0", "0.0.0.0:0", "[::]:0", "192.168.1.1:0"])
def test_listening_beyond_loopback_needs_to_be_asked_for(listen: str) -> None:
    with pytest.raises(RecipeError, match="no password"):
        Proxy(listen, "http://127.0.0.1:1")
    assert Proxy(listen, "http://127.0.0.1:1", allow_remote=True)


async def test_a_taken_port_is_named_with_its_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AlreadyRunning, match=f"{address} is taken.*OLLAMA_HOST"):
            await Proxy(address, "http://127.0.0.1:1").start()


async def test_a_unix_socket_in_use_is_not_stolen_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "front"
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(str(path))
        holder.listen()
        with pytest.raises(AlreadyRunning, match="is taken"):
            await Proxy(f"unix:{path}", "http://127.0.0.1:1").start()
    running = Proxy(f"unix:{path}", "http://127.0.0.1:1")
    await running.start()
    await running.close(0)
    assert not path.exists()


@pytest.mark.parametrize("called", ["127.0.0.1", "localhost", "0.0.0.0"])
@pytest.mark.parametrize("listening", ["127.0.0.1", ""])
async def test_the_proxy_refuses_to_be_its_own_upstream(listening: str, called: str) -> None:
    port = free_port()
    with pytest.raises(RecipeError, match="own upstream"):
        await Proxy(f"{listening}:{port}", f"http://{called}:{port}", allow_remote=True).start()
    socket.create_server(("127.0.0.1", port)).close()  # and lets the port go


async def test_the_proxy_refuses_its_own_unix_socket(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()  # a socket's path must be short
    with pytest.raises(RecipeError, match="own upstream"):
        await Proxy(f"unix:{tmp_path}/s", f"unix:{tmp_path}/d/../s").start()


def test_several_addresses_and_given_sockets_serve_together(server: ScriptedUpstream) -> None:
    given = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{given.getsockname()[1]}"
    with proxy(server.url, "localhost:0", sockets=[given]) as running:
        assert address in running.proxy.addresses and len(running.proxy.addresses) >= 2
        for name in running.proxy.addresses:
            mine, _ = converse(
                server, name, (Send(GET), Read(len(VERSION))), (Read(len(GET)), Send(VERSION), ReadAll())
            )
            assert mine.data == VERSION


def test_a_shared_socket_keeps_its_backlog_for_the_next_proxy(server: ScriptedUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as shared:
        first = proxy(server.url, "", sockets=[shared.dup()])
        with first:
            pass
        with connect(f"127.0.0.1:{shared.getsockname()[1]}") as waiting:
            waiting.sendall(GET)  # nobody accepts now
            server.scripts.put((Read(len(GET)), Send(VERSION), ReadAll()))
            with proxy(server.url, "", sockets=[shared.dup()]):
                waiting.settimeout(DEADLINE)
                assert waiting.recv(12) == VERSION[:12]


def test_a_drain_lets_streams_end_and_turns_newcomers_away(server: ScriptedUpstream) -> None:
    go = threading.Event()

    def stream(connection: socket.socket) -> Heard:
        with connection:
            connection.recv(65536)
            connection.sendall(NDJSON[:150])
            go.wait(DEADLINE)
            connection.sendall(NDJSON[150:])
            return play(connection, (ReadAll(),))

    server.scripts.put(stream)
    with proxy(server.url) as running:
        streaming, idle = running.connect(), running.connect()
        with streaming, idle:
            streaming.settimeout(DEADLINE)
            streaming.sendall(GET)
            heard = b""
            while len(heard) < 150:
                heard += streaming.recv(150 - len(heard))
            assert running.proxy.stats.in_flight == 1
            closing = threading.Thread(target=running.close, args=(DEADLINE,))
            closing.start()
            idle.settimeout(DEADLINE)
            assert idle.recv(1) == b""  # idle connections are let go
            with pytest.raises(OSError):
                connect(running.address).close()
            assert closing.is_alive()
            go.set()
            while data := streaming.recv(65536):
                heard += data
            assert heard == NDJSON
            closing.join(DEADLINE)
            assert not closing.is_alive()


def test_while_draining_an_answer_says_that_the_connection_will_close(server: ScriptedUpstream) -> None:
    go = threading.Event()

    def slow(connection: socket.socket) -> Heard:
        connection.recv(65536)
        go.wait(DEADLINE)
        return play(connection, (Send(VERSION), ReadAll()))

    server.scripts.put(slow)
    with proxy(server.url) as running, running.connect() as waiting:
        waiting.sendall(GET)
        while not running.proxy.stats.in_flight:
            time.sleep(0.005)
        closing = threading.Thread(target=running.close, args=(DEADLINE,))
        closing.start()
        while not running.proxy.draining:
            time.sleep(0.005)
        go.set()
        heard = play(waiting.dup(), (ReadAll(),))
        closing.join(DEADLINE)
    assert (
        heard.data == VERSION.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") and heard.ending == "end of file"
    )


def test_what_does_not_end_within_the_drain_is_cut(server: ScriptedUpstream) -> None:
    server.scripts.put((Read(len(GET)), Send(NDJSON[:50]), ReadAll()))
    with proxy(server.url) as running, running.connect() as streaming:
        streaming.sendall(GET)
        assert streaming.recv(1)
        begin = time.monotonic()
        running.close(0.5)  # within the patience of `close`
        assert time.monotonic() - begin > 0.4
    assert server.heard.get(timeout=DEADLINE).data == GET


def test_restarts_on_a_shared_socket_lose_no_request(server: ScriptedUpstream) -> None:
    """Clients with kept connections and with one for each request, while one proxy takes over from another."""

    def forever(connection: socket.socket) -> Heard:
        with connection:
            while connection.recv(65536):
                connection.sendall(VERSION)
        return Heard()

    for _ in range(20000):
        server.scripts.put(forever)
    stop, answered, failed = threading.Event(), [0], list[str]()

    def hammer(address: str, kept: bool) -> None:
        connection: socket.socket | None = None
        while not stop.is_set():
            try:
                connection = connection or connect(address)
                connection.sendall(GET)
                heard = b""
                while not heard.endswith(b'"}'):
                    data = connection.recv(65536)
                    if not data:
                        raise ConnectionError("closed before the answer")
                    heard += data
                answered[0] += 1
                if not kept or b"Connection: close" in heard:
                    connection.close()
                    connection = None
            except OSError as error:
                failed.append(repr(error))
                connection = None
        if connection is not None:
            connection.close()

    with socket.create_server(("127.0.0.1", 0), backlog=256) as shared:
        address = f"127.0.0.1:{shared.getsockname()[1]}"
        current = Running("", server.url, new_event_loop, {"sockets": [shared.dup()]})
        clients = [threading.Thread(target=hammer, args=(address, number % 2 == 0)) for number in range(4)]
        for client in clients:
            client.start()
        for _ in range(4):
            reached = answered[0] + 200
            deadline = time.monotonic() + DEADLINE
            while answered[0] < reached and time.monotonic() < deadline:
                time.sleep(0.01)
            successor = Running("", server.url, new_event_loop, {"sockets": [shared.dup()]})
            current.close(DEADLINE)
            current = successor
        stop.set()
        for client in clients:
            client.join(DEADLINE)
        current.close(1.0)
    assert failed == [] and answered[0] >= 800


def test_the_stats_count_what_passes(server: ScriptedUpstream) -> None:
    with proxy(server.url) as running:
        assert running.proxy.stats.accepted == 0
        converse(
            server,
            running.address,
            (Send(GET * 2), Read(2 * len(VERSION))),
            (Read(2 * len(GET)), Send(VERSION * 2), ReadAll()),
        )
        stats = running.proxy.stats
        assert (stats.accepted, stats.requests, stats.in_flight) == (1, 2, 0)


def test_beyond_loopback_the_guard_stands_here(server: ScriptedUpstream) -> None:
    with proxy(server.url, "0.0.0.0:0", allow_remote=True, allowed_hosts=["box.example.org"]) as running:
        address = running.address.replace("0.0.0.0", "127.0.0.1")

        def ask(host: bytes, origin: bytes = b"") -> tuple[Heard, Heard]:
            head = (
                b"GET / HTTP/1.1\r\nHost: "
                + host
                + b"\r\n"
                + (b"Origin: " + origin + b"\r\n" if origin else b"")
                + b"\r\n"
            )
            return converse(server, address, (Send(head), Read(len(VERSION))), (Read(30), Send(VERSION), ReadAll()))

        assert ask(b"192.168.1.7:11434")[1].data == b"GET / HTTP/1.1\r\nHost: 192.168.1.7:11434\r\n\r\n"
        new = b"localhost:" + server.url.rpartition(":")[2].encode()
        same = ask(b"box.example.org:11434", b"http://box.example.org:11434")[1].data
        assert same == b"GET / HTTP/1.1\r\nHost: " + new + b"\r\nOrigin: http://" + new + b"\r\n\r\n"
        other = ask(b"box.example.org", b"http://evil.example")[1].data
        assert other == b"GET / HTTP/1.1\r\nHost: " + new + b"\r\nOrigin: http://evil.example\r\n\r\n"
        heard = play(connect(address), (Send(request(b"GET /").replace(b"localhost", b"evil.example")), ReadAll()))
        assert heard.data.startswith(b"HTTP/1.1 403 ") and heard.data.endswith(b"\r\n\r\n")
        assert server.heard.empty()


def test_run_serves_in_the_foreground_until_a_signal(server: ScriptedUpstream) -> None:
    port = free_port()
    script = "import sys; from abliterated.proxy.alone import Proxy, run; sys.exit(run(Proxy(*sys.argv[1:])))"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", script, f"127.0.0.1:{port}", server.url], env=os.environ)
        try:
            deadline = time.monotonic() + DEADLINE
            while time.monotonic() < deadline:
                try:
                    mine, _ = converse(
                        server,
                        f"127.0.0.1:{port}",
                        (Send(GET), Read(len(VERSION))),
                        (Read(len(GET)), Send(VERSION), ReadAll()),
                    )
                    break
                except ConnectionRefusedError:
                    server.scripts.get_nowait()
                    time.sleep(0.02)
            assert mine.data == VERSION
            process.send_signal(number)
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            process.wait()
