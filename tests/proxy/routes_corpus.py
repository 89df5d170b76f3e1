"""More exchanges: every route of Ollama's with the bodies, encodings, endings and errors it meets in the wild."""

from __future__ import annotations

from proxy.corpus import (
    CHAT,
    CHUNKED,
    CORPUS,
    GET,
    HOST,
    NDJSON,
    SSE,
    VERSION,
    Exchange,
    answer,
    chunk,
    post,
    request,
    simple,
)  # fmt: skip
from proxy.script import HalfClose, Read, ReadAll, Reset, Send

JSON = b"Content-Type: application/json; charset=utf-8\r\n"
STREAMED = {
    b"/api/chat": NDJSON,
    b"/api/generate": NDJSON,
    b"/api/embed": answer(b'{"embeddings":[[0.1]]}', JSON),
    b"/v1/chat/completions": SSE,
    b"/v1/completions": SSE,
    b"/v1/responses": SSE,
    b"/v1/messages": SSE,
}
MODEL_LAST = b'{"messages":[{"role":"user","content":"a \\"model\\": \\"x\\"","images":["QUJD"]}],"model":"qwen3:8b"}'
NO_MODEL = b'{"messages":[]}'
GZIP = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03junk"
BROWSER = b"Origin: http://localhost:3000\r\nReferer: http://localhost:3000/\r\nSec-Fetch-Mode: cors\r\n"


def of_route(path: bytes, reply: bytes) -> list[Exchange]:
    name = path.decode()
    sent = post(path, CHAT)
    bad = answer(b'{"error":"invalid"}', JSON, b"400 Bad Request")
    not_found = answer(b'{"error":"model \'x\' not found"}', JSON, b"404 Not Found")
    return [
        simple(f"{name}: the model last", post(path, MODEL_LAST), reply),
        simple(f"{name}: no model", post(path, NO_MODEL), bad),
        simple(f"{name}: not JSON", post(path, b"\x00{"), bad),
        simple(f"{name}: an ordinary model is missing", sent, not_found),
        simple(f"{name}: chunked", request(b"POST " + path, CHUNKED, chunk(CHAT[:7], CHAT[7:])), reply),
        simple(f"{name}: chunked, a byte at a time", request(b"POST " + path, CHUNKED, chunk(CHAT)), VERSION, cut=1),
        simple(f"{name}: with a query", post(path + b"?beta=true", CHAT), reply),
        simple(f"{name}: from a browser", post(path, CHAT, BROWSER), reply),
        simple(f"{name}: preflight", request(b"OPTIONS " + path, BROWSER), answer(b"", status=b"204 No Content")),
        simple(f"{name}: GET", request(b"GET " + path), answer(b"404 page not found", status=b"404 Not Found")),
        simple(f"{name}: HEAD", request(b"HEAD " + path), b"HTTP/1.1 404 Not Found\r\nContent-Length: 18\r\n\r\n"),
        simple(f"{name}: gzip", post(path, GZIP, b"Content-Encoding: gzip\r\n"), bad),
        simple(f"{name}: zstd", post(path, b"\x28\xb5\x2f\xfd", b"Content-Encoding: zstd\r\n"), reply),
        simple(f"{name}: an empty body", post(path, b""), bad),
        simple(f"{name}: the answer in pieces", sent, reply, answer_cut=37),
        simple(f"{name}: an error in mid-stream", sent, NDJSON[:-5] + chunk(b'{"error":"out of memory"}\n')),
        Exchange(
            f"{name}: head and body apart",
            (Send(sent[: -len(CHAT)]), Send(CHAT[:10]), Send(CHAT[10:]), Read(len(reply)), HalfClose(), ReadAll()),
            (Read(len(sent)), Send(reply), ReadAll()),
        ),
        Exchange(
            f"{name}: two in turn, then a GET",
            (Send(sent), Read(len(reply)), Send(sent), Read(len(reply)), Send(GET), Read(len(VERSION))),
            (Read(len(sent)), Send(reply), Read(len(sent)), Send(reply), Read(len(GET)), Send(VERSION), ReadAll()),
        ),
        Exchange(
            f"{name}: pipelined",
            (Send(sent + sent + GET), Read(len(reply + reply + VERSION))),
            (Read(len(sent + sent + GET)), Send(reply + reply + VERSION), ReadAll()),
        ),
        Exchange(
            f"{name}: the client resets",
            (Send(sent), Read(20), Reset()),
            (Read(len(sent)), Send(reply[:60]), ReadAll()),
        ),
        Exchange(
            f"{name}: the upstream ends early",
            (Send(sent), ReadAll()),
            (Read(len(sent)), Send(reply[:60]), HalfClose(), ReadAll()),
        ),
        Exchange(
            f"{name}: answered before the body is whole",
            (Send(sent[:-9]), Read(len(VERSION)), Send(sent[-9:]), HalfClose(), ReadAll()),
            (Read(len(sent) - 9), Send(VERSION), ReadAll()),
        ),
    ]  # fmt: skip


MORE: list[Exchange] = [
    *(exchange for path, reply in STREAMED.items() for exchange in of_route(path, reply)),
    simple("show, by its older key", post(b"/api/show", b'{"name":"qwen3:8b"}'), answer(b"{}", JSON)),
    simple("an absolute target of a route", b"POST http://localhost/api/chat HTTP/1.1\r\n" + HOST + b"\r\n", VERSION),
    simple("a path that only begins so", post(b"/api/chat/", CHAT), answer(b"", status=b"307 Temporary Redirect")),
    simple("a path in capitals", post(b"/API/CHAT", CHAT), answer(b"", status=b"404 Not Found")),
]
ALL = [*CORPUS, *MORE]
