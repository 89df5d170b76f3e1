"""Who may see the page: the holder of a link that works once, from this machine's own addresses, reading only.

The link's token is exchanged for a cookie. A foreign host name (rebinding), a foreign origin, another site's frame or
script, any method but GET and HEAD are refused. Pure but for the random numbers. Does not know sockets.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_SITES: Final = frozenset({"", "none", "same-origin"})
MOST_SESSIONS: Final = 64


@dataclass(frozen=True)
class Verdict:
    """`status` 0: let in; 303: let in, with this cookie, and sent on to the page without the token in its address."""

    status: int = 0
    why: str = ""
    cookie: str = ""


class Gate:
    """The tokens not yet used and the sessions there are; may be asked from several threads."""

    def __init__(self, port: int) -> None:
        self.cookie_name = f"abliterate-{port}"
        self._port = port
        self._tokens: list[str] = []
        self._sessions: list[str] = []
        self._lock = threading.Lock()

    def link(self) -> str:
        """A new link; the ones before it that nobody used are void."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens[:] = [token]
        return f"http://127.0.0.1:{self._port}/?token={token}"

    def admit(self, method: str, path: str, token: str, headers: Mapping[str, str]) -> Verdict:
        """Whether a request is answered. `headers`: by lower-case name."""
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            return Verdict(421, "this page is for 127.0.0.1 and localhost")
        if method not in ("GET", "HEAD"):
            return Verdict(405, "this page only reads")
        if (origin := headers.get("origin", "")) and origin != f"http://{host}":
            return Verdict(403, "asked from another site")
        if path == "/" and token:
            return self._enter(token)
        if headers.get("sec-fetch-site", "") not in _SITES:
            return Verdict(403, "asked from another site")
        if not self._known(_cookie(headers.get("cookie", ""), self.cookie_name)):
            return Verdict(401, "the link was used, or is none: press Enter where `abliterate ui` runs for a new one")
        return Verdict()

    def _enter(self, token: str) -> Verdict:
        with self._lock:
            found = next((known for known in self._tokens if _same(known, token)), None)
            if found is None:
                return Verdict(401, "this link was used: press Enter where `abliterate ui` runs for a new one")
            self._tokens.remove(found)
            session = secrets.token_urlsafe(24)
            self._sessions[:] = [*self._sessions[-MOST_SESSIONS + 1 :], session]
        return Verdict(303, cookie=f"{self.cookie_name}={session}; HttpOnly; SameSite=Strict; Path=/")

    def _known(self, session: str) -> bool:
        with self._lock:
            return any(_same(known, session) for known in self._sessions)


def _same(known: str, given: str) -> bool:
    return hmac.compare_digest(known.encode(), given.encode("utf-8", "replace"))


def _cookie(header: str, name: str) -> str:
    for part in header.split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""
