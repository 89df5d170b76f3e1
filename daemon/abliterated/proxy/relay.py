"""The bytes: one client connection, one upstream connection, and nothing between them but a look at the requests.

`Link` is the client's side and owns the pair; `wiring.Upstream` is the other end. What is forwarded is what came, byte
for byte. Whichever side pauses, closes its half or goes away, the other is told in the same way: back-pressure by
`pause_reading`, end of file by `write_eof`, a reset by a reset.

Does not know: what a decision means (`policy`), where listeners come from (`server`).
"""

from __future__ import annotations

import asyncio
import os
from typing import Final, cast

from abliterated.proxy import answers, headers, policy
from abliterated.proxy.endings import hang_up, keep, salvage, write_eof
from abliterated.proxy.framing import Bad, Body, Event, Head, RequestFramer
from abliterated.proxy.responses import ResponseWatcher, kind_of
from abliterated.proxy.wiring import House, Upstream

HIGH_WATER: Final = 64 * 1024

# Why we don't read from the client just now (bits).
_CONNECTING, _UPSTREAM_FULL, _AWAITING = 1, 2, 4


class Link(asyncio.Protocol):
    """A client's connection, and through it the pair."""

    __slots__ = (
        "_answer", "_asked", "_client_eof", "_connecting", "_framer", "_house", "_lingering", "_paused", "_pending",
        "_refused_started", "_spare", "_timer", "_upstream", "_upstream_eof", "bytes_down", "bytes_up", "client",
        "ended", "requests", "watcher",
    )  # fmt: skip

    client: asyncio.Transport

    def __init__(self, house: House) -> None:
        self._house = house
        self._framer: RequestFramer | None = RequestFramer()  # None: a tunnel
        self.watcher = ResponseWatcher()
        self._upstream: asyncio.Transport | None = None
        self._connecting: asyncio.Task[object] | None = None
        self._pending: list[bytes] = []
        self._paused = 0
        self._client_eof = self._upstream_eof = self._lingering = self.ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._asked: Head | None = None  # the first request, until the upstream is there
        self._answer = b""  # our own last word, waiting for the answers still owed
        self._refused_started = False
        self._spare = -1  # the upstream's socket once more, while a body is on its way
        self.requests = self.bytes_up = self.bytes_down = 0

    # the client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.client = cast(asyncio.Transport, transport)
        self.client.set_write_buffer_limits(high=HIGH_WATER)
        self._house.links.add(self)

    def data_received(self, data: bytes) -> None:
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

    def eof_received(self) -> bool:
        self._client_eof = True
        if self._lingering or (self._upstream is None and self._connecting is None) or self._upstream_eof:
            self._close_both()
            return False
        self._pass_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            hang_up(self._upstream, reset=exc is not None)
        self._close_spare()
        self.watcher.close()
        self._house.retire(self)

    def pause_writing(self) -> None:
        if self._upstream is not None and not self._upstream_eof and not self._upstream.is_closing():
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        if self._upstream is not None and not self._upstream_eof and not self._upstream.is_closing():
            self._upstream.resume_reading()

    def _pass_eof(self) -> None:
        """The client's end of file goes on, behind everything it sent."""
        waits = self._framer is not None and self._framer.awaiting and self._framer.held
        if self._client_eof and self._upstream is not None and not self._answer and not waits:
            write_eof(self._upstream)

    # requests

    def _act(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Body(data):
                    if self._spare < 0 and self._upstream is not None and not self._upstream.is_closing():
                        self._spare = keep(self._upstream)
                    self._send(data)
                case Head():
                    self.requests += 1
                    if self._upstream is None and self._asked is None:
                        self._asked = event
                    decision = policy.decide(event, self._house.view)
                    if isinstance(decision, policy.Answer):
                        self._refuse(answers.for_request(decision, event))
                        return
                    self.watcher.expect(kind_of(event))
                    self._send(headers.rewrite(event, decision.host) if decision.host else event.raw)
                case Bad(status, reason, started):
                    # A malformed head's target can't be trusted to say which API was meant: Ollama's shape.
                    self._refuse(answers.render(status, reason), started=started)
                    return
        if self._framer is not None and self._framer.awaiting and self._framer.held > HIGH_WATER:
            self._pause(_AWAITING)

    def _head_timed_out(self) -> None:
        self._timer = None
        self._refuse(answers.render(408, "the request's header did not end in time"))

    def _send(self, data: bytes) -> None:
        if self._upstream is not None:
            if not self._upstream.is_closing():
                self._upstream.write(data)
            return
        self._pending.append(data)
        if self._connecting is None and not self.ended:
            self._connecting = self._house.loop.create_task(self._connect())
        if sum(map(len, self._pending)) > HIGH_WATER:
            self._pause(_CONNECTING)

    async def _connect(self) -> None:
        try:
            await self._house.dial(lambda: Upstream(self))
        except OSError as error:
            self._connecting = None
            if self.ended:
                return
            self._house.upstream_failed(error)
            message = f"abliterated's proxy can't reach Ollama at {self._house.upstream_name}: is it running?"
            self._finish(answers.for_request(policy.Answer(502, message), self._asked))

    def upstream_made(self, transport: asyncio.Transport) -> None:
        self._connecting = self._asked = None
        if self.ended:
            transport.abort()
            return
        self._upstream = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        transport.writelines(self._pending)
        self._pending.clear()
        self._resume(_CONNECTING)
        if self._answer:
            self._try_answer()
        self._pass_eof()

    # the upstream's bytes

    def upstream_data(self, data: bytes) -> None:
        self.bytes_down += len(data)
        watcher = self.watcher
        if self._house.draining:
            data = self._say_close(data)
        self.client.write(data)
        watcher.feed(data)
        if watcher.kinds and not watcher.blind and not watcher.switched:
            return
        if self._spare >= 0 and self._framer is not None and self._framer.between:
            self._close_spare()
        if self._answer:
            self._try_answer()
        elif self._framer is not None and self._framer.awaiting:
            self._settle_switch(self._framer)
        elif self._house.draining and self.idle:
            self._close_both()

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
        late = salvage(self._spare) if exc is not None and self._spare >= 0 else b""
        self._close_spare()
        if self.ended or self._lingering:
            return
        if late and not self._upstream_eof:
            self.upstream_data(late)
        if self._answer:
            self._upstream_eof = True
            self._try_answer()
        elif self._upstream_eof or self._answered_early:
            # It had said all it wanted and no longer listens: the client may still be talking.
            self._linger()
        else:
            hang_up(self.client, reset=exc is not None)

    @property
    def _answered_early(self) -> bool:
        """The request is still on its way, and its answer is here already."""
        return self._framer is not None and not self._framer.between and not self.watcher.owed

    # states

    @property
    def idle(self) -> bool:
        """Between two requests, as far as can be known: nothing sent is unanswered, nothing begun is unfinished."""
        framer, watcher = self._framer, self.watcher
        if self._lingering:
            return True
        if framer is None or watcher.blind or self._answer:
            return False
        return framer.between and not watcher.kinds and not self._pending

    @property
    def in_flight(self) -> int:
        framer = self._framer
        if self._lingering:
            return 0
        if framer is None or self.watcher.blind:
            return 1
        return self.watcher.owed or int(not framer.between and not framer.head_open)

    def _settle_switch(self, framer: RequestFramer) -> None:
        """The answer to an upgrade is here: a tunnel, or more requests."""
        if self.watcher.switched:
            self._framer = None
            if early := framer.release():
                self._send(early)
            self._resume(_AWAITING)
        else:
            self._resume(_AWAITING)
            self._act(framer.resume())
        self._pass_eof()

    def _refuse(self, answer: bytes, *, started: bool = False) -> None:
        """Read no more requests; say `answer` once the answers owed before it are through. `started`: part of the
        refused request has gone upstream, where it must not look whole."""
        if self._lingering or self._answer:
            return
        self._answer = answer
        self._refused_started = started
        self._try_answer()

    def _try_answer(self) -> None:
        watcher = self.watcher
        if self._connecting is not None:
            if watcher.owed > int(self._refused_started):
                return  # good requests before it are still on their way
            self._connecting.cancel()
            self._connecting = None
            watcher.kinds.clear()
        if self._upstream is None or self._upstream_eof:
            # Whatever was owed will not come any more; only behind whole answers is there room for ours.
            self._finish(self._answer if not watcher.owed or (self._refused_started and self._unanswered) else b"")
        elif watcher.blind:
            write_eof(self._upstream)  # its own end of file will tell when it has said everything
        elif watcher.owed <= int(self._refused_started):
            self._finish(self._answer if not watcher.owed or not watcher.started else b"")

    @property
    def _unanswered(self) -> bool:
        return self.watcher.owed == 1 and not self.watcher.started

    def _finish(self, answer: bytes) -> None:
        """Our last word to this client."""
        self._answer = b""
        if self._upstream is not None:
            # Part of a request may have gone there: a reset, so that it can't be taken for a whole one.
            hang_up(self._upstream, reset=self._refused_started)
        if answer and not self.client.is_closing():
            self.client.write(answer)
        self._linger()

    def _linger(self) -> None:
        """Half-close, and listen on without hearing: closing at once would reset what the client has yet to read."""
        self._lingering = True
        self._framer = None
        self._pending.clear()
        if self.client.is_closing():
            return
        write_eof(self.client)
        if self._client_eof:
            self.client.close()
            return
        self._resume(self._paused)
        self._timer = self._house.loop.call_later(self._house.timing.linger_seconds, self.client.abort)

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def _close_both(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        self.client.close()

    def retire(self) -> None:
        """The server stops: leave now if nothing is under way."""
        if self.idle:
            self._close_both()

    def _pause(self, reason: int) -> None:
        if not self._paused and not self._client_eof and not self.client.is_closing():
            self.client.pause_reading()
        self._paused |= reason

    def _resume(self, reason: int) -> None:
        was, self._paused = self._paused, self._paused & ~reason
        if was and not self._paused and not self._client_eof and not self.client.is_closing():
            self.client.resume_reading()

    def upstream_full(self, full: bool) -> None:
        (self._pause if full else self._resume)(_UPSTREAM_FULL)
