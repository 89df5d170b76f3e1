"""The bytes: one client connection, one upstream connection, and nothing between them but a look at the requests.

`Link` is the client's side and owns the pair; `wiring.Upstream` is the other end. What is forwarded is what came, byte
for byte, but for the two things a person has asked for: an alias's name in a request, and a sentence behind the 404
for a model that could be made.

Does not know: what a decision means (`policy`), where listeners come from (`server`).
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from abliterated.proxy import answers, headers, missing, policy
from abliterated.proxy.bulk import LEAST, Bulk
from abliterated.proxy.endings import hang_up, keep, salvage, write_eof
from abliterated.proxy.framing import Bad, Body, Event, Head, RequestFramer
from abliterated.proxy.gate import Gate
from abliterated.proxy.marks import COUNTING_BYTES, TAIL_BYTES, Mark
from abliterated.proxy.pair import ASKED, AWAITING, GATE, HIGH_WATER, LONG, READY, Pair
from abliterated.proxy.responses import BEHIND, CHUNK, CHUNKED, PLAIN, TOKEN_LIMIT, body_length, kind_of
from abliterated.proxy.wiring import House

KNOWN_BYTES: Final = 1024  # a request or an answer longer than that is read each time


class Link(Pair):
    """A client's connection, and through it the pair."""

    __slots__ = ("_amending", "_kept", "_known")

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self._known = house.known
        self._kept: bytes | None = None  # of a 404 that gets a sentence more
        self._amending: asyncio.Task[None] | None = None

    # the client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.client = cast(asyncio.Transport, transport)
        self.client.set_write_buffer_limits(high=HIGH_WATER)
        self._house.links.add(self)

    def data_received(self, data: bytes) -> None:
        if self._way == READY and len(data) <= KNOWN_BYTES and data in self._known:
            # Exactly one whole request, body-less, forwarded as it is last time: nothing new to read or decide.
            self._upstream.write(data)  # type: ignore[union-attr]
            self._way = ASKED
            self.watcher.owed = 1
            self.requests += 1
            self.bytes_up += len(data)
            return
        self._way = LONG
        self.bytes_up += len(data)
        if self._answer or self._lingering:
            return
        framer = self._framer
        if framer is None:
            self._send(data)
            return
        self._act(framer.feed(data))
        if framer.head_open:
            if self._timer is None:
                self._timer = self._house.loop.call_later(self._house.timing.head_seconds, self._head_timed_out)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if framer.left > LEAST and framer.phase == framer.LENGTH:
            self._receive_bulk(framer)

    def _receive_bulk(self, framer: RequestFramer) -> None:
        """What is left of a long body is nobody's but the upstream's."""
        upstream = self._upstream
        if upstream is not None and self._gate is None and self._framer is framer and not upstream.is_closing():
            upstream.set_write_buffer_limits(high=0)
            self.client.set_protocol(Bulk(self, framer.left))

    def bulk_received(self, data: memoryview, left: int) -> None:
        """A piece of a long body; its memory is used again once the upstream takes more."""
        self.bytes_up += len(data)
        framer, upstream = self._framer, self._upstream
        if framer is None or self._answer or self._lingering:
            if not left:
                self.client.set_protocol(self)
            return
        if upstream is not None and not upstream.is_closing():
            upstream.write(data)
        framer.pass_over(len(data))
        if not left:
            if upstream is not None:
                upstream.set_write_buffer_limits(high=HIGH_WATER)
            self.client.set_protocol(self)

    def eof_received(self) -> bool:
        self._client_eof = True
        if self._gate is not None and self._gate.holding:
            if self._gate.ended:  # Ollama, too, takes this for a client that has left
                self._close_both()
                return False
            self._gate.give_up()
        if self._lingering or (self._upstream is None and self._connecting is None) or self._upstream_eof:
            self._close_both()
            return False
        self._pass_eof()
        self._look_after_the_client()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in (self._connecting, self._amending):
            if task is not None:
                task.cancel()
        self._connecting = self._amending = None
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        if self._upstream is not None:
            hang_up(self._upstream, reset=exc is not None)
        self._close_spare()
        self._report([*(self.watcher.finished or ()), *self.watcher.close()])
        self._house.retire(self)

    # requests

    def _act(self, events: list[Event]) -> None:
        for place, event in enumerate(events):
            gate = self._gate
            if gate is not None and gate.holding and gate.ended:
                gate.queue += events[place:]
                self._pause(GATE)
                return
            match event:
                case Body(data, end):
                    if self._spare < 0 and (not end or len(data) > HIGH_WATER // 4):
                        self._keep_spare()
                    if gate is None or not gate.holding:
                        self._send(data)
                    if gate is not None:
                        gate.take(data, end)
                case Head():
                    if not self._begin(event):
                        return
                case Bad(status, reason, started):
                    # A malformed head's target can't be trusted to say which API was meant: Ollama's shape.
                    held = gate is not None and gate.holding
                    self._refuse(answers.render(status, reason), started=started and not held)
                    return
        if self._framer is not None and self._framer.awaiting and self._framer.held > HIGH_WATER:
            self._pause(AWAITING)

    def _keep_spare(self) -> None:
        """A long body is on its way: the upstream may answer early and close."""
        if self._upstream is not None and not self._upstream.is_closing():
            self._spare = keep(self._upstream)

    def _begin(self, head: Head) -> bool:
        """A request's head is here; returns whether more may follow it."""
        house = self._house
        self.requests += 1
        decision = policy.decide(head, house.view)
        if isinstance(decision, policy.Answer):
            self._refuse(answers.for_request(decision, head))
            return False
        if decision is policy.VERBATIM and not head.length and not head.switches and kind_of(head) == PLAIN:
            house.remember(head.raw)
        raw = headers.rewrite(head, decision.host) if decision.host else head.raw
        mark = None
        if isinstance(decision, policy.Look):
            mark = Mark(head if house.access is not None else None, decision.route.name, house.loop.time())
            self._gate = gate = Gate(self, house, head, raw, decision, mark)
            if gate.holding:
                return True
        elif self.where and self.watcher.owed:
            # It goes elsewhere than the one before it, whose answer comes first.
            mark = Mark(head, "", house.loop.time())
            self._gate = Gate(self, house, head, raw, policy.IN_TURN, mark)
            self._gate.wait_in_turn()
            return True
        elif house.access is not None:
            mark = Mark(head, "", house.loop.time())
        self.forward(raw, head, mark, 0)
        return True

    def forward(self, data: bytes, head: Head, mark: Mark | None, where: int) -> None:
        """Send a request on its way. Another upstream than now is possible only while nothing is owed."""
        if self._upstream is None and self._asked is None:
            self._asked = head
        if where != self.where:
            self._asked = head
            self._leave_upstream()
            self.where = where
        if mark is not None:
            mark.bytes_before = self.bytes_down
        self.watcher.expect(kind_of(head), mark)
        self._send(data)

    def passed(self, gate: Gate) -> None:
        """A held request has gone on, or was answered: what came behind it follows."""
        self._way = LONG
        if self._gate is gate:
            self._gate = None
        self._resume(GATE)
        if gate.queue:
            self._act(gate.queue)
        self._pass_eof()
        if self._house.draining and self.idle:
            self._close_both()

    def leave(self) -> None:
        """An assistant has answered the client's last request."""
        self._close_both()

    def refuse(self, answer: bytes) -> None:
        """A held request is answered by us."""
        self._refuse(answer)

    def pause_client(self) -> None:
        self._pause(GATE)

    def _head_timed_out(self) -> None:
        self._timer = None
        self._refuse(answers.render(408, "the request's header did not end in time"))

    # the upstream's bytes

    def upstream_data(self, data: bytes) -> None:
        watcher = self.watcher
        size = len(data)
        self.bytes_down += size
        if watcher.streaming:
            # In the middle of an answer, where every token passes.
            self.client.write(data)
            if size > COUNTING_BYTES:
                # Whether anybody wants to know or not: asking would cost more.
                watcher.last = data if size <= TAIL_BYTES else data[-TAIL_BYTES:]
            if watcher.left == CHUNKED and size < TOKEN_LIMIT and CHUNK[size] <= data < BEHIND[size]:
                return  # one whole chunk
            if not watcher.go_on(data):
                self._after_answer()
            return
        if self._way == ASKED:
            self.client.write(data)
            if size <= KNOWN_BYTES:
                head, end, body = data.partition(b"\r\n\r\n")
                if end and len(body) == body_length(head):
                    watcher.owed = 0
                    self._way = READY
                    return
            self._way = LONG
            watcher.feed(data)
            if not watcher.streaming:
                self._after_answer()
            return
        self._way = LONG
        mark = watcher.mark
        if mark is not None:
            if not mark.first:
                mark.first = self._house.loop.time()
                mark.status = int(data[9:12]) if data[9:12].isdigit() else 0
            if size > COUNTING_BYTES:
                watcher.last = data[-TAIL_BYTES:]
            if mark.missing is not None and self._withhold(data, mark):
                return
        self._deliver(data, data)

    def _deliver(self, data: bytes, shown: bytes) -> None:
        """Pass on what the upstream said, `data`, as it is to be `shown`."""
        watcher = self.watcher
        if self._house.draining:
            shown = self._say_close(shown)
        self.client.write(shown)
        watcher.feed(data)
        if not watcher.streaming:
            self._after_answer()

    def _after_answer(self) -> None:
        """No answer is under way, or none that can be followed."""
        watcher = self.watcher
        if watcher.owed and not watcher.blind and not watcher.switched:
            return
        if watcher.finished is not None:
            self._report(watcher.finished)
            watcher.finished = None
        if self._spare >= 0 and self._framer is not None and self._framer.between:
            self._close_spare()
        if self._answer:
            self._try_answer()
        elif self._framer is not None and self._framer.awaiting:
            self._settle_switch(self._framer)
        elif self._gate is not None:
            self._gate.answers_are_through()
        elif self._house.draining:
            if self.idle:
                self._close_both()
        elif self._may_shorten:
            self._way = READY

    def _withhold(self, data: bytes, mark: Mark) -> bool:
        """Keep an answer that may be the 404 of an abliterated model, until it is whole."""
        if self._kept is None:
            if not missing.begins(data) or self.watcher.owed != 1 or self.watcher.started:
                mark.missing = None
                return False
            self._kept = b""
        self._kept += data
        whole = missing.whole(self._kept) if missing.begins(self._kept) else None
        if whole is None:
            mark.missing = None
            self._let_go()
        elif whole and self._amending is None:
            if self._upstream is not None and not self._upstream_eof:
                self._upstream.pause_reading()
            self._amending = self._house.loop.create_task(self._amend(self._kept, mark))
        return True

    async def _amend(self, answer: bytes, mark: Mark) -> None:
        mark.status = 404
        shown = await self._house.amend(self.client, answer, mark)
        self._amending = self._kept = mark.missing = None
        if self.ended:
            return
        if self._upstream is not None and not self._upstream_eof and not self.client_full:
            self._upstream.resume_reading()
        self._deliver(answer, shown)

    def _let_go(self) -> None:
        kept, self._kept = self._kept, None
        if kept and self._amending is None:
            self._deliver(kept, kept)

    def _say_close(self, data: bytes) -> bytes:
        """While the server stops, answers that begin now tell the client not to send another request here."""
        watcher = self.watcher
        if watcher.started or watcher.blind or watcher.owed != 1 or data[:9] != b"HTTP/1.1 " or data[9:10] == b"1":
            return data
        end = data.find(b"\r\n\r\n") + 2
        if end < 2 or b"\r\nconnection:" in data[:end].lower():
            return data
        return data[:end] + b"Connection: close\r\n" + data[end:]

    def upstream_eof(self) -> bool:
        self._let_go()
        if self._upstream_was_idle():
            self._leave_upstream()
            return False
        self._upstream_eof = True
        if self._answer:
            self._try_answer()
            return False
        if self._client_eof:
            self._close_both()
            return False
        write_eof(self.client)
        return True

    def upstream_lost(self, exc: Exception | None) -> None:
        self._upstream = None
        self._way = LONG
        late = salvage(self._spare) if exc is not None and self._spare >= 0 else b""
        self._close_spare()
        if self.ended or self._lingering:
            return
        if late and not self._upstream_eof:
            self.upstream_data(late)
        self._let_go()
        if self._upstream_was_idle():
            return
        if self._answer:
            self._upstream_eof = True
            self._try_answer()
        elif self._upstream_eof or self._answered_early:
            # It had said all it wanted and no longer listens: the client may still be talking.
            self._linger()
        else:
            hang_up(self.client, reset=exc is not None)

    def _report(self, marks: list[Mark]) -> None:
        for mark in marks:
            self._house.finished(self.client, mark, self.bytes_down - mark.bytes_before)

    def _settle_switch(self, framer: RequestFramer) -> None:
        """The answer to an upgrade is here: a tunnel, or more requests."""
        if self.watcher.switched:
            self._framer = None
            if early := framer.release():
                self._send(early)
            self._resume(AWAITING)
        else:
            self._resume(AWAITING)
            self._act(framer.resume())
        self._pass_eof()
