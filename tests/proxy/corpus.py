"""Conversations that must not change by a byte when a proxy stands between."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.script import HalfClose, Read, ReadAll, Reset, Send, Step

HOST = b"Host: localhost:11434\r\n"


@dataclass(frozen=True)
class Exchange:
    name: str
    client: tuple[Step, ...]
    upstream: tuple[Step, ...]


def request(line: bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
    return line + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body


def post(path: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return request(b"POST " + path, headers + b"Content-Length: %d\r\n" % len(body), body)


def answer(body: bytes, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunk(*pieces: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


def simple(name: str, sent: bytes, answered: bytes, cut: int = 0, answer_cut: int = 0) -> Exchange:
    """One request, one answer, then the client leaves."""
    return Exchange(
        name,
        (Send(sent, cut), Read(len(answered)), HalfClose(), ReadAll()),
        (Read(len(sent)), Send(answered, answer_cut), ReadAll()),
    )


TOKENS = [b'{"model":"m","message":{"role":"assistant","content":"t%d"},"done":false}\n' % n for n in range(20)]
CHAT = b'{"model":"qwen3:8b","messages":[{"role":"user","content":"why"}],"stream":true}'
NDJSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(*TOKENS)
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(
    *[b'data: {"choices":[{"delta":{"content":"t"}}]}\n\n'] * 9, b"data: [DONE]\n\n"
)
GET = request(b"GET /api/version")
VERSION = answer(b'{"version":"0.34.1"}', b"Content-Type: application/json; charset=utf-8\r\n")
UPLOAD = post(b"/api/blobs/sha256:00", b"12345678")
CONNECT = b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
EXPECT = request(b"POST /b", b"Expect: 100-continue\r\nContent-Length: 4\r\n")
H2C = post(b"/x", b"abc", b"Connection: Upgrade\r\nUpgrade: h2c\r\n")
MIXED = post(b"/a", b"12") + request(b"POST /b", CHUNKED, chunk(b"34")) + GET
HEAD_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"
CHUNKED_ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BIG = bytes(range(256)) * 1024  # 256 KiB

CORPUS: list[Exchange] = [
    *(
        simple(f"GET {path.decode()}", request(b"GET " + path), answer(body, b"Content-Type: application/json\r\n"))
        for path, body in [
            (b"/", b"Ollama is running"),
            (b"/api/version", b'{"version":"0.34.1"}'),
            (b"/api/tags", b'{"models":[]}'),
            (b"/api/ps", b'{"models":[]}'),
            (b"/v1/models", b'{"object":"list","data":null}'),
            (b"/v1/models/qwen3:8b", b'{"id":"qwen3:8b"}'),
            (b"/api/tags?a=b&c=%20#x", b"{}"),
            ("/api/größe".encode(), b"{}"),
            (b"/api/status", b'{"cloud":{}}'),
        ]
    ),
    *(
        simple(f"POST {path.decode()}", post(path, CHAT), reply)
        for path, reply in [
            (b"/api/chat", NDJSON),
            (b"/api/generate", NDJSON),
            (b"/api/show", answer(b"{}")),
            (b"/api/embed", answer(b'{"embeddings":[[0.1]]}')),
            (b"/api/embeddings", answer(b'{"embedding":[0.1]}')),
            (b"/api/create", NDJSON),
            (b"/api/copy", answer(b"")),
            (b"/api/pull", NDJSON),
            (b"/api/push", NDJSON),
            (b"/v1/chat/completions", SSE),
            (b"/v1/completions", SSE),
            (b"/v1/embeddings", answer(b"{}")),
            (b"/v1/responses", SSE),
            (b"/v1/messages", SSE),
        ]
    ),
    *(
        simple(f"answer {status.decode()}", GET, answer(b'{"error":"x"}', status=status))
        for status in [b"400 Bad Request", b"404 Not Found", b"405 Method Not Allowed", b"499 ", b"500 Oops", b"999 ?"]
    ),
    simple("DELETE", request(b"DELETE /api/delete", b"Content-Length: 13\r\n", b'{"model":"m"}'), answer(b"")),
    simple("HEAD", request(b"HEAD /"), HEAD_ANSWER),
    simple("HEAD of a blob", request(b"HEAD /api/blobs/sha256:00"), HEAD_ANSWER.replace(b"200 OK", b"404 No")),
    simple(
        "preflight",
        request(b"OPTIONS /api/chat", b"Origin: http://localhost:3000\r\nAccess-Control-Request-Method: POST\r\n"),
        b"HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: http://localhost:3000\r\n\r\n",
    ),
    simple("OPTIONS *", request(b"OPTIONS *"), answer(b"")),
    simple("an unknown method", request(b"BREW /coffee"), answer(b"", status=b"405 Method Not Allowed")),
    simple("an unknown method with a body", request(b"BREW /c", b"Content-Length: 3\r\n", b"abc"), answer(b"")),
    simple("PUT", request(b"PUT /x", b"Content-Length: 2\r\n", b"{}"), answer(b"", status=b"405 Method Not Allowed")),
    simple("a foreign Host", GET.replace(b"localhost:11434", b"evil.example"), answer(b"", status=b"403 Forbidden")),
    simple("no Host", b"GET / HTTP/1.1\r\n\r\n", answer(b"", status=b"400 Bad Request")),
    simple("HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n", answer(b"old")),
    simple("an absolute target", b"GET http://localhost:11434/api/tags HTTP/1.1\r\n" + HOST + b"\r\n", answer(b"{}")),
    simple("an empty line first", b"\r\n" + GET, VERSION),
    simple("odd spacing and case", b"GET / HTTP/1.1\r\nhOsT:localhost\r\nX-A:  b  \r\nX-Empty:\r\n\r\n", VERSION),
    simple("a Latin-1 value", request(b"GET /", b"X-Name: K\xf6ln\r\n"), VERSION),
    simple("repeated fields", request(b"GET /", b"Cookie: a\r\nCookie: b\r\n"), VERSION),
    simple("a header just under the limit", request(b"GET /", b"X-Long: " + b"a" * 65400 + b"\r\n"), VERSION),
    simple("a zero-length body", post(b"/api/copy", b""), answer(b"")),
    simple("chunked request", request(b"POST /api/x", CHUNKED, chunk(b"abc", b"d" * 300)), VERSION),
    simple(
        "chunk extensions and trailers",
        request(
            b"POST /x", b"Transfer-Encoding: chunked\r\nTrailer: X-T\r\n", b'3;a=b;c="d"\r\nabc\r\n0\r\nX-T: v\r\n\r\n'
        ),
        VERSION,
    ),
    simple("an empty chunked body", request(b"POST /x", CHUNKED, b"0\r\n\r\n"), VERSION),
    simple("a gzip answer", GET, answer(b"\x1f\x8b\x08\x00junk", b"Content-Encoding: gzip\r\n")),
    simple("a zstd request", post(b"/v1/responses", b"\x28\xb5\x2f\xfd00", b"Content-Encoding: zstd\r\n"), SSE),
    simple("trailers in the answer", GET, CHUNKED_ANSWER + chunk(b"x", trailers=b"T: 1\r\n")),
    simple("bytes one at a time, up", post(b"/api/chat", CHAT), VERSION, cut=1),
    simple("bytes one at a time, chunked", request(b"POST /x", CHUNKED, chunk(b"abc", b"de")), VERSION, cut=1),
    simple("bytes one at a time, down", GET, NDJSON, answer_cut=1),
    simple("256 KiB up and down", post(b"/api/embed", BIG), answer(BIG)),
    simple("an upstream that speaks nonsense", GET, b"\x00\x01nonsense\r\n\r\nand more"),
    simple("an answer with bare line feeds", GET, b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
    Exchange(
        "an answer without length, to the end",
        (Send(GET), ReadAll()),
        (Read(len(GET)), Send(b"HTTP/1.0 200 OK\r\n\r\nuntil the end"), HalfClose(), ReadAll()),
    ),
    Exchange(
        "100-continue, granted",
        (Send(EXPECT), Read(25), Send(b"body"), Read(len(VERSION))),
        (
            Read(len(EXPECT)),
            Send(b"HTTP/1.1 100 Continue\r\n\r\n"),
            Read(4),
            Send(VERSION),
            ReadAll(),
        ),
    ),
    Exchange(
        "100-continue, refused",
        (Send(EXPECT), ReadAll()),
        (
            Read(len(EXPECT)),
            Send(answer(b"", b"Connection: close\r\n")),
            HalfClose(),
            ReadAll(),
        ),
    ),
    Exchange(
        "keep-alive, ten in turn",
        tuple(step for _ in range(10) for step in (Send(GET), Read(len(VERSION)))),
        (*(step for _ in range(10) for step in (Read(len(GET)), Send(VERSION))), ReadAll()),
    ),
    Exchange(
        "keep-alive after a stream",
        (Send(post(b"/api/chat", CHAT)), Read(len(NDJSON)), Send(GET), Read(len(VERSION))),
        (Read(len(post(b"/api/chat", CHAT))), Send(NDJSON), Read(len(GET)), Send(VERSION), ReadAll()),
    ),
    Exchange(
        "pipelining, five at once",
        (Send(GET * 5), Read(5 * len(VERSION))),
        (Read(5 * len(GET)), Send(VERSION * 5), ReadAll()),
    ),
    Exchange(
        "pipelining bodies of every kind",
        (Send(MIXED), Read(3 * len(VERSION))),
        (Read(len(MIXED)), Send(VERSION * 3), ReadAll()),
    ),
    Exchange(
        "HEAD then GET, pipelined",
        (Send(request(b"HEAD /") + GET), Read(len(HEAD_ANSWER + VERSION))),
        (Read(len(request(b"HEAD /") + GET)), Send(HEAD_ANSWER + VERSION), ReadAll()),
    ),
    Exchange(
        "half-close, then the answer",
        (Send(GET), HalfClose(), ReadAll()),
        (Read(len(GET)), ReadAll(), Send(VERSION), HalfClose()),
    ),
    Exchange(
        "the client resets in mid-stream",
        (Send(GET), Read(100), Reset()),
        (Read(len(GET)), Send(NDJSON[:200]), ReadAll()),
    ),
    Exchange(
        "the upstream resets in mid-stream",
        (Send(UPLOAD[:-4]), Read(200), Send(UPLOAD[-4:]), ReadAll()),
        (Read(len(UPLOAD) - 4), Send(NDJSON[:200]), Read(4), Reset()),
    ),
    Exchange(
        "the upstream ends in mid-stream",
        (Send(GET), ReadAll()),
        (Read(len(GET)), Send(NDJSON[:200]), HalfClose(), ReadAll()),
    ),
    Exchange(
        "the upstream ends before answering",
        (Send(GET), ReadAll()),
        (Read(len(GET)), HalfClose(), ReadAll()),
    ),
    Exchange(
        "a body shorter than its length",
        (Send(request(b"POST /x", b"Content-Length: 10\r\n", b"four")), HalfClose(), ReadAll()),
        (ReadAll(), Send(answer(b"", status=b"400 Bad Request")), HalfClose()),
    ),
    Exchange(
        "an early answer to an upload",
        (Send(request(b"POST /b", b"Content-Length: 500000\r\n", b"x" * 1000)), ReadAll(), Send(b"y" * 1000)),
        (Read(200), Send(answer(b"early", b"Connection: close\r\n")), HalfClose(), ReadAll()),
    ),
    Exchange(
        "a websocket",
        (
            Send(request(b"GET /ws", b"Connection: Upgrade\r\nUpgrade: websocket\r\n")),
            Read(len(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")),
            Send(b"\x81\x02hi\x00\n\n\r\n\r\nGET"),
            Read(4),
        ),
        (
            Read(len(request(b"GET /ws", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"))),
            Send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"),
            Read(4 + 10),
            Send(b"\x81\x02yo"),
            ReadAll(),
        ),
    ),
    Exchange(
        "an upgrade offered with a body and declined, then another request",
        (Send(H2C + GET), Read(2 * len(VERSION))),
        (Read(len(H2C)), Send(VERSION), Read(len(GET)), Send(VERSION), ReadAll()),
    ),
    Exchange(
        "an upgrade declined while another request and the end of file wait",
        (Send(H2C + GET), HalfClose(), ReadAll()),
        (Read(len(H2C)), Send(VERSION), Read(len(GET)), ReadAll(), Send(VERSION), HalfClose()),
    ),
    Exchange(
        "CONNECT, accepted",
        (Send(CONNECT), Read(19), Send(b"\x00raw\n"), Read(3)),
        (Read(len(CONNECT)), Send(b"HTTP/1.1 200 OK\r\n\r\n"), Read(5), Send(b"raw"), ReadAll()),
    ),
    Exchange(
        "CONNECT, refused, then another request",
        (Send(CONNECT), Read(len(VERSION)), Send(GET), Read(len(VERSION))),
        (Read(len(CONNECT)), Send(VERSION), Read(len(GET)), Send(VERSION), ReadAll()),
    ),
    Exchange("the client says nothing", (HalfClose(), ReadAll()), ()),
]  # fmt: skip
