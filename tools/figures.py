"""Writes what was measured into the pages that tell it: docs/explanation/cost.md, and the README's tables.

python tools/figures.py      (after `make bench`, `make bench-search`, `make nightly`)

Reads bench/results.json and nothing else; a part that was not measured is left out. Does not measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
RESULTS, COST, README = ROOT / "bench" / "results.json", ROOT / "docs" / "explanation" / "cost.md", ROOT / "README.md"
HERETIC: Final = "Heretic 1.4.0"
HEAD: Final = """\
# What it costs

Written by `python tools/figures.py` from `bench/results.json`, which `make bench` and `make bench-search` write.
Measured on a machine with {processors} shared processor cores and no GPU; ratios within one run are worth more than
single numbers. A dash: not measured in the last run.
"""


def cost(found: dict[str, Any]) -> str:
    """The page."""
    parts = [HEAD.format(processors=found.get("machine", {}).get("processors", "some"))]
    parts += [f"## {title}\n\n{text}" for title, text in _sections(found) if text]
    return "\n".join(parts)


def _sections(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    weights, measuring = found.get("weights", {}), found.get("measuring", {})
    if "safetensors" in weights:
        edit, gguf = weights["safetensors"], weights.get("gguf", {})
        size = weights["parameters"] / 1e6
        yield (
            "Editing",
            f"Of a random Llama of {size:.0f} million parameters, beside `cp` of the same files:\n\n"
            + table(
                ("", "editing", "cp", "peak memory"),
                ("safetensors, seconds", num(edit, "bake_cold_seconds"), num(edit, "cp_cold_seconds"), peak(edit)),
                ("GGUF, seconds", num(gguf, "bake_seconds"), num(gguf, "cp_seconds"), peak(gguf)),
            )
            + f"\n\nThe largest tensor has {weights['largest_tensor_mb']:.0f} MB. What is written is read back.\n",
        )
    if measuring:
        yield (
            "Measuring",
            f"{measuring['prompts']:.0f} prompts through a random model of {measuring['parameters'] / 1e6:.0f} million "
            "parameters, beside one prompt a pass through the\nwhole model, as the first scripts did it:\n\n"
            + table(
                ("", "here"),
                ("seconds", num(measuring, "streamed_s")),
                ("times as fast", num(measuring, "faster")),
                ("memory, of the whole model's", num(measuring, "memory_ratio")),
            )
            + "\n",
        )
    if text := search(found):
        yield (
            "Searching",
            f"Beside {HERETIC} at its defaults, on small models made for it (`bench/search.py`), each asked 100 "
            f"questions by one scorer:\n\n{text}\n\n"
            "Exact: harmless answers that stayed word for word. Complied: what was refused is now answered rightly. "
            "These models have about\na million parameters; how real ones fare, only real ones show.\n",
        )
    if text := proxy(found):
        told = "One small upstream, asked directly and through each (nginx 1.22, haproxy 2.6; one worker):"
        yield ("The proxy", f"{told}\n\n{text}\n\n{otherwise(found['proxy'])}\n")
    if daemon := found.get("daemon"):
        page = found.get("page", {})
        yield (
            "Standing by",
            table(
                ("", "measured", "bar"),
                ("the daemon, idle: resident MB", num(daemon, "idle_resident_mb", 0), "60"),
                ("`abliterate status`, cold: ms", num(daemon, "status_cold_ms", 0), "150"),
                ("dropped recipe → queued, p99: ms", num(daemon, "drop_to_queued_p99_ms", 0), "50"),
                ("the page, event at 50 that look, p99: ms", num(page, "event_lag_p99_ms", 0), "250"),
                ("the page, first paint: ms", num(page, "first_paint_p50_ms", 0), "300"),
            )
            + "\n",
        )


def search(found: dict[str, Any]) -> str:
    """Ours beside Heretic's, a row a model that both were run on."""
    rows = []
    for name, one in sorted(found.get("search", {}).get("models", {}).items()):
        if one.get("refusals_heretic") is None:
            continue
        rows.append(
            (
                name,
                *(
                    f"{pair(one, key, style)}"
                    for key, style in (
                        ("refusals", ".0f"),
                        ("complied", ".0%"),
                        ("exact", ".0%"),
                        ("kl", ".5f"),
                        ("processor_s", ",.0f"),
                        ("tokens_decoded", ",.0f"),
                    )
                ),
            )
        )
    head = ("ours · theirs", "refused of 100", "complied", "exact", "KL", "processor seconds", "tokens decoded")
    return table(head, *rows) if rows else ""


def proxy(found: dict[str, Any]) -> str:
    """A column a way to the upstream."""
    one = found.get("proxy", {})
    names = [name for name in ("direct", "proxy", "nginx", "haproxy") if name in one]
    if len(names) < 3:
        return ""
    kinds = (
        ("GET, p50: µs", "get_p50_us_anywhere"),
        ("requests a second, 64 connections", "requests_per_second_64"),
        ("processor µs a streamed token", "cpu_us_per_token"),
        ("memory a stream: kB", "memory_kb_per_stream"),
        ("upload: MB/s", "upload_mb_per_second"),
    )
    rows = [
        (text, *(num(one[name], key, 1 if "µs a" in text or "kB" in text else 0) for name in names))
        for text, key in kinds
        if key in one["proxy"]
    ]
    return table(("", *("abliterated" if name == "proxy" else name for name in names)), *rows)


def otherwise(one: dict[str, Any]) -> str:
    """The same GET in two other situations: where the kernel puts the processes decides as much as who they are."""
    placed, behind = (
        " · ".join(num(one[name], key, 0) for name in ("proxy", "nginx") if name in one)
        for key in ("get_p50_us", "get_p50_us_after_load")
    )
    return (
        "The GET is one client's, where the kernel puts the processes. With a processor to itself for the one that is "
        f"measured it\ntakes {placed} µs (ours · nginx), right behind a load {behind} µs."
    )


def peak(found: dict[str, Any]) -> str:
    return f"{found['peak_mb']:.0f} MB" if "peak_mb" in found else "–"


def pair(one: dict[str, Any], key: str, style: str) -> str:
    return f"{one[f'{key}_ours']:{style}} · {one[f'{key}_heretic']:{style}}"


def num(found: dict[str, Any], key: str, digits: int = 2) -> str:
    value = found.get(key)
    return "–" if value is None else f"{value:,.{digits}f}"


def table(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(readme: str, found: dict[str, Any]) -> str:
    """The README with the tables between its marks written anew."""
    for name, text in (("search", search(found)), ("proxy", proxy(found))):
        before, mark, rest = readme.partition(f"<!-- figures: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if mark and end and text:
            readme = f"{before}{mark}{text}\n{end}{after}"
    return readme


def main() -> int:
    found = json.loads(RESULTS.read_text())
    COST.write_text(cost(found))
    README.write_text(filled(README.read_text(), found))
    sys.stdout.write(f"{COST}\n{README}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
