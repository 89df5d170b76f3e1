"""What becomes of a request: frozen data in, a decision out.

The whole decision is here and pure; `relay` carries it out. Today a request is forwarded or answered by us. Two more
ways are foreseen, and `Decision` is the place for them: `Hold` (wait while a job has the GPU, or until the body has
named its model) and `Assist` (another handler speaks for this one request).

Does not know: sockets, clocks, what happened to earlier requests.
"""

from __future__ import annotations

from typing import Final

import msgspec

from abliterated.proxy import headers
from abliterated.proxy.framing import Head


class View(msgspec.Struct, frozen=True):
    """All that a decision may depend on besides the request. The daemon replaces it whole when the world changes."""

    guard: headers.HostGuard | None = None


class Forward(msgspec.Struct, frozen=True):
    """Send it on; with `host`, under that name."""

    host: str = ""


class Answer(msgspec.Struct, frozen=True):
    """Say this ourselves, after the answers still owed, and close."""

    status: int
    message: str
    extra: tuple[tuple[str, str], ...] = ()


Decision = Forward | Answer

VERBATIM: Final = Forward()
FORBIDDEN: Final = Answer(403, "")  # empty, as Ollama's own guard answers


def decide(head: Head, view: View) -> Decision:
    guard = view.guard
    if guard is None:
        return VERBATIM
    verdict = headers.judge(head, guard)
    if verdict == "refuse":
        return FORBIDDEN
    return Forward(guard.replacement) if verdict == "rewrite" else VERBATIM
