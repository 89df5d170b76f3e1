"""A request of our own to the upstream, and its answer as it comes. One connection each; leaving early aborts it.

Lean, because every token of an assisted answer passes here. Does not know: what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import httptools
import msgspec

from abliterate.contract.errors import EngineUnavailable
from abliterated.proxy.listen import parse_upstream

_READ: Final = 1 << 16
LONGEST_LINE: Final = 16 << 20


class Broken(EngineUnavailable):
    """The upstream is not there, or left in the middle of an answer."""


class Answer:
    """Status and headers are there; `pieces` brings the body."""

    def __init__(self, reader: asyncio.StreamReader, upstream: str) -> None:
        self._reader = reader
        self._upstream = upstream
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._headed = self._ended = False
        self.headers: list[tuple[str, str]] = []

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._headed = self._parser.get_status_code() >= 200
        if not self._headed:
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._ended = self._headed

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    async def begin(self) -> None:
        while not self._headed:
            await self._more()

    async def _more(self) -> None:
        try:
            data = await self._reader.read(_READ)
            if data:
                self._parser.feed_data(data)
                return
        except (OSError, httptools.HttpParserError) as error:
            raise Broken(f"{self._upstream} broke off: {error}", remedy="See the engine's log") from error
        lengthless = self._headed and not any(
            name in ("content-length", "transfer-encoding") for name, _ in self.headers
        )
        if not lengthless:
            raise Broken(f"{self._upstream} broke off", remedy="See the engine's log")
        self._ended = True

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        while True:
            if self._body:
                body, self._body = self._body, []
                yield b"".join(body)
            elif self._ended:
                return
            else:
                await self._more()

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def lines(self) -> AsyncGenerator[bytes, None]:
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n") if rest else piece.split(b"\n")
            for line in whole:
                if line:
                    yield line
            if len(rest) > LONGEST_LINE:
                raise Broken(f"{self._upstream} says a line without end", remedy="See the engine's log")
        if rest.strip():
            yield rest


def post(
    upstream: str, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> AbstractAsyncContextManager[Answer]:
    """`upstream` as the relay names it. Raises Broken."""
    return _ask(upstream, f"POST {path}", msgspec.json.encode(body), headers)


def get(upstream: str, path: str, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
    """Raises Broken."""
    return _ask(upstream, f"GET {path}", b"", headers)


@asynccontextmanager
async def _ask(upstream: str, what: str, content: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Answer, None]:
    address = parse_upstream(upstream if upstream.startswith("unix:") else f"http://{upstream}")
    try:
        if address.path:
            reader, writer = await asyncio.open_unix_connection(address.path, limit=_READ)
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=_READ)
    except OSError as error:
        raise Broken(f"can't reach {upstream}: {error}", remedy="Is the engine running?") from error
    try:
        given = {"Host": f"{address.host or 'localhost'}:{address.port}", **headers, "Content-Type": "application/json"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        head = f"{what} HTTP/1.1\r\n{lines}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode("latin-1") + content)
        answer = Answer(reader, upstream)
        await answer.begin()
        yield answer
    finally:
        writer.transport.abort()
