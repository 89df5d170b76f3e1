"""`/metrics`: the queue and the proxy as Prometheus text. Pure. Does not know where the numbers come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from abliterate.contract.states import STATES, State


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
        lines += [f"# TYPE abliterated_proxy_{name} untyped", f"abliterated_proxy_{name} {value:g}"]
    return "\n".join(lines) + "\n" + more
