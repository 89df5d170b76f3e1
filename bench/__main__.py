"""`make bench`: every figure of this house in one run; the numbers in bench/results.json, a short table last."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from bench import daemon, measuring, page, proxy, registration, weights

RESULTS = Path(__file__).with_name("results.json")

# Name in the results, what people read, and the bar it must not pass.
BARS = (
    ("daemon.idle_resident_mb", "daemon, idle: resident MB", 60.0),
    ("daemon.torch_loaded", "daemon: torch in the process", 0.0),
    ("daemon.status_cold_ms", "abliterate status, cold: ms", 150.0),
    ("page.event_lag_p99_ms", "page: event at 50 that look, p99: ms", 250.0),
    ("page.first_paint_p50_ms", "page: first paint: ms", 300.0),
    ("daemon.drop_to_queued_p99_ms", "renamed in → queued, p99: ms", 50.0),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--only", choices=("daemon", "page", "proxy", "weights", "measuring", "registration"), help="one part of it"
    )
    options = parser.parse_args()
    results: dict[str, object] = {
        "machine": {"system": platform.system(), "processors": os.cpu_count(), "python": platform.python_version()}
    }
    if options.only in (None, "daemon"):
        print("daemon …", file=sys.stderr)
        results["daemon"] = daemon.measure(options.quick)
    if options.only in (None, "page"):
        print("page …", file=sys.stderr)
        results["page"] = page.measure(options.quick)
    if options.only in (None, "proxy"):
        print("proxy …", file=sys.stderr)
        results["proxy"] = proxy.measure(options.quick)
    if options.only in (None, "weights"):
        print("weights: a random model is made and edited; some minutes without --quick …", file=sys.stderr)
        results["weights"] = weights.measure(options.quick)
    if options.only in (None, "measuring"):
        print("measuring: a random model reads prompts; many minutes without --quick …", file=sys.stderr)
        results["measuring"] = measuring.measure(options.quick)
    if options.only in (None, "registration"):
        print("registration: a 2 GB file into each engine found; minutes without --quick …", file=sys.stderr)
        results["registration"] = registration.measure(options.quick)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # bench.search measures on its own
    RESULTS.write_text(json.dumps(known | results, indent=2, sort_keys=True) + "\n")
    tables = {
        "proxy": proxy.table,
        "weights": weights.table,
        "measuring": measuring.table,
        "registration": registration.table,
    }
    for part, table in tables.items():
        measured = results.get(part)
        if isinstance(measured, dict):
            print(table(measured), end="\n\n")
    print(f"\n{'figure':<40}{'measured':>12}{'bar':>10}")
    for key, text, bar in BARS:
        part, _, name = key.partition(".")
        values = results.get(part)
        if isinstance(values, dict) and name in values:
            value = float(values[name])
            print(f"{text:<40}{value:>12.1f}{bar:>10.0f}  {'ok' if value <= bar else 'over'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
