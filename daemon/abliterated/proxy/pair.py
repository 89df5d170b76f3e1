"""Two connections and what holds them together: pressure, half-closes, resets, and our own last word.

`Link` (in `relay`) adds the requests and the answers. Whichever side pauses, closes its half or goes away, the other is
told in the same way: back-pressure by `pause_reading`, end of file by `write_eof`, a reset by a reset.

Does not know: what a request is about.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from abliterated.proxy import answers, policy
from abliterated.proxy.endings import hang_up, has_left, write_eof
from abliterated.proxy.framing import Head, RequestFramer
from abliterated.proxy.responses import ResponseWatcher
from abliterated.proxy.wiring import Deaf, House, Upstream

if TYPE_CHECKING:
    from abliterated.proxy.gate import Gate

HIGH_WATER: Final = 64 * 1024

# Does the next request go the short way (`Link.data_received`), or the next answer?
LONG, READY, ASKED = range(3)

# Why we don't read from the client just now (bits).
CONNECTING, UPSTREAM_FULL, AWAITING, GATE = 1, 2, 4, 8


class Pair(asyncio.Protocol):
    """A client's connection and the upstream one behind it."""

    __slots__ = (
        "_answer", "_asked", "_client_eof", "_connecting", "_framer", "_gate", "_house", "_lingering", "_paused",
        "_pending", "_refused_started", "_spare", "_timer", "_upstream", "_upstream_eof", "_way",
        "bytes_down", "bytes_up", "client", "client_full", "ended", "requests", "watcher", "where",
    )  # fmt: skip

    client: asyncio.Transport

    def __init__(self, house: House) -> None:
        self._house = house
        self._framer: RequestFramer | None = RequestFramer()  # None: a tunnel
        self.watcher = ResponseWatcher()
        self._upstream: asyncio.Transport | None = None
        self.where = 0  # which of the house's upstreams it leads to
        self._connecting: asyncio.Task[object] | None = None
        self._pending: list[bytes] | None = None
        self._way = LONG
        self._paused = 0
        self._client_eof = self._upstream_eof = self._lingering = self.ended = self.client_full = False
        self._timer: asyncio.TimerHandle | None = None
        self._asked: Head | None = None  # the first request, until the upstream is there
        self._answer = b""  # our own last word, waiting for the answers still owed
        self._refused_started = False
        self._spare = -1  # the upstream's socket once more, while a body is on its way
        self._gate: Gate | None = None  # a request whose model is being looked for
        self.requests = self.bytes_up = self.bytes_down = 0

    # pressure

    def pause_writing(self) -> None:
        self.client_full = True
        if self._upstream is not None and not self._upstream_eof and not self._upstream.is_closing():
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        self.client_full = False
        if self._gate is not None:
            self._gate.client_ready()
        if self._upstream is not None and not self._upstream_eof and not self._upstream.is_closing():
            self._upstream.resume_reading()

    def upstream_full(self, full: bool) -> None:
        (self._pause if full else self._resume)(UPSTREAM_FULL)

    def _pause(self, reason: int) -> None:
        if not self._paused and not self._client_eof and not self.client.is_closing():
            self.client.pause_reading()
        self._paused |= reason

    def _resume(self, reason: int) -> None:
        was, self._paused = self._paused, self._paused & ~reason
        if was and not self._paused and not self._client_eof and not self.client.is_closing():
            self.client.resume_reading()

    # towards the upstream

    def _send(self, data: bytes) -> None:
        if self._upstream is not None:
            if not self._upstream.is_closing():
                self._upstream.write(data)
            return
        if self._pending is None:
            self._pending = []
        self._pending.append(data)
        if self._connecting is None and not self.ended:
            self._connecting = self._house.loop.create_task(self._connect())
        if sum(map(len, self._pending)) > HIGH_WATER:
            self._pause(CONNECTING)

    async def _connect(self) -> None:
        try:
            await self._house.dial(lambda: Upstream(self), self.where)
        except OSError as error:
            self._connecting = None
            if self.ended:
                return
            name = self._house.upstream_failed(error, self.where)
            message = f"abliterated's proxy can't reach Ollama at {name}: is it running?"
            self._finish(answers.for_request(policy.Answer(502, message), self._asked))

    def upstream_made(self, transport: asyncio.Transport) -> None:
        self._connecting = self._asked = None
        if self.ended:
            transport.abort()
            return
        self._upstream = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        transport.writelines(self._pending or ())
        self._pending = None
        self._resume(CONNECTING)
        if self._answer:
            self._try_answer()
        self._pass_eof()

    def _leave_upstream(self) -> None:
        """Nothing is owed, and the next request goes elsewhere, or nothing came back in time to matter."""
        upstream, self._upstream = self._upstream, None
        self._way = LONG
        self._close_spare()
        self._upstream_eof = False
        if upstream is not None:
            upstream.set_protocol(Deaf())
            upstream.close()

    def _pass_eof(self) -> None:
        """The client's end of file goes on, behind everything it sent."""
        waits = self._gate is not None and self._gate.holding
        if self._framer is not None and self._framer.awaiting and self._framer.held:
            waits = True
        if self._client_eof and self._upstream is not None and not self._answer and not waits:
            write_eof(self._upstream)

    def _look_after_the_client(self) -> None:
        """It said its last word and is read no more, so nothing would tell that it left; an engine may be silent for
        ever. (Ollama is, where it was left before it had begun.)"""
        if self._timer is not None:
            self._timer.cancel()
        if has_left(self.client):
            self.client.abort()
        else:
            self._timer = self._house.loop.call_later(self._house.timing.look_seconds, self._look_after_the_client)

    # endings

    def _refuse(self, answer: bytes, *, started: bool = False) -> None:
        """Read no more requests; say `answer` once the answers owed before it are through. `started`: part of the
        refused request has gone upstream, where it must not look whole."""
        if self._lingering or self._answer:
            return
        self._way = LONG
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
            watcher.forget()
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
        self._way = LONG
        self._framer = None
        self._pending = None
        if self._gate is not None:
            self._gate.close()
            self._gate = None
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

    # states

    @property
    def idle(self) -> bool:
        """Between two requests, as far as can be known: nothing sent is unanswered, nothing begun is unfinished."""
        framer, watcher = self._framer, self.watcher
        if self._lingering:
            return True
        if framer is None or watcher.blind or self._answer or self._gate is not None:
            return False
        return framer.between and not watcher.owed and not self._pending

    @property
    def in_flight(self) -> int:
        framer = self._framer
        if self._lingering:
            return 0
        if framer is None or self.watcher.blind:
            return 1
        held = int(self._gate is not None and self._gate.holding)
        return self.watcher.owed + held or int(not framer.between and not framer.head_open)

    @property
    def _may_shorten(self) -> bool:
        """Nothing is under way: a known request may come next, and then only its answer."""
        framer = self._framer
        if framer is None or framer.phase or framer.held_bytes or self._lingering:
            return False
        return self._upstream is not None and not self.where and self._spare < 0 and not self.watcher.blind

    def _upstream_was_idle(self) -> bool:
        """It leaves while the only request here has not yet gone to it: another connection will do."""
        return self._gate is not None and self._gate.holding and not self.watcher.owed and not self._answer

    @property
    def _answered_early(self) -> bool:
        """The request is still on its way, and its answer is here already."""
        return self._framer is not None and not self._framer.between and not self.watcher.owed

    def drain(self) -> None:
        """From now on each answer has to tell the client that it was the last."""
        self._way = LONG

    def retire(self) -> None:
        """The server stops: leave now if nothing is under way."""
        if self.idle:
            self._close_both()
