"""One request while its model is looked for, and for as long as it is held.

A gate that does not hold only looks: the bytes are on their way already. One that holds lets the request go when the
name is known or can't be found within the limits, when the device is free, when an assistant declined, renamed where an
alias says so. What is held is bounded for each request and for all of them together.

Does not know: how bytes reach either side (`relay`), what the decision is (`policy`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import TYPE_CHECKING, Final

import msgspec

from abliterated.proxy import answers, policy
from abliterated.proxy.assist import Asked
from abliterated.proxy.finder import Found, ModelFinder
from abliterated.proxy.framing import CHUNKED, Event, Head
from abliterated.proxy.marks import COUNTING_BYTES, Mark
from abliterated.proxy.payload import Payload
from abliterated.proxy.routing import UNKNOWN, Place
from abliterated.proxy.wiring import House

if TYPE_CHECKING:
    from abliterated.proxy.relay import Link

log = logging.getLogger(__name__)

HELD_LIMIT: Final = 32 * 1024 * 1024  # of one request's body
HELD_TOTAL: Final = 256 * 1024 * 1024  # of all that are held
_CLOSE = re.compile(rb"\r\nconnection:[^\r]*\bclose\b", re.IGNORECASE)
_EXPECT = re.compile(rb"(?<=\r\n)expect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)


class Gate:
    """Made at the request's head; told of its body; gone when the request has left."""

    __slots__ = (
        "_content", "_finder", "_found", "_head", "_house", "_link", "_look", "_mark", "_parked", "_payload", "_place",
        "_raw", "_ready", "_size", "_task", "_timer", "_told", "_waiting", "_wire", "_wrote", "ended", "holding",
        "known", "queue",
    )  # fmt: skip

    def __init__(self, link: Link, house: House, head: Head, raw: bytes, look: policy.Look, mark: Mark) -> None:
        self._link = link
        self._house = house
        self._head = head
        self._raw = raw
        self._look = look
        self._mark = mark
        self.holding = look.hold
        self.ended = False  # the body is whole
        self.known = False  # the name is, or it is known that there is none
        self.queue: list[Event] = []  # what came behind this request
        self._payload = Payload(head, HELD_LIMIT)
        self._finder = ModelFinder(second=look.route.second)
        self._found: Found | None = None
        self._place: Place = UNKNOWN
        self._wire: list[bytes] = []
        self._content: list[bytes] | None = [] if head.length == CHUNKED or self._payload.packed else None
        self._size = 0
        self._waiting = self._wrote = False
        self._told = 0
        self._parked: Place | None = None  # where it goes once the answers before it are through
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        if self.holding and _EXPECT.search(raw):
            if link.watcher.owed:
                self.holding = False  # the order of answers counts for more than the name
            else:
                link.client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._raw = _EXPECT.sub(b"", raw)

    # the body

    def take(self, data: bytes, end: bool) -> None:
        """A piece of the body, framing included."""
        self.ended = end
        payload = self._payload
        content = payload.feed(data) if payload.readable else b""
        if self.holding:
            self._wire.append(data)
            size = len(data)
            if self._content is not None:
                self._content.append(content)
                size += len(content)
            self._size += size
            self._house.held_bytes += size
            if self._size > HELD_LIMIT or self._house.held_bytes > HELD_TOTAL:
                self._link.pause_client()
        if not self.known:
            self.known = self._finder.feed(content) or end or not payload.readable or self._too_much
            if not self.known:
                return
            self._found = self._finder.found if payload.readable else None
            self._learn()
        if self.holding:
            self._decide()
        elif self.known:
            self._link.passed(self)

    @property
    def _too_much(self) -> bool:
        return self._size > HELD_LIMIT or self._payload.overflowed or self._house.held_bytes > HELD_TOTAL

    def _learn(self) -> None:
        self._place = place = policy.place(self._found.name if self._found else None, self._house.view)
        self._mark.model = place.name
        if place.abliterated and self._look.route.inference and not self._link.watcher.started:
            self._mark.missing = place
            self._house.arm()

    # the decision

    def wait_in_turn(self) -> None:
        """No name matters; only the answers before it."""
        self.known = True
        self.ended = not self._head.length
        self._decide()

    def _decide(self) -> None:
        """The name is known: on, or wait for something else."""
        if self._waiting or self._task is not None or self._parked is not None:
            return
        house, place = self._house, self._place
        fate = policy.fate(self._look.route, place, house.view)
        if fate == "reject":
            self._reject()
        elif fate == "wait":
            self._waiting = True
            house.waiting.add(self)
            house.tally.of(self._mark.route, self._mark.model).held += 1
            self._timer = house.loop.call_later(house.view.hold_seconds, self._reject)
        elif fate == "assist" and self._wanted(place):
            if self.ended:
                self._start_when_free(place)
        elif place.renamed and self._payload.packed and not self.ended and not self._too_much:
            pass  # only a whole packed body can be changed
        else:
            self._start_when_free(place)

    def _wanted(self, place: Place) -> bool:
        if self._too_much or not self._payload.readable or self._house.assistant is None:
            return False
        return self._house.wanted is None or self._house.wanted(self._look.route.name, place.name)

    def device_is_free(self) -> None:
        """The job is over, or the policy has changed."""
        self._stop_waiting()
        self._decide()

    def _stop_waiting(self) -> None:
        self._waiting = False
        self._house.waiting.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _reject(self) -> None:
        self._stop_waiting()
        self._link.refuse(answers.for_request(policy.busy_answer(self._house.view), self._head))

    def _start_when_free(self, place: Place) -> None:
        """Another upstream, or an assistant, can speak only when nothing is owed before."""
        assisted = policy.fate(self._look.route, place, self._house.view) == "assist" and self._wanted(place)
        if self._link.watcher.owed and (assisted or place.upstream != self._link.where):
            self._parked = place
            return
        if assisted and self.ended:
            self._task = self._house.loop.create_task(self._assist(place))
        else:
            self._go(place)

    def answers_are_through(self) -> None:
        if self._parked is not None:
            place, self._parked = self._parked, None
            self._start_when_free(place)

    def give_up(self) -> None:
        """The rest will not come: what there is goes on as it came."""
        self._stop_waiting()
        if self._link.where and self._link.watcher.owed:
            self._link.client.abort()  # answers of another upstream come first, and nobody knows what to then
        else:
            self._go(UNKNOWN)

    def _go(self, place: Place) -> None:
        wire = b"".join(self._wire)
        data = self._raw + wire
        changeable = self._payload.readable and (not self._payload.packed or (self.ended and not self._too_much))
        if place.renamed and self._found is not None and changeable:
            content = wire if self._content is None else b"".join(self._content)
            literal = json.dumps(place.name, ensure_ascii=False).encode()
            head = msgspec.structs.replace(self._head, raw=self._raw)
            data = self._payload.replace(head, content, self._found.start, self._found.end, literal, wire)
        self._release()
        self._link.forward(data, self._head, self._mark, place.upstream)
        self._link.passed(self)

    # an assistant

    async def _assist(self, place: Place) -> None:
        content = b"".join(self._wire if self._content is None else self._content)
        upstream = self._house.upstream_names[place.upstream]
        head = msgspec.structs.replace(self._head, raw=self._raw)  # with the Host the upstream is to hear
        asked = Asked(head, content, self._look.route.name, place.name, upstream)
        assistant = self._house.assistant
        assert assistant is not None
        try:
            answered = await assistant(asked, self)
        except Exception:
            log.exception("the assistant failed", extra={"action": "assist_failed"})
            if self._wrote:
                self._link.client.abort()
                return
            self._release()
            message = "abliterated's assistant failed; see the daemon's log"
            self._link.refuse(answers.for_request(policy.Answer(500, message), self._head))
            return
        self._task = None
        if not answered and not self._wrote:
            self._go(place)
            return
        self._release()
        self._house.tally.of(self._mark.route, self._mark.model).assisted += 1
        self._house.finished(self._link.client, self._mark, self._told)
        if _CLOSE.search(self._head.raw):
            self._link.leave()
        else:
            self._link.passed(self)

    async def write(self, data: bytes) -> None:
        """`assist.Outlet`."""
        if self._link.ended:
            raise ConnectionResetError
        if not self._wrote:
            self._wrote = True
            self._mark.first = self._house.loop.time()
            self._mark.status = int(data[9:12]) if data[9:12].isdigit() else 0
            if self._house.draining:  # as the upstream's answers do then
                data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        self._told += len(data)
        self._link.bytes_down += len(data)
        if len(data) > COUNTING_BYTES:
            self._mark.read(data)
        self._link.client.write(data)
        while self._link.client_full and not self._link.ended:
            self._ready = self._house.loop.create_future()
            await self._ready

    def client_ready(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    # endings

    def _release(self) -> None:
        self.holding = False
        self._house.held_bytes -= self._size
        self._size = 0
        self._wire = []
        self._content = None

    def close(self) -> None:
        """The client is gone, or was answered otherwise."""
        self._stop_waiting()
        self._release()
        if self._task is not None and self._task is not asyncio.current_task(self._house.loop):
            self._task.cancel()
