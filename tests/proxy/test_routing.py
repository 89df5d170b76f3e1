"""Names lead where a person has said; what is not spoken of goes on as it came."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import RecipeError
from abliterated.proxy import missing
from abliterated.proxy.payload import ZSTD
from abliterated.proxy.routing import Place, Rules, make_rules, place_of
from abliterated.proxy.server import Steering
from proxy.corpus import CHAT, GET, NDJSON, VERSION, answer, chunk, post, request
from proxy.script import DEADLINE, Read, ReadAll, Running, ScriptedUpstream, Send, converse, play, proxy, upstream

ALIAS = Steering(aliases=(("qwen3:8b-abliterated", "qwen3-abliterated:8b"),))


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedUpstream]:
    with upstream() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def aliased(server: ScriptedUpstream) -> Iterator[Running]:
    with proxy(server.url, steering=ALIAS) as running:
        yield running


# --- pure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "base", "by_default"),
    [
        ("qwen3-abliterated:8b", "qwen3:8b", True),
        ("Qwen3-Abliterated", "Qwen3:latest", False),
        ("qwen3:8b-abliterated", "qwen3:8b", False),
        ("library/qwen3-abliterated:8b", "qwen3:8b", True),
        ("me/qwen3-abliterated:8b", "me/qwen3:8b", True),
        ("https://registry.ollama.ai/library/qwen3-abliterated:8b", "qwen3:8b", True),
        ("qwen3-abliterated:8b:local", "qwen3:8b", True),
    ],
)
def test_an_abliterated_name_tells_its_base(said: str, base: str, by_default: bool) -> None:
    place = place_of(said, Rules())
    assert (place.abliterated, place.base, place.said_by_default) == (True, base, by_default)


@pytest.mark.parametrize(
    "said", ["qwen3:8b", "abliterated", "qwen3-abliterated-2:8b", "", "a b", "x:y:z", "/", "-abliterated"]
)
def test_other_names_are_nobodys(said: str) -> None:
    place = place_of(said, Rules())
    assert not place.abliterated and place.upstream == 0 and not place.renamed


def test_patterns_of_other_shapes_match_and_give_a_base_where_one_can_be_told() -> None:
    rules = make_rules(["*-uncensored", "free-*", "*:8b"], {}, [])
    assert place_of("a:free-1b", rules).base == "a:1b", "the tag alone is looked at, too"
    assert place_of("a-uncensored", rules).base == "a:latest"
    assert place_of("free-a:1b", rules).base == "a:1b"
    assert place_of("a:8b", rules).abliterated and place_of("a:8b", rules).base == ""


def test_an_alias_is_found_in_every_spelling_of_its_name_and_its_target_decides() -> None:
    rules = make_rules(["*-abliterated"], {"qwen3:8b-abliterated": "qwen3-abliterated:8b"}, [("qwen3-abliterated*", 1)])
    for said in ("qwen3:8b-abliterated", "QWEN3:8B-Abliterated", "library/qwen3:8b-abliterated"):
        place = place_of(said, rules)
        assert (place.name, place.renamed, place.upstream) == ("qwen3-abliterated:8b", True, 1)
    assert place_of("qwen3:8b", rules) == Place("qwen3:8b", False, 0, False, False, "", True)


def test_cloud_models_are_known() -> None:
    assert place_of("gpt-oss:120b-cloud", Rules()).cloud and place_of("kimi:cloud", Rules()).cloud
    assert not place_of("cloud:8b", Rules()).cloud


@pytest.mark.parametrize(
    ("patterns", "aliases", "others"),
    [([""], {}, []), ([], {"a b": "c"}, []), ([], {"a": "c d"}, []), ([], {}, [(" ", 1)])],
)
def test_wrong_rules_are_refused(patterns: list[str], aliases: dict[str, str], others: list[tuple[str, int]]) -> None:
    with pytest.raises(RecipeError):
        make_rules(patterns, aliases, others)


# --- aliases --------------------------------------------------------------------------------------------------------

OLD, NEW = b'"qwen3:8b-abliterated"', b'"qwen3-abliterated:8b"'
SHORT, LONG = b'"a"', b'"some-longer-name:8b"'


@pytest.fixture(scope="module")
def lengthening(server: ScriptedUpstream) -> Iterator[Running]:
    with proxy(server.url, steering=Steering(aliases=(("a", "some-longer-name:8b"),))) as running:
        yield running


BODIES = [
    b'{"model":"a","messages":[]}',
    b'{"messages":[{"role":"user","content":"model \\"a\\""}],"model" : "a" , "stream":false}',
    b'{"images":["' + b"QUJD" * 50_000 + b'"],"model":"a"}',
]


@pytest.mark.parametrize("body", BODIES, ids=["first", "behind", "last, after an image"])
@pytest.mark.parametrize(
    "path", [b"/api/chat", b"/api/generate", b"/v1/chat/completions", b"/v1/messages", b"/api/show"]
)
def test_an_alias_changes_the_name_and_the_length_and_nothing_else(
    server: ScriptedUpstream, lengthening: Running, path: bytes, body: bytes
) -> None:
    sent = post(path, body, b"X-Odd:  kept \r\n")
    place = body.rindex(SHORT)
    expected = post(path, body[:place] + LONG + body[place + len(SHORT) :], b"X-Odd:  kept \r\n")
    mine, theirs = converse(
        server, lengthening.address, (Send(sent), Read(len(VERSION))), (Read(len(expected)), Send(VERSION), ReadAll())
    )
    assert theirs.data == expected and mine.data == VERSION


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_alias_in_a_chunked_body_wherever_chunks_and_network_cut(
    chunked_pair: tuple[ScriptedUpstream, Running], data: st.DataObject
) -> None:
    server, running = chunked_pair
    body = b'{"messages":[{"content":"hi"}],"model":"a","stream":true}'
    edges = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=5)))
    pieces = [body[start:end] for start, end in zip([0, *edges], [*edges, len(body)], strict=True)]
    sent = request(b"POST /api/chat", b"Transfer-Encoding: chunked\r\n", chunk(*pieces, trailers=b"T: v\r\n"))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sent) - 1), max_size=6)))
    client = [Send(sent[start:end]) for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    heard: list[bytes] = []

    def script(connection: socket.socket):  # type: ignore[no-untyped-def]
        whole = b""
        while b"T: v\r\n\r\n" not in whole:
            whole += connection.recv(65536)
        heard.append(whole)
        connection.sendall(VERSION)
        return play(connection, (ReadAll(),))

    server.scripts.put(script)
    from proxy.script import connect

    mine = play(connect(running.address), (*client, Read(len(VERSION))))
    server.heard.get(timeout=DEADLINE)
    assert mine.data == VERSION
    head, _, framed = heard[0].partition(b"\r\n\r\n")
    assert head + b"\r\n\r\n" == sent.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert unchunk(framed) == body.replace(SHORT, LONG)
    assert framed.endswith(b"0\r\nT: v\r\n\r\n")


@pytest.fixture(scope="module")
def chunked_pair(lengthening: Running, server: ScriptedUpstream) -> tuple[ScriptedUpstream, Running]:
    return server, lengthening


def unchunk(framed: bytes) -> bytes:
    content = b""
    while True:
        size, _, framed = framed.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            return content
        assert framed[length : length + 2] == b"\r\n"
        content, framed = content + framed[:length], framed[length + 2 :]


@pytest.mark.skipif(ZSTD is None, reason="no zstd module here")
@pytest.mark.parametrize("chunked", [False, True])
def test_an_alias_in_a_zstd_body_goes_on_unpacked(
    server: ScriptedUpstream, lengthening: Running, chunked: bool
) -> None:
    body = b'{"input":"hi","model":"a"}'
    packed = ZSTD.compress(body)
    encoding = b"Content-Encoding: zstd\r\n"
    if chunked:
        framed = chunk(packed[:5], packed[5:])
        sent = request(b"POST /v1/responses", encoding + b"Transfer-Encoding: chunked\r\nX: y\r\n", framed)
    else:
        sent = post(b"/v1/responses", packed, encoding + b"X: y\r\n")
    changed = body.replace(SHORT, LONG)
    expected = request(b"POST /v1/responses", b"X: y\r\nContent-Length: %d\r\n" % len(changed), changed)
    _, theirs = converse(
        server, lengthening.address, (Send(sent), Read(len(VERSION))), (Read(len(expected)), Send(VERSION), ReadAll())
    )
    assert theirs.data == expected


@pytest.mark.skipif(ZSTD is None, reason="no zstd module here")
def test_a_zstd_body_that_names_another_model_and_one_that_is_none_go_on_as_they_came(
    server: ScriptedUpstream, lengthening: Running
) -> None:
    for packed in (
        ZSTD.compress(b'{"model":"b"}'),
        b"no zstd at all",
        ZSTD.compress(b'{"x":"' + bytes(80_000_000) + b'"}'),
    ):
        sent = post(b"/v1/responses", packed, b"Content-Encoding: zstd\r\n")
        _, theirs = converse(
            server, lengthening.address, (Send(sent), Read(len(VERSION))), (Read(len(sent)), Send(VERSION), ReadAll())
        )
        assert theirs.data == sent


def test_a_client_that_waits_for_100_continue_gets_it_while_its_name_is_looked_for(
    server: ScriptedUpstream, lengthening: Running
) -> None:
    body = b'{"model":"a"}'
    head = request(b"POST /api/chat", b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(body))
    changed = body.replace(SHORT, LONG)
    expected = request(b"POST /api/chat", b"Content-Length: %d\r\n" % len(changed), changed)
    going = b"HTTP/1.1 100 Continue\r\n\r\n"
    mine, theirs = converse(
        server,
        lengthening.address,
        (Send(head), Read(len(going)), Send(body), Read(len(VERSION))),
        (Read(len(expected)), Send(VERSION), ReadAll()),
    )
    assert theirs.data == expected and mine.data == going + VERSION


def test_a_body_that_never_comes_whole_goes_on_as_far_as_it_came(server: ScriptedUpstream, aliased: Running) -> None:
    from proxy.script import HalfClose

    sent = request(b"POST /api/chat", b"Content-Length: 100\r\n", b'{"messages":[')
    refusal = answer(b'{"error":"unexpected EOF"}', status=b"400 Bad Request")
    client = (Send(sent), HalfClose(), ReadAll())
    script = (ReadAll(), Send(refusal))
    assert converse(server, aliased.address, client, script) == converse(server, server.url, client, script)


# --- further upstreams ----------------------------------------------------------------------------------------------


def test_requests_on_one_connection_lead_to_several_upstreams_in_order() -> None:
    with upstream() as first, upstream() as second:
        steering = Steering(others=(("*:70b", second.url),))
        with proxy(first.url, steering=steering) as running:
            big = post(b"/api/chat", b'{"model":"llama:70b"}')
            small = post(b"/api/chat", CHAT)
            here, there = answer(b"here"), answer(b"there")
            first.scripts.put((Read(len(small)), Send(here), ReadAll()))
            second.scripts.put((Read(len(big)), Send(there), ReadAll()))
            first.scripts.put((Read(len(small + GET)), Send(here + VERSION), ReadAll()))
            # The second pipelined pair must wait for the answers before it.
            whole = here + there + here + VERSION
            with running.connect() as connection:
                mine = play(connection, (Send(small + big + small + GET), Read(len(whole))))
            assert mine.data == whole
            assert first.heard.get(timeout=DEADLINE).data == small
            assert second.heard.get(timeout=DEADLINE).data == big
            assert first.heard.get(timeout=DEADLINE).data == small + GET


def test_an_upstream_that_is_down_is_named(server: ScriptedUpstream) -> None:
    with proxy(server.url, steering=Steering(others=(("*:70b", "http://127.0.0.1:1"),))) as running:
        sent = post(b"/v1/chat/completions", b'{"model":"llama:70b"}')
        with running.connect() as connection:
            mine = play(connection, (Send(sent), ReadAll()))
        assert mine.data.startswith(b"HTTP/1.1 502 ")
        said = json.loads(mine.data.partition(b"\r\n\r\n")[2])
        assert "127.0.0.1:1" in said["error"]["message"]


# --- a model that could be made -------------------------------------------------------------------------------------

SHAPES = [
    (b"/api/chat", b'{"error":"model \'x\' not found"}', lambda said: said["error"]),
    (
        b"/v1/chat/completions",
        b'{"error":{"message":"model \'x\' not found","type":"not_found_error","param":null,"code":null}}',
        lambda said: said["error"]["message"],
    ),
    (
        b"/v1/messages",
        b'{"type":"error","error":{"type":"not_found_error","message":"model \'x\' not found"}}\n',
        lambda said: said["error"]["message"],
    ),
]


@pytest.mark.parametrize(("path", "body", "pick"), SHAPES, ids=["ollama", "openai", "anthropic"])
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_missing_abliterated_model_is_answered_with_ollamas_404_and_the_command(path, body, pick, cut) -> None:  # type: ignore[no-untyped-def]
    with upstream() as server, proxy(server.url, steering=Steering()) as running:
        sent = post(path, b'{"model":"qwen3:8b-abliterated"}')
        reply = answer(body, b"Content-Type: application/json; charset=utf-8\r\nDate: now\r\n", b"404 Not Found")
        # Twice on one connection: the answer's changed length must not upset what follows.
        script = (Read(len(sent)), Send(reply, cut), Read(len(GET)), Send(VERSION), ReadAll())
        server.scripts.put(script)
        with running.connect() as connection:
            connection.settimeout(DEADLINE)
            connection.sendall(sent)
            mine = b""
            while b"abliterate submit" not in mine or not mine.rstrip().endswith(b"}"):
                mine += connection.recv(65536)
            connection.sendall(GET)
            assert connection.recv(65536) == VERSION
        head, _, said = mine.partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % len(said) in head and b"Date: now" in head
        text = pick(json.loads(said))
        assert text == "model 'x' not found; make it with: abliterate submit qwen3:8b --name qwen3:8b-abliterated"
        assert said.endswith(b"\n") == body.endswith(b"\n")


@pytest.mark.parametrize(
    "reply",
    [
        answer(b"404 page not found", status=b"404 Not Found"),
        answer(b'{"error":"something else"}', status=b"404 Not Found"),
        answer(b"[1]", status=b"404 Not Found"),
        answer(b'{"error":"model not found"}', status=b"400 Bad Request"),
        b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b'{"error":"model not found"}'),
        answer(b'{"error":"' + b"x" * 9000 + b' not found"}', status=b"404 Not Found"),
        NDJSON,
    ],
    ids=["text", "another error", "a list", "400", "chunked", "long", "a stream"],
)
def test_every_other_answer_for_such_a_model_goes_through_as_it_came(reply: bytes) -> None:
    with upstream() as server, proxy(server.url, steering=Steering(observe=True)) as running:
        sent = post(b"/api/chat", b'{"model":"qwen3-abliterated:8b"}')
        mine, _ = converse(
            server, running.address, (Send(sent), Read(len(reply))), (Read(len(sent)), Send(reply, 50), ReadAll())
        )
        assert mine.data == reply


def test_a_404_cut_short_by_the_upstream_reaches_the_client_as_far_as_it_came() -> None:
    with upstream() as server, proxy(server.url, steering=Steering()) as running:
        sent = post(b"/api/chat", b'{"model":"qwen3-abliterated:8b"}')
        half = answer(b'{"error":"model not found"}', status=b"404 Not Found")[:-9]
        mine, _ = converse(server, running.address, (Send(sent), ReadAll()), (Read(len(sent)), Send(half)))
        assert mine.data == half


async def test_the_remark_may_say_something_else_and_a_failing_one_falls_back_to_the_command() -> None:
    async def queued(missed: missing.Missed) -> str:
        assert missed.loopback and missed.base == "qwen3:8b"
        return "queued as job 1"

    async def broken(missed: missing.Missed) -> str:
        raise OSError

    sent = post(b"/api/chat", b'{"model":"qwen3-abliterated:8b"}')
    reply = answer(b'{"error":"model \'x\' not found"}', status=b"404 Not Found")
    for remark, expected in ((queued, b"queued as job 1"), (broken, b"abliterate submit qwen3:8b")):
        with upstream() as server, proxy(server.url, steering=Steering(), remark=remark) as running:
            server.scripts.put((Read(len(sent)), Send(reply), ReadAll()))
            with running.connect() as connection:
                connection.settimeout(DEADLINE)
                connection.sendall(sent)
                assert expected in connection.recv(65536)
