"""What is asked again and again goes a shorter way, and whole chunks are counted without a parser: nobody can tell."""

from __future__ import annotations

import queue
import socket
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abliterated.proxy.headers import HostGuard
from abliterated.proxy.responses import BEHIND, CHUNK, PLAIN, TOKEN_LIMIT, ResponseWatcher
from abliterated.proxy.server import Steering
from proxy.corpus import CHAT, GET, NDJSON, SSE, VERSION, answer, chunk, post, request
from proxy.script import DEADLINE, Heard, Read, ReadAll, ScriptedUpstream, Send, converse, proxy, until

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "sized": VERSION,
    "empty": answer(b""),
    "not found": answer(b'{"error":"model \'a\' not found"}', status=b"404 Not Found"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 20\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + VERSION,
    "tokens": NDJSON,
    "events": SSE,
    "nothing in chunks": CHUNKED + b"0\r\n\r\n",
    "trailers": CHUNKED + chunk(b"a", b"b" * 300, trailers=b"Digest: x\r\n"),
    "large hexadecimals": CHUNKED + b"00A\r\n0123456789\r\n0AB;x=y\r\n" + b"c" * 171 + b"\r\n0\r\n\r\n",
    "a chunk like an end": CHUNKED + chunk(b"0\r\n\r\n", b"5\r\n0\r\n\r\n\r\n"),
    "every size": CHUNKED + chunk(*(b"z" * size for size in (1, 15, 16, 17, 255, 256, 1010, 1017, 1018, 4095, 4096))),
    "long": answer(bytes(range(256)) * 40),
    "an old server": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
    "a long head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 3000 + b"\r\nContent-Length: 2\r\n\r\nok",
}


def take(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return data


def pieces(data: bytes) -> list[int]:
    """Where a server would cut it: behind the head, and behind each chunk."""
    ends, place = [], 0
    while (place := data.find(b"\r\n", place) + 2) > 1:
        ends.append(place)
    return ends


@example(names=["long"], cuts={1}, natural=False, pipelined=False)
@given(
    names=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=5),
    cuts=st.sets(st.integers(1, 30_000), max_size=30),
    natural=st.booleans(),
    pipelined=st.booleans(),
)
def test_after_every_byte_it_is_known_how_many_answers_are_owed(
    names: list[str], cuts: set[int], natural: bool, pipelined: bool
) -> None:
    stream = b"".join(ANSWERS[name] for name in names)
    ends = [sum(len(ANSWERS[name]) for name in names[: count + 1]) for count in range(len(names))]
    cuts = {cut for cut in (cuts | set(pieces(stream)) if natural else cuts) if cut < len(stream)}
    if not pipelined:
        cuts |= set(ends[:-1])  # the next is asked only when the one before is whole
    watcher = ResponseWatcher()
    asked = 0
    last = 0
    for cut in (*sorted(cuts), len(stream)):
        while asked < (len(names) if pipelined else sum(end <= last for end in ends) + 1):
            watcher.expect(PLAIN)
            asked += 1
        (watcher.go_on if watcher.streaming else watcher.feed)(stream[last:cut])
        last = cut
        assert watcher.owed == asked - sum(end <= cut for end in ends)
        assert not watcher.blind and not watcher.switched
        assert watcher.started or not watcher.streaming
    watcher.expect(PLAIN)
    watcher.feed(b"what is this\r\n\r\n")
    assert watcher.blind


def chunk_like(content: int, more: int) -> bytes:
    line = b"%x\r\n" % content
    return line.ljust(len(line) + content + 2 + more, b"x")


@example(b"\0xx")
@example(b"10\r\v".ljust(22, b"x"))
@given(st.one_of(st.binary(min_size=1, max_size=40), st.builds(chunk_like, st.integers(0, 1030), st.integers(-1, 1))))
def test_a_piece_that_lies_where_its_size_says_is_one_whole_chunk(piece: bytes) -> None:
    size = len(piece)
    line, ended, rest = piece.partition(b"\r\n")
    whole = bool(ended) and len(rest) > 2 and line == b"%x" % (len(rest) - 2)
    if size < TOKEN_LIMIT:
        assert (CHUNK[size] <= piece < BEHIND[size]) == whole


