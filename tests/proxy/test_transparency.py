"""Every byte, both ways, and every ending: the same with the proxy between as without."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterated.proxy.assist import Asked, Outlet
from abliterated.proxy.server import Steering, new_event_loop
from proxy.corpus import CHAT, CORPUS, GET, NDJSON, VERSION, Exchange, chunk, post, request
from proxy.routes_corpus import ALL
from proxy.script import Read, ReadAll, Running, ScriptedUpstream, Send, converse, proxy, upstream


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedUpstream]:
    with upstream() as scripted:
        yield scripted


async def no_help(asked: Asked, outlet: Outlet) -> bool:
    raise AssertionError("an ordinary model was offered to the assistant")


@pytest.fixture(scope="module", params=["uvloop", "asyncio", "everything on", "logged"])
def relay(request: pytest.FixtureRequest, server: ScriptedUpstream, tmp_path_factory: Any) -> Iterator[Running]:
    factory = asyncio.new_event_loop if request.param == "asyncio" else new_event_loop
    steering = None
    if request.param == "everything on":
        # Names are waited for, figures kept, an assistant stands ready: ordinary models must not notice.
        aliases = (("qwen3:8b-abliterated", "qwen3-abliterated:8b"),)
        steering = Steering(aliases=aliases, others=(("*-abliterated", "http://127.0.0.1:1"),), observe=True)
    elif request.param == "logged":
        steering = Steering(observe=True, access_log=str(tmp_path_factory.mktemp("log") / "access.log"))
    with proxy(server.url, factory=factory, steering=steering) as running:
        if request.param == "everything on":
            running.proxy.assistant = no_help
            running.loop.call_soon_threadsafe(lambda: running.proxy.change(assist=True))
        yield running


def test_the_corpus_is_large_enough() -> None:
    assert len(ALL) >= 200
    assert len({exchange.name for exchange in ALL}) == len(ALL)


@pytest.mark.parametrize("exchange", ALL, ids=lambda exchange: exchange.name)
def test_an_exchange_is_the_same_directly_and_through_the_proxy(
    server: ScriptedUpstream, relay: Running, exchange: Exchange
) -> None:
    if not exchange.upstream:
        # Nothing said, nothing forwarded: the upstream is not even called.
        with relay.connect() as connection:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        assert server.heard.empty()
        return
    direct = converse(server, server.url, exchange.client, exchange.upstream)
    relayed = converse(server, relay.address, exchange.client, exchange.upstream)
    assert "timed out" not in (direct[0].ending, direct[1].ending)
    assert relayed == direct


def loopback_6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("family", ["IPv6", "unix"])
def test_other_families_carry_the_same_bytes(family: str, tmp_path: Path) -> None:
    kind = socket.AF_INET6 if family == "IPv6" else socket.AF_UNIX
    if family == "IPv6" and not loopback_6():
        pytest.skip("this machine has no IPv6 loopback")
    listen = "[::1]:0" if family == "IPv6" else f"unix:{tmp_path}/front"
    with upstream(kind, str(tmp_path / "back")) as server, proxy(server.url, listen) as running:
        for exchange in CORPUS[:30]:
            direct = converse(server, server.url, exchange.client, exchange.upstream)
            assert converse(server, running.address, exchange.client, exchange.upstream) == direct, exchange.name
    assert not (tmp_path / "front").exists()


REQUESTS = [
    GET,
    post(b"/api/chat", CHAT),
    request(
        b"POST /x", b"Transfer-Encoding: chunked\r\n", chunk(b"abc", b"0\r\n\r\n", b"d" * 40, trailers=b"T: v\r\n")
    ),
    request(b"BREW /c", b"Content-Length: 3\r\n", b"\r\n\r"),
]


@settings(max_examples=60, deadline=None)
@given(picks=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4), data=st.data())
def test_wherever_the_network_cuts_the_upstream_hears_the_same(
    split_server: tuple[ScriptedUpstream, Running], picks: list[bytes], data: st.DataObject
) -> None:
    server, running = split_server
    whole = b"".join(picks)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    answers = VERSION * len(picks)
    client = (*map(Send, pieces), Read(len(answers)))
    mine, theirs = converse(server, running.address, client, (Read(len(whole)), Send(answers), ReadAll()))
    assert (mine.data, theirs.data, theirs.ending) == (answers, whole, "end of file")


@pytest.fixture(scope="module", params=[None, Steering(aliases=(("a", "b"),), observe=True)], ids=["off", "on"])
def split_server(request: pytest.FixtureRequest) -> Iterator[tuple[ScriptedUpstream, Running]]:
    with upstream() as scripted, proxy(scripted.url, steering=request.param) as running:
        yield scripted, running


def test_nodelay_is_set_towards_both_sides(server: ScriptedUpstream, relay: Running) -> None:
    seen: list[int] = []
    server.scripts.put((Read(len(GET)), Send(NDJSON), ReadAll()))
    with relay.connect() as connection:
        connection.sendall(GET)
        assert connection.recv(1)
        for link in list(relay.proxy.links):
            for transport in (link.client, link._upstream):
                assert transport is not None
                seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            # A client that vanishes without a word is noticed, as Ollama itself would.
            seen.append(link.client.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
    assert server.heard.get(timeout=60)
    assert seen and all(seen)
