"""What a real engine says, asked directly and through the proxy: the same bytes, but for the clock."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from abliterated.proxy.server import Steering
from engines import Engine, RunningEngine, engine_parameters, require
from proxy.script import Running, proxy

ORIGIN = b"Origin: http://localhost:3000\r\n"
FOREIGN = b"Origin: http://evil.example\r\n"


def ask(method: bytes, target: bytes, *, body: bytes | None = None, more: bytes = b"", chunked: bool = False) -> bytes:
    head = b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s" % (method, target, more)
    if body is None:
        return head + b"\r\n"
    if chunked:
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


GETS = [
    b"/",
    b"/api/version",
    b"/api/tags",
    b"/api/ps",
    b"/v1/models",
    b"/v1/models/none",
    b"/nowhere",
    b"/api/tags?x=1",
]
POSTS = [
    b"/api/chat", b"/api/generate", b"/api/show", b"/api/embed", b"/api/create", b"/v1/chat/completions",
    b"/v1/completions", b"/v1/embeddings",
]  # fmt: skip
BODIES = [
    b"", b"{}", b"{", b'{"model":"none:1b"}', b'{"model":"none:1b","messages":[{"role":"user","content":"x"}]}', b"[]",
    b'{"model":5}',
]  # fmt: skip
EXCHANGES: dict[str, bytes] = {
    **{f"{method.decode()} {target.decode()}": ask(method, target) for target in GETS for method in (b"GET", b"HEAD")},
    **{f"OPTIONS {target.decode()}": ask(b"OPTIONS", target, more=ORIGIN) for target in (*GETS, *POSTS)},
    **{
        f"POST {target.decode()} {body.decode()}{' chunked' if chunked else ''}": ask(
            b"POST", target, body=body, chunked=chunked
        )
        for target in POSTS
        for body in BODIES
        for chunked in (False, True)
    },
    **{f"GET {target.decode()} from elsewhere": ask(b"GET", target, more=FOREIGN) for target in GETS},
    **{
        f"DELETE {target.decode()}": ask(b"DELETE", target, body=b'{"model":"none:1b"}')
        for target in (b"/api/delete", b"/")
    },
    "a foreign Host": ask(b"GET", b"/api/tags").replace(b"Host: localhost", b"Host: evil.example"),
    "an upload of nothing": ask(b"POST", b"/api/blobs/sha256:" + b"0" * 64, body=b"hello"),
    "a blob that is not there": ask(b"HEAD", b"/api/blobs/sha256:" + b"0" * 64),
}
# Every answer bears the clock; errors of Go's and of the engine's own may bear an address.
_VARIES = re.compile(rb"(?i)\r\nDate: [^\r]*|127\.0\.0\.1:[0-9]+->|:[0-9]{5}->|req_[0-9a-f]+|\"created\":[0-9]+")


def said(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 60) as mine:
        mine.sendall(request)
        pieces = []
        while piece := mine.recv(65536):
            pieces.append(piece)
    return _VARIES.sub(b"", b"".join(pieces))


@pytest.fixture(scope="module", params=engine_parameters())
def engine(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    given: Engine = require(request.param)
    with given.start() as running:
        yield running


@pytest.fixture(scope="module")
def front(engine: RunningEngine) -> Iterator[Running]:
    steering = Steering(aliases=(("a:1b", "b:1b"),), observe=True)
    with proxy(engine.base_url, steering=steering) as running:
        yield running


def test_there_are_enough_of_them() -> None:
    assert len(EXCHANGES) >= 150


def test_what_a_real_engine_says_is_the_same_directly_and_through_the_proxy(
    engine: RunningEngine, front: Running
) -> None:
    port = int(front.address.rpartition(":")[2])
    differ = {
        name: (direct, through)
        for name, request in EXCHANGES.items()
        if (direct := said(engine.port, request)) != (through := said(port, request))
    }
    assert not differ
