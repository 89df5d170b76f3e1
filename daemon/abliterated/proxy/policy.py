"""What becomes of a request: frozen data in, a decision out.

The whole decision is here and pure; `relay` and `gate` carry it out. Most requests go on at once. One that names a
model in its body is looked at while it passes; it waits for the look only where something depends on the name.

Does not know: sockets, clocks, what happened to earlier requests.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from abliterated.proxy import headers
from abliterated.proxy.framing import Head
from abliterated.proxy.routing import UNKNOWN, Place, Route, Rules, place_of, route_of

Sharing = Literal["share", "hold", "reject"]


class View(msgspec.Struct, frozen=True):
    """All that a decision may depend on besides the request. The daemon replaces it whole when the world changes."""

    guard: headers.HostGuard | None = None
    rules: Rules | None = None  # None: nobody's name is looked at
    busy: Sharing = "share"  # what inference requests get now, while a job has the device
    hold_seconds: float = 60.0
    retry_after: int = 60
    assist: bool = False  # an abliterated model is there that may need help
    observe: bool = False  # inference requests are counted by model


class Forward(msgspec.Struct, frozen=True):
    """Send it on; with `host`, under that name."""

    host: str = ""


class Look(msgspec.Struct, frozen=True):
    """Read the body's beginning for the model's name; with `hold`, before anything goes on."""

    route: Route
    hold: bool
    host: str = ""


class Answer(msgspec.Struct, frozen=True):
    """Say this ourselves, after the answers still owed, and close."""

    status: int
    message: str
    extra: tuple[tuple[str, str], ...] = ()


Decision = Forward | Look | Answer
Fate = Literal["go", "wait", "reject", "assist"]

VERBATIM: Final = Forward()
IN_TURN: Final = Look(Route("", inference=False), hold=True)
FORBIDDEN: Final = Answer(403, "")  # empty, as Ollama's own guard answers


def decide(head: Head, view: View) -> Decision:
    """From the head alone."""
    host = ""
    if view.guard is not None:
        verdict = headers.judge(head, view.guard)
        if verdict == "refuse":
            return FORBIDDEN
        host = view.guard.replacement if verdict == "rewrite" else ""
    if view.rules is not None and head.length and not head.switches:
        route = route_of(head.method, head.target)
        if route is not None:
            hold = view.rules.steer or (route.inference and (view.assist or view.busy != "share"))
            if hold or (route.inference and (view.observe or view.rules.patterns)):
                return Look(route, hold, host)
    return Forward(host) if host else VERBATIM


def place(name: str | None, view: View) -> Place:
    """Where the named model leads."""
    return UNKNOWN if not name or view.rules is None else place_of(name, view.rules)


def fate(route: Route, place: Place, view: View) -> Fate:
    """What becomes of a held request, its name known (or known to be unknown). Cloud models need no device here."""
    if route.inference and view.busy != "share" and not place.cloud:
        return "wait" if view.busy == "hold" else "reject"
    return "assist" if route.inference and view.assist and place.abliterated else "go"


def busy_answer(view: View) -> Answer:
    message = "a job of abliterated has the device: please try again later"
    return Answer(503, message, (("Retry-After", str(view.retry_after)),))