@pytest.mark.parametrize("cut", [0, 7, 200])
def test_the_same_question_is_answered_otherwise_each_time(server: ScriptedUpstream, cut: int) -> None:
    conversation = [(GET, said) for said in ANSWERS.values() for _ in range(2)]
    conversation[6:6] = [(request(b"HEAD /api/version"), b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n")]
    conversation[9:9] = [(post(b"/api/chat", CHAT), NDJSON)]
    conversation[12:12] = [(GET + GET, VERSION + VERSION)]
    client = [step for asked, said in conversation for step in (Send(asked), Read(len(said)))]
    behind = [step for asked, said in conversation for step in (Read(len(asked)), Send(said, cut))]
    direct = converse(server, server.url, client, [*behind, ReadAll()])
    with proxy(server.url) as running:
        relayed = converse(server, running.address, client, [*behind, ReadAll()])
    assert relayed == direct
    assert direct[0].data == b"".join(said for _, said in conversation)
    assert running.proxy.stats.requests == len(conversation) + 1
    assert running.proxy.stats.bytes_up == sum(len(asked) for asked, _ in conversation)
    assert running.proxy.stats.bytes_down == len(direct[0].data)


def test_words_nobody_asked_for_reach_the_client(server: ScriptedUpstream) -> None:
    steps = [Send(GET), Read(len(VERSION))] * 3 + [Read(5), Send(GET), Read(len(VERSION))]
    behind = [Read(len(GET)), Send(VERSION)] * 3 + [Send(b"hello"), Read(len(GET)), Send(VERSION), ReadAll()]
    direct = converse(server, server.url, steps, behind)
    with proxy(server.url) as running:
        assert converse(server, running.address, steps, behind) == direct


def test_a_stop_is_told_with_the_answer_that_is_owed(server: ScriptedUpstream) -> None:
    asked, stopping = threading.Event(), threading.Event()

    def answers(connection: socket.socket) -> Heard:
        with connection:
            for _ in range(3):
                assert take(connection, len(GET)) == GET
                connection.sendall(VERSION)
            assert take(connection, len(GET)) == GET
            asked.set()
            assert stopping.wait(DEADLINE)
            connection.sendall(VERSION)
            return Heard(connection.recv(1))

    server.scripts.put(answers)
    with proxy(server.url) as running, running.connect() as client:
        for _ in range(3):
            client.sendall(GET)
            assert take(client, len(VERSION)) == VERSION
        client.sendall(GET)
        assert asked.wait(DEADLINE)
        closing = threading.Thread(target=running.close, args=(DEADLINE,))
        closing.start()

        def look() -> None:
            if running.proxy.draining:
                stopping.set()
            else:
                running.loop.call_later(0.005, look)

        running.loop.call_soon_threadsafe(look)
        heard = b"".join(iter(lambda: client.recv(65536), b""))
        assert heard == VERSION.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        closing.join(DEADLINE)


def test_a_change_of_mind_holds_for_what_was_allowed_before(server: ScriptedUpstream) -> None:
    evil = GET.replace(b"localhost:11434", b"evil.example")
    server.scripts.put([*[Read(len(evil)), Send(VERSION)] * 3, ReadAll()])
    with proxy(server.url) as running, running.connect() as client:
        for _ in range(3):
            client.sendall(evil)
            assert take(client, len(VERSION)) == VERSION
        changed = threading.Event()
        guard = HostGuard("box", frozenset(), frozenset(), "localhost:1")

        def change() -> None:
            running.proxy.change(guard=guard)
            changed.set()

        running.loop.call_soon_threadsafe(change)
        assert changed.wait(DEADLINE)
        client.sendall(evil)
        assert client.recv(65536).startswith(b"HTTP/1.1 403 ")


STREAMS = {
    b"/api/chat": (
        b'{"model":"qwen3:8b","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"a"},'
        b'"done":false}\n',
        b'{"model":"qwen3:8b","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":""},'
        b'"done":true,"prompt_eval_count":26,"eval_count":42,"eval_duration":4709213000}\n',
    ),
    b"/v1/chat/completions": (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"qwen3:8b","choices":[{"index":0,"delta":'
        b'{"content":"a"},"finish_reason":null}]}\n\n',
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"qwen3:8b","choices":[],"usage":'
        b'{"prompt_tokens":26,"completion_tokens":42,"total_tokens":68}}\n\n',
        b"data: [DONE]\n\n",
    ),
    b"/v1/messages": (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","model":"qwen3:8b","usage":'
        b'{"input_tokens":26,"output_tokens":0}}}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":'
        b'{"input_tokens":26,"output_tokens":42}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}


@pytest.mark.parametrize("path", STREAMS, ids=bytes.decode)
def test_tokens_are_counted_where_each_event_comes_by_itself(server: ScriptedUpstream, path: bytes) -> None:
    asked = post(path, CHAT)
    pieces = [CHUNKED, *(chunk(event).removesuffix(b"0\r\n\r\n") for event in STREAMS[path]), b"0\r\n\r\n"]
    heard: queue.Queue[bytes] = queue.Queue()

    def answers(connection: socket.socket) -> Heard:
        with connection:
            for _ in range(2):
                assert take(connection, len(asked)) == asked
                for piece in pieces:
                    connection.sendall(piece)
                    assert heard.get(timeout=DEADLINE) == piece
            return Heard(connection.recv(1))

    server.scripts.put(answers)
    with proxy(server.url, steering=Steering(observe=True)) as running, running.connect() as client:
        for _ in range(2):
            client.sendall(asked)
            for piece in pieces:
                heard.put(take(client, len(piece)))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        labels = f'route="{path.decode()}",model="qwen3:8b"'
        until(lambda: f"abliterated_proxy_tokens_total{{{labels}}} 84" in running.proxy.tally.text())
