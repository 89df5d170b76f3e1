"""What is not HTTP, or lies about itself, gets a clear answer and a clean close, and none of it goes upstream."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from abliterated.proxy.wiring import Timing
from proxy.corpus import GET, VERSION, chunk, post, request
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

CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
def relay(server: ScriptedUpstream) -> Iterator[Running]:
    with proxy(server.url, timing=Timing(linger_seconds=DEADLINE)) as running:
        yield running


@pytest.fixture
def impatient(server: ScriptedUpstream) -> Iterator[Running]:
    with proxy(server.url, timing=Timing(head_seconds=0.3, linger_seconds=DEADLINE)) as running:
        yield running


MALFORMED = {
    "two lengths": request(b"POST /", b"Content-Length: 3\r\nContent-Length: 4\r\n", b"abcd"),
    "the same length twice": request(b"POST /", b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc"),
    "length and chunked": request(b"POST /", b"Content-Length: 3\r\n" + CHUNKED, chunk(b"abc")),
    "chunked and length": request(b"POST /", CHUNKED + b"Content-Length: 3\r\n", chunk(b"abc")),
    "chunked twice": request(b"POST /", CHUNKED * 2, chunk(b"abc")),
    "gzip, chunked": request(b"POST /", b"Transfer-Encoding: gzip, chunked\r\n", chunk(b"abc")),
    "chunked, identity": request(b"POST /", b"Transfer-Encoding: chunked, identity\r\n", chunk(b"abc")),
    "xchunked": request(b"POST /", b"Transfer-Encoding: xchunked\r\n", chunk(b"abc")),
    "chunked with a vertical tab": request(b"POST /", b"Transfer-Encoding: \x0bchunked\r\n", chunk(b"abc")),
    "identity": request(b"POST /", b"Transfer-Encoding: identity\r\n"),
    "chunked in HTTP/1.0": request(b"POST /", CHUNKED, chunk(b"abc")).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "space before the colon": request(b"POST /", b"Transfer-Encoding : chunked\r\n", chunk(b"abc")),
    "space before the length's colon": request(b"POST /", b"Content-Length : 3\r\n", b"abc"),
    "a folded line": request(b"GET /", b"X-A: b\r\n c\r\n"),
    "a folded length": request(b"POST /", b"Content-Length:\r\n 3\r\n", b"abc"),
    "a folded first line": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    "empty lines without end": b"\r\n" * 33 + GET,
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: localhost\r\n\r\n",
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "bare LF in the header": request(b"GET /", b"X: a\nTransfer-Encoding: chunked\r\n"),
    "bare CR in the header": request(b"GET /", b"X: a\rTransfer-Encoding: chunked\r\n"),
    "NUL in a value": request(b"GET /", b"X: a\x00b\r\n"),
    "control character in a value": request(b"GET /", b"X: a\x01b\r\n"),
    "a negative length": request(b"POST /", b"Content-Length: -1\r\n"),
    "a signed length": request(b"POST /", b"Content-Length: +3\r\n", b"abc"),
    "a hexadecimal length": request(b"POST /", b"Content-Length: 0x3\r\n", b"abc"),
    "a list of lengths": request(b"POST /", b"Content-Length: 3, 3\r\n", b"abc"),
    "an empty length": request(b"POST /", b"Content-Length:\r\n"),
    "an endless length": request(b"POST /", b"Content-Length: 99999999999999999999\r\n", b"abc"),
    "no name": request(b"GET /", b": x\r\n"),
    "no colon": request(b"GET /", b"nonsense\r\n"),
    "a name with a space": request(b"GET /", b"X Y: z\r\n"),
    "a name beyond ASCII": request(b"GET /", b"X\xff: z\r\n"),
    "two hosts": request(b"GET /", b"Host: other\r\n"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "a target with a space": request(b"GET /a b"),
    "a target with a control character": request(b"GET /\x01"),
    "two spaces": request(b"GET  /"),
    "no target": b"GET HTTP/1.1\r\n\r\n",
    "a method that is no token": request(b"G(T /"),
    "a trailing space": b"GET / HTTP/1.1 \r\n\r\n",
    "lower-case http": b"GET / http/1.1\r\n\r\n",
    "binary": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "chunk size: not hexadecimal": request(b"POST /", CHUNKED, b"xyz\r\nabc\r\n0\r\n\r\n"),
    "chunk size: empty": request(b"POST /", CHUNKED, b"\r\nabc\r\n0\r\n\r\n"),
    "chunk size: negative": request(b"POST /", CHUNKED, b"-3\r\nabc\r\n0\r\n\r\n"),
    "chunk size: prefixed": request(b"POST /", CHUNKED, b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk size: leading space": request(b"POST /", CHUNKED, b" 3\r\nabc\r\n0\r\n\r\n"),
    "chunk size: trailing space": request(b"POST /", CHUNKED, b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk size: overflow": request(b"POST /", CHUNKED, b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
    "chunk size: bare LF": request(b"POST /", CHUNKED, b"3\nabc\r\n0\r\n\r\n"),
    "chunk extension: bare LF": request(b"POST /", CHUNKED, b"3;a\nabc\r\n0\r\n\r\n"),
    "chunk extension: bare CR": request(b"POST /", CHUNKED, b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
    "chunk extension: endless": request(b"POST /", CHUNKED, b"3;" + b"a" * 5000),
    "chunk: too long": request(b"POST /", CHUNKED, b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk: ends in bare LF": request(b"POST /", CHUNKED, b"3\r\nabc\n0\r\n\r\n"),
    "last chunk: bare LF": request(b"POST /", CHUNKED, b"0\n\n"),
    "trailer: a length": request(b"POST /", CHUNKED, b"0\r\nContent-Length: 5\r\n\r\n"),
    "trailer: a host": request(b"POST /", CHUNKED, b"0\r\nHost: evil\r\n\r\n"),
    "trailer: folded": request(b"POST /", CHUNKED, b"0\r\nA: b\r\n c\r\n\r\n"),
    "trailer: endless": request(b"POST /", CHUNKED, b"0\r\n" + b"A: b\r\n" * 2000),
}


def status_of(data: bytes) -> int:
    return int(data.split(b" ", 2)[1])


def test_there_are_enough_of_them() -> None:
    assert len(MALFORMED) >= 30


@pytest.mark.parametrize("cut", [0, 7], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_answered_400_and_closed(
    server: ScriptedUpstream, relay: Running, name: str, cut: int
) -> None:
    server.scripts.put((ReadAll(),))
    heard = play(relay.connect(), (Send(MALFORMED[name], cut), ReadAll()))
    assert status_of(heard.data) == 400, heard
    assert heard.ending in ("end of file", "reset") and heard.data.count(b"HTTP/1.1 ") == 1
    assert b'"source": "abliterated-proxy"' in heard.data and b"Connection: close" in heard.data
    relay.close()
    server.close()
    if not server.heard.empty():
        # A chunked body can go wrong after its head has left: the upstream must not take it for whole.
        theirs = server.heard.get()
        assert cut and MALFORMED[name].startswith(theirs.data) and not theirs.data.endswith(b"0\r\n\r\n")
        assert theirs.data == b"" or theirs.ending == "reset"


def test_http_2_is_told_what_is_spoken_here(relay: Running) -> None:
    heard = play(relay.connect(), (Send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ReadAll()))
    assert status_of(heard.data) == 505


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_header_over_64_kib_is_answered_431(relay: Running, cut: int) -> None:
    for head in (request(b"GET /", b"X: " + b"a" * 65536 + b"\r\n"), b"GET /" + b"a" * 70000):
        heard = play(relay.connect(), (Send(head, cut), ReadAll()))
        assert status_of(heard.data) == 431 and heard.data.count(b"HTTP/1.1") == 1


def test_a_head_that_never_ends_is_answered_408(impatient: Running) -> None:
    begin = time.monotonic()
    heard = play(impatient.connect(), (Send(GET[:-2]), ReadAll()))
    assert status_of(heard.data) == 408
    assert time.monotonic() - begin > 0.2


def test_a_silent_client_and_a_slow_body_are_left_alone(server: ScriptedUpstream, impatient: Running) -> None:
    body = post(b"/x", b"abcd")
    server.scripts.put((Read(len(body)), Send(VERSION), ReadAll()))
    with impatient.connect() as connection:
        time.sleep(0.5)  # longer than the head's limit; nothing to poll for
        connection.sendall(body[:-2])
        time.sleep(0.5)
        connection.sendall(body[-2:])
        assert connection.recv(12) == VERSION[:12]
    assert server.heard.get(timeout=60).data == body


def test_a_good_request_before_a_bad_one_is_answered_first(server: ScriptedUpstream, relay: Running) -> None:
    bad = b"GET / HTTP/1.1\r\nBad : x\r\n\r\n"
    mine, theirs = converse(
        server, relay.address, (Send(GET + bad), ReadAll()), (Read(len(GET)), Send(VERSION), ReadAll())
    )
    assert theirs.data == GET
    assert mine.data.startswith(VERSION + b"HTTP/1.1 400 ")


def test_a_bad_request_on_a_used_connection_is_answered_400(server: ScriptedUpstream, relay: Running) -> None:
    client = (Send(GET), Read(len(VERSION)), Send(b"nonsense\r\n\r\n"), ReadAll())
    mine, theirs = converse(server, relay.address, client, (Read(len(GET)), Send(VERSION), ReadAll()))
    assert theirs.data == GET and mine.data.startswith(VERSION + b"HTTP/1.1 400 ")


def test_no_answer_of_ours_lands_inside_an_answer_of_the_upstream(server: ScriptedUpstream, relay: Running) -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    client = (Send(GET), Read(len(half)), Send(b"nonsense\r\n\r\n"), HalfClose(), ReadAll())
    mine, _ = converse(server, relay.address, client, (Read(len(GET)), Send(half), HalfClose(), ReadAll()))
    assert mine.data == half


def test_an_upstream_that_lies_is_relayed_and_bothers_nobody_else(server: ScriptedUpstream, relay: Running) -> None:
    lie = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello, and more than was said" * 3
    mine, _ = converse(server, relay.address, (Send(GET), Read(len(lie))), (Read(len(GET)), Send(lie), ReadAll()))
    assert mine.data == lie


@pytest.fixture(scope="module")
def orphan() -> Iterator[Running]:
    """A proxy whose upstream is not there."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with proxy(f"http://127.0.0.1:{reserved.getsockname()[1]}", timing=Timing(linger_seconds=DEADLINE)) as running:
            yield running


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (b"/api/chat", ("error",)),
        (b"/api/tags", ("error",)),
        (b"/nothing", ("error",)),
        (b"/v1/chat/completions", ("error", "message")),
        (b"/v1/models?x=y", ("error", "message")),
        (b"/v1/messages", ("error", "message")),
    ],
)
def test_without_an_upstream_the_answer_is_502_in_the_api_s_own_shape(
    orphan: Running, path: bytes, where: tuple[str, ...]
) -> None:
    heard = play(orphan.connect(), (Send(post(path, b"{}")), ReadAll()))
    head, _, body = heard.data.partition(b"\r\n\r\n")
    assert status_of(head) == 502 and b"Server: abliterated-proxy" in head
    found = json.loads(body)
    assert found["source"] == "abliterated-proxy"
    for key in where:
        found = found[key]
    assert "can't reach Ollama at 127.0.0.1:" in found


def test_without_an_upstream_the_root_tells_too_and_head_has_no_body(orphan: Running) -> None:
    heard = play(orphan.connect(), (Send(request(b"GET /")), ReadAll()))
    assert status_of(heard.data) == 502 and heard.data.endswith(b"is it running?") and b"text/plain" in heard.data
    heard = play(orphan.connect(), (Send(request(b"HEAD /")), ReadAll()))
    assert status_of(heard.data) == 502 and heard.data.endswith(b"\r\n\r\n")
    until(lambda: orphan.proxy.stats.upstream_errors >= 2)


def test_without_an_upstream_a_client_in_mid_upload_still_reads_its_502(orphan: Running) -> None:
    heard = play(
        orphan.connect(),
        (Send(request(b"POST /api/blobs/x", b"Content-Length: 4000000\r\n", b"x" * 4000000)), ReadAll()),
    )
    assert status_of(heard.data) == 502 and heard.ending == "end of file"
