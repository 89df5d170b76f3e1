"""The pure parts: framing is the same wherever the bytes are cut, and decisions follow their rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterated.proxy import headers, policy
from abliterated.proxy.framing import HEAD_LIMIT, LEAD_LIMIT, Bad, Body, Event, Head, RequestFramer, read_head
from abliterated.proxy.headers import HostGuard
from abliterated.proxy.responses import HEAD, PLAIN, TUNNEL, ResponseWatcher
from proxy.corpus import GET, HOST, chunk, post, request
from proxy.test_refusals import MALFORMED

GUARD = HostGuard("Box", frozenset({"203.0.113.9"}), frozenset({"box.example.org"}), "localhost:11435")
GOOD = [
    GET,
    post(b"/api/chat", b"{}" * 20),
    request(b"POST /x", b"Transfer-Encoding: chunked\r\n", chunk(b"abc", b"\r\n0\r\n\r\n", trailers=b"A: b\r\n")),
]


def feed(pieces: list[bytes]) -> list[Event]:
    framer = RequestFramer()
    return [event for piece in pieces for event in framer.feed(piece)]


def verdict(events: list[Event]) -> tuple[list[bytes], bytes, int]:
    """The targets, what is let out, and the status of the refusal."""
    out = b"".join(
        event.raw if isinstance(event, Head) else event.data for event in events if not isinstance(event, Bad)
    )
    bad = [event.status for event in events if isinstance(event, Bad)]
    return [event.target for event in events if isinstance(event, Head)], out, bad[0] if bad else 0


def pieces_of(whole: bytes, cuts: set[int]) -> list[bytes]:
    inner = sorted(cut for cut in cuts if 0 < cut < len(whole))
    return [whole[start:end] for start, end in zip([0, *inner], [*inner, len(whole)], strict=True)]


@given(picks=st.lists(st.sampled_from(GOOD), min_size=1, max_size=5), cuts=st.sets(st.integers(1, 1000), max_size=30))
def test_cuts_do_not_change_what_good_requests_are(picks: list[bytes], cuts: set[int]) -> None:
    whole = b"".join(picks)
    targets, out, status = verdict(feed(pieces_of(whole, cuts)))
    assert out == whole and status == 0
    assert targets == [pick.split(b" ")[1] for pick in picks]


@given(name=st.sampled_from(sorted(MALFORMED)), cuts=st.sets(st.integers(1, 400), max_size=30))
def test_cuts_do_not_save_a_bad_request(name: str, cuts: set[int]) -> None:
    bad = MALFORMED[name]
    events = feed(pieces_of(GET + bad, {cut + len(GET) for cut in cuts}))
    targets, out, status = verdict(events)
    assert status == 400 and isinstance(events[-1], Bad)
    assert out.startswith(GET) and bad.startswith(out[len(GET) :])
    if not cuts:
        assert out == GET  # nothing of the bad one
    assert len(targets) <= 2


@given(st.binary(max_size=400), st.sets(st.integers(1, 400), max_size=10))
def test_noise_never_escapes_as_anything_but_an_event(noise: bytes, cuts: set[int]) -> None:
    events = feed(pieces_of(noise, cuts))
    assert all(isinstance(event, Head | Body | Bad) for event in events)


PARTS = [b"\r\n", b"\n", b"0", b"3", b"abc", b";", b":", b" ", b"\r\n\r\n", b"Host: a"]
LINES = [b"GET / HTTP/1.1", b"Content-Length: 3", b"Transfer-Encoding: chunked"]


@given(st.lists(st.sampled_from(PARTS + LINES), max_size=25))
def test_what_is_let_out_is_a_prefix_of_what_came(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert whole.startswith(verdict(feed([whole]))[1])
    assert whole.startswith(verdict(feed([whole[at : at + 1] for at in range(len(whole))]))[1])


def test_empty_lines_before_a_request_are_few() -> None:
    """Each piece that comes looks at them again: 30,000 of them, byte by byte, took a minute of everybody's time."""
    framer = RequestFramer()
    for _ in range(LEAD_LIMIT // 2):
        assert framer.feed(b"\r") == framer.feed(b"\n") == []
    assert [type(event) for event in framer.feed(b"\r\n")] == [Bad]
    (first,) = RequestFramer().feed(b"\r\n" * (LEAD_LIMIT // 2) + b"GET / HTTP/1.1\r\n\r\n")
    assert isinstance(first, Head)


def test_the_header_limit_is_exact() -> None:
    room = HEAD_LIMIT - len(request(b"GET /", b"X: \r\n"))
    assert verdict(feed([request(b"GET /", b"X: " + b"a" * room + b"\r\n")]))[2] == 0
    assert verdict(feed([request(b"GET /", b"X: " + b"a" * (room + 1) + b"\r\n")]))[2] == 431


def head(host: bytes = b"localhost", target: bytes = b"/", method: bytes = b"GET", more: bytes = b"") -> Head:
    made = read_head(method + b" " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + more + b"\r\n")
    assert isinstance(made, Head), made
    return made


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:11434", "127.0.0.1:1", "[::1]:11434", "10.0.0.1", "192.168.4.4:80", "172.31.0.1",
     "[fd00::1]:1", "0.0.0.0", "box", "BOX:11434", "a.localhost", "nas.local:11434", "x.internal", "203.0.113.9",
     "[::ffff:10.0.0.1]", ""],
)  # fmt: skip
def test_hosts_that_ollama_itself_would_take_pass_verbatim(host: str) -> None:
    assert policy.decide(head(host.encode()), policy.View(guard=GUARD)) is policy.VERBATIM


@pytest.mark.parametrize(
    "host",
    ["evil.example", "8.8.8.8", "172.32.0.1", "localhost.evil.example", "box.evil", "[2001:db8::1]", "127.0.0.1.nip.io",
     "evil.example:11434", "203.0.113.8", "2130706433x"],
)  # fmt: skip
def test_hosts_that_a_rebound_name_could_have_are_refused(host: str) -> None:
    assert policy.decide(head(host.encode()), policy.View(guard=GUARD)) == policy.FORBIDDEN
    assert policy.decide(head(host.encode()), policy.View()) is policy.VERBATIM  # upstream's own guard is in force


def test_a_name_that_was_allowed_is_rewritten_and_its_origin_with_it() -> None:
    made = head(b"Box.example.org:11434", more=b"oRiGin: http://box.example.org:11434\r\nX: Host: a\r\n")
    assert policy.decide(made, policy.View(guard=GUARD)) == policy.Forward("localhost:11435")
    assert headers.rewrite(made, "localhost:11435") == (
        b"GET / HTTP/1.1\r\nHost: localhost:11435\r\noRiGin: http://localhost:11435\r\nX: Host: a\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("target", "method", "passes"),
    [
        (b"http://evil.example/api/tags", b"GET", False),
        (b"http://localhost:1/api/tags", b"GET", True),
        (b"http://localhost@evil.example/", b"GET", False),
        (b"//evil.example/", b"GET", False),
        (b"evil.example:443", b"CONNECT", False),
        (b"*", b"OPTIONS", True),
    ],
)
def test_an_absolute_target_counts_more_than_host(target: bytes, method: bytes, passes: bool) -> None:
    decision = policy.decide(head(target=target, method=method), policy.View(guard=GUARD))
    assert decision == (policy.VERBATIM if passes else policy.FORBIDDEN)


def test_fields_are_read_even_where_empty() -> None:
    made = read_head(b"\r\nGET / HTTP/1.1\r\n" + HOST + b"X-Empty:\r\nY:  z \r\n\r\n")
    assert isinstance(made, Head)
    assert made.fields() == [(b"host", b"localhost:11434"), (b"x-empty", b""), (b"y", b"z")]


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@given(cuts=st.sets(st.integers(1, 400), max_size=20))
def test_the_watcher_counts_answers_wherever_they_are_cut(cuts: set[int]) -> None:
    watcher = ResponseWatcher()
    for kind in (HEAD, PLAIN, PLAIN, PLAIN, PLAIN):
        watcher.expect(kind)
    stream = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"
        + b"HTTP/1.1 100 Continue\r\n\r\n" + OK
        + b"HTTP/1.1 204 No Content\r\n\r\n"
        + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"0\r\n\r\n")
        + OK
    )  # fmt: skip
    parts = pieces_of(stream, cuts)
    for part in parts[:-1]:
        watcher.feed(part)
    assert watcher.owed >= 1
    watcher.feed(parts[-1])
    assert watcher.owed == 0 and not watcher.blind


def test_the_watcher_goes_blind_rather_than_wrong() -> None:
    for stream in (b"nonsense\r\n\r\n", OK + OK, OK + b"x"):
        watcher = ResponseWatcher()
        watcher.expect(PLAIN)
        watcher.feed(stream)
        watcher.feed(b"more")
        assert watcher.blind
    watcher = ResponseWatcher()
    watcher.feed(OK)
    assert watcher.blind


def test_the_watcher_sees_a_switch() -> None:
    for kind, stream in (
        (PLAIN, b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n\x00"),
        (PLAIN, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        (TUNNEL, b"HTTP/1.1 200 OK\r\n\r\nraw"),
    ):
        watcher = ResponseWatcher()
        watcher.expect(kind)
        watcher.feed(stream)
        assert watcher.switched
