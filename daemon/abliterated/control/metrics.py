"""`/metrics`: the queue and the proxy as Prometheus text. Pure. Does not know where the numbers come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from abliterate.contract.states import STATES, State

# The proxy's own figures: the family's name, its kind, and what it tells.
OF_THE_PROXY: Final = {
    "accepted": ("accepted_total", "counter", "Connections accepted since the start."),
    "connections": ("connections", "gauge", "Connections open now."),
    "requests": ("all_requests_total", "counter", "Requests since the start, of whatever kind."),
    "in_flight": ("in_flight", "gauge", "Requests not yet answered to their end."),
    "bytes_up": ("bytes_up_total", "counter", "Bytes passed on to the engine."),
    "bytes_down": ("bytes_down_total", "counter", "Bytes passed back to clients."),
    "upstream_errors": ("upstream_errors_total", "counter", "Times the engine could not be reached, or broke off."),
}


def text(*, states: Iterable[State], uptime: float, resident: int, proxy: Mapping[str, float], more: str = "") -> str:
    """The whole page; `more` is text of that kind already."""
    counted = Counter(states)
    lines = [
        "# HELP abliterated_jobs Jobs in the journal by state.",
        "# TYPE abliterated_jobs gauge",
        *(f'abliterated_jobs{{state="{state}"}} {counted[state]}' for state in STATES),
        "# HELP abliterated_uptime_seconds Seconds since the daemon started.",
        "# TYPE abliterated_uptime_seconds gauge",
        f"abliterated_uptime_seconds {uptime:.3f}",
        "# HELP abliterated_resident_bytes Resident memory of the daemon.",
        "# TYPE abliterated_resident_bytes gauge",
        f"abliterated_resident_bytes {resident}",
    ]
    for name, value in proxy.items():
        family, kind, about = OF_THE_PROXY.get(name, (name, "untyped", ""))
        full = f"abliterated_proxy_{family}"
        lines += [*([f"# HELP {full} {about}"] if about else []), f"# TYPE {full} {kind}", f"{full} {value:.16g}"]
    return "\n".join(lines) + "\n" + more
