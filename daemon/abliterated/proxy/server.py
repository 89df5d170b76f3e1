"""Listeners, counters and the way in and out: `Proxy` inside a running loop.

Does not know: HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from abliterate.contract.errors import RecipeError
from abliterated.proxy import listen as addresses
from abliterated.proxy import missing, policy, routing
from abliterated.proxy.access import AccessLog
from abliterated.proxy.assist import Assistant, Wanted
from abliterated.proxy.headers import HostGuard
from abliterated.proxy.marks import Mark, Tally
from abliterated.proxy.relay import KNOWN_BYTES, Link
from abliterated.proxy.wiring import Timing

if TYPE_CHECKING:
    from abliterated.proxy.gate import Gate

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
_REMARK_SECONDS: Final = 5.0
_REMEMBER_REQUESTS: Final = 256
SETTLE_SECONDS: Final = 0.3  # for connections accepted but not yet attached, and for idle clients' last requests


class Steering(msgspec.Struct, frozen=True):
    """What a person has said of names, and of what is noted. `others`: pattern and URL of each further upstream."""

    patterns: tuple[str, ...] = ("*-abliterated",)
    aliases: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    hold_seconds: float = 60.0
    observe: bool = False
    access_log: str = ""

    def rules(self) -> routing.Rules:
        numbered = [(pattern, number) for number, (pattern, _) in enumerate(self.others, 1)]
        return routing.make_rules(list(self.patterns), dict(self.aliases), numbered)


class Stats(msgspec.Struct, frozen=True):
    """Counted since the start; `connections` open now and `in_flight` are of this moment."""

    accepted: int = 0
    connections: int = 0
    requests: int = 0
    in_flight: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    upstream_errors: int = 0


class Proxy:
    """The relay between the port clients know and Ollama.

    `listen` is one address or several; `sockets` are already bound ones (socket activation), and may replace it.
    """

    def __init__(
        self,
        listen: str | Iterable[str],
        upstream: str,
        *,
        allow_remote: bool = False,
        allowed_hosts: Iterable[str] = (),
        sockets: Sequence[socket.socket] = (),
        timing: Timing | None = None,
        steering: Steering | None = None,
        remark: missing.Remark = missing.remark_command,
    ) -> None:
        texts = [listen] if isinstance(listen, str) else list(listen)
        self._listen = [addresses.parse_listen(text) for text in texts if text]
        others = steering.others if steering else ()
        self._upstreams = [addresses.parse_upstream(url) for url in (upstream, *(url for _, url in others))]
        self._given = list(sockets)
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        if not self._listen and not self._given:
            raise RecipeError("the proxy has no address to listen on", remedy="name one, such as 127.0.0.1:11434")
        if not allow_remote:
            for address in (*self._listen, *map(addresses.bound_address, self._given)):
                if not address.loopback:
                    raise RecipeError(
                        f"listening on {address} gives everyone who reaches this machine the use of Ollama, which asks "
                        "for no password: they can run, replace and delete models",
                        remedy="listen on 127.0.0.1, or allow remote clients explicitly if that is meant",
                    )
        self.timing = timing or Timing()
        self.upstream_names = [str(address) for address in self._upstreams]
        self._view = policy.View()
        if steering is not None:
            self._view = policy.View(
                rules=steering.rules(), hold_seconds=steering.hold_seconds, observe=steering.observe
            )
        self._remark = remark
        self.assistant: Assistant | None = None
        self.wanted: Wanted | None = None
        self.waiting: set[Gate] = set()
        self.held_bytes = 0
        self.tally = Tally()
        self.access = AccessLog(steering.access_log) if steering and steering.access_log else None
        self.known: set[bytes] = set()  # whole requests that go on as they are
        self.links: set[Link] = set()
        self.draining = False
        self.succeeded = False  # somebody else serves our sockets now
        self._bound: list[addresses.Address] = []
        self._made: dict[str, int] = {}  # unix sockets we made, and their inodes
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._accepted = self._requests = self._up = self._down = self._errors = 0
        self._emptied = asyncio.Event()

    async def start(self) -> None:
        """Bind and serve; every address or none."""
        self.loop = asyncio.get_running_loop()
        bound: list[socket.socket] = []
        try:
            for address in self._listen:
                bound += addresses.bind(address)
            mine = [addresses.bound_address(listener) for listener in (*self._given, *bound)]
            for upstream in self._upstreams:
                if upstream.literal:  # a process of one thread reads and writes the cheaper
                    addresses.check_not_self(mine, upstream)
                else:
                    await asyncio.to_thread(addresses.check_not_self, mine, upstream)
            if self.access is not None:
                self.access.open(self.loop)
        except BaseException:
            for listener in bound:
                listener.close()
            raise
        self._sockets = [*self._given, *bound]
        self._bound = mine
        self._made = addresses.inodes(map(addresses.bound_address, bound))
        upstream = self._upstreams[0]
        if upstream.loopback and not all(address.loopback for address in mine):
            guard = HostGuard(
                socket.gethostname(),
                addresses.machine_addresses(),
                self._allowed_hosts,
                f"localhost:{upstream.port}" if upstream.port else "localhost",
            )
            self.change(guard=guard)
        for listener in self._sockets:
            listener.setblocking(False)
            addresses.keep_alive(listener)
            if listener.family == socket.AF_UNIX:
                server = await self.loop.create_unix_server(self._link, sock=listener, backlog=4096)
            else:
                server = await self.loop.create_server(self._link, sock=listener, backlog=4096)
            self._servers.append(server)
        log.info("listening on %s for %s", self.addresses, self.upstream_names[0], extra={"action": "proxy_started"})

    @property
    def addresses(self) -> list[str]:
        """Where it listens, ports filled in."""
        return [str(address) for address in self._bound]

    @property
    def stats(self) -> Stats:
        links = self.links
        return Stats(
            accepted=self._accepted,
            connections=len(links),
            requests=self._requests + sum(link.requests for link in links),
            in_flight=sum(link.in_flight for link in links),
            bytes_up=self._up + sum(link.bytes_up for link in links),
            bytes_down=self._down + sum(link.bytes_down for link in links),
            upstream_errors=self._errors,
        )

    @property
    def sockets(self) -> list[socket.socket]:
        """The listeners, for a successor."""
        return self._sockets

    async def close(self, drain_seconds: float = DRAIN_SECONDS, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        """Stop accepting, let what is under way end, then leave; after `drain_seconds` cut what is left.

        Idle clients are let go after `settle_seconds`: each may send one more request till then, and is told that it
        was the last.

        A listener shared with a service manager keeps its backlog for whoever comes next.
        """
        if self.draining:
            return
        self.draining = True
        for link in self.links:
            link.drain()
        await self._stop_accepting()
        log.info("draining %d connections", len(self.links), extra={"action": "proxy_draining"})
        deadline = self.loop.time() + drain_seconds
        await self._wait_empty(min(settle_seconds, drain_seconds))
        for link in list(self.links):
            link.retire()
        await self._wait_empty(deadline - self.loop.time())
        cut = list(self.links)
        for link in cut:
            link.client.abort()
        await self._wait_empty(1.0)
        if cut:
            log.warning("cut %d connections", len(cut), extra={"action": "proxy_cut"})
        if self.access is not None:
            await self.access.close()
        if not self.succeeded:
            addresses.unlink(self._made)

    async def _stop_accepting(self) -> None:
        if not type(self.loop).__module__.startswith("uvloop"):
            # asyncio accepts in one step and attaches in another; closing between the two would lose the client.
            for listener in self._sockets:
                self.loop.remove_reader(listener.fileno())
            await asyncio.sleep(SETTLE_SECONDS)
        await asyncio.sleep(0)  # a last round of accepting: an own listener's backlog dies with it
        for server in self._servers:
            server.close()

    async def _wait_empty(self, seconds: float) -> None:
        if self.links and seconds > 0:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), seconds)

    # what a link needs

    def _link(self) -> Link:
        self._accepted += 1
        return Link(self)

    async def dial(self, factory: Callable[[], asyncio.BaseProtocol], where: int) -> object:
        address = self._upstreams[where]
        if address.path:
            return await self.loop.create_unix_connection(factory, address.path)
        return await self.loop.create_connection(factory, address.host, address.port)

    @property
    def view(self) -> policy.View:
        return self._view

    def change(self, **what: Any) -> None:
        """Replace parts of the view; what waited for that goes on."""
        self._view = msgspec.structs.replace(self._view, **what)
        self.known.clear()
        if self._view.busy == "share":
            for gate in list(self.waiting):
                gate.device_is_free()

    def arm(self) -> None:
        """An abliterated model exists: from now on requests for one are offered to the assistant."""
        if self.assistant is not None and not self._view.assist:
            self.change(assist=True)

    def remember(self, raw: bytes) -> None:
        if len(raw) <= KNOWN_BYTES and self.access is None:
            if len(self.known) >= _REMEMBER_REQUESTS:
                self.known.clear()
            self.known.add(raw)

    def retire(self, link: Link) -> None:
        """A link has ended: keep its counts."""
        self.links.discard(link)
        self._requests += link.requests
        self._up += link.bytes_up
        self._down += link.bytes_down
        if not self.links:
            self._emptied.set()

    def upstream_failed(self, error: OSError, where: int) -> str:
        name = self.upstream_names[where]
        if not self._errors:
            log.warning("can't reach %s: %s", name, error, extra={"action": "upstream_unreachable"})
        self._errors += 1
        return name

    def finished(self, client: asyncio.Transport, mark: Mark, size: int) -> None:
        now = self.loop.time()
        if mark.route:
            self.tally.ended(mark, now)
        if self.access is not None:
            self.access.note(addresses.peer_of(client), mark, now, size)

    async def amend(self, client: asyncio.Transport, answer: bytes, mark: Mark) -> bytes:
        """The 404 for an abliterated model, with what there is to say behind it."""
        place = mark.missing
        assert place is not None
        self.tally.of(mark.route, mark.model).missing += 1
        missed = missing.Missed(place.name, place.base, missing.command_for(place), addresses.is_local(client))
        try:
            remark = await asyncio.wait_for(self._remark(missed), _REMARK_SECONDS)
        except Exception:
            log.exception("no remark on %s", place.name, extra={"action": "remark_failed"})
            remark = await missing.remark_command(missed)
        return missing.amended(answer, remark) if remark else answer


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
