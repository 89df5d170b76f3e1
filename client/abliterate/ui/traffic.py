"""The proxy's traffic by model, read from the daemon's Prometheus text. Pure. Does not know the proxy."""

from __future__ import annotations

import re
from typing import Any, Final

_LINE: Final = re.compile(r'abliterated_proxy_(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} ([0-9.e+-]+)')
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_COUNTS: Final = {
    "tokens_total": "tokens",
    "held_total": "held",
    "assisted_total": "assisted",
    "missing_total": "missing",
}


def by_model(text: str) -> list[dict[str, Any]]:
    """A row a model, the busiest first: requests, errors, tokens, mean seconds to the first byte …"""
    rows: dict[str, dict[str, Any]] = {}
    first: dict[str, list[float]] = {}
    for match in _LINE.finditer(text):
        name, labels, value = match[1], dict(_LABEL.findall(match[2])), float(match[3])
        if "model" not in labels:
            continue
        model = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], labels["model"])
        row = rows.setdefault(
            model, {"model": model, "requests": 0, "errors": 0, "tokens": 0, "held": 0, "assisted": 0, "missing": 0}
        )
        if name == "requests_total":
            row["requests"] += int(value)
            status = labels.get("status", "")
            row["errors"] += int(value) if not status.startswith(("1", "2", "3")) else 0
        elif name in _COUNTS:
            row[_COUNTS[name]] += int(value)
        elif name in ("first_byte_seconds_sum", "first_byte_seconds_count"):
            first.setdefault(model, [0.0, 0.0])[name.endswith("count")] += value
    for model, (total, count) in first.items():
        rows[model]["first_byte"] = total / count if count else None
    return sorted((row for row in rows.values() if row["requests"]), key=lambda row: (-row["requests"], row["model"]))
