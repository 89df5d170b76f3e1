"""Writes the pages of docs/reference that follow from the program: openapi.json and states.md. `--check` only compares.

python tools/reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from abliterate.contract.states import MEANING, STATES, TERMINAL, TRANSITIONS, WHY
from abliterated.control.care import routes as care_routes
from abliterated.control.events import Events
from abliterated.control.openapi import text
from abliterated.control.server import Control

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"


def openapi() -> str:
    """The control API's document."""
    nobody: Any = None
    return text(Control(nobody, Events(), care_routes(nobody)).routes())


def states() -> str:
    """The states, their moves and the reasons, with the diagram."""
    lines = [
        "# States of a job",
        "",
        "Written by `python tools/reference.py` from `abliterate/contract/states.py`: the one table of what is legal.",
        "An illegal move raises and changes nothing; every move is a row of the journal, with who asked and why.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> queued",
        "    [*] --> held",
    ]
    for old in STATES:
        lines += [f"    {old} --> {new}" for new in STATES if new in TRANSITIONS[old]]
    lines += [f"    {state} --> [*]" for state in STATES if state in TERMINAL]
    lines += ["```", "", "| state | meaning | goes to |", "|---|---|---|"]
    for state in STATES:
        after = ", ".join(f"`{new}`" for new in STATES if new in TRANSITIONS[state]) or "–"
        lines.append(f"| `{state}` | {MEANING[state]} | {after} |")
    lines += ["", "| why a job waits, or ended so | meaning |", "|---|---|"]
    lines += [f"| `{reason}` | {told} |" for reason, told in WHY.items()]
    return "\n".join(lines) + "\n"


PAGES = {"openapi.json": openapi, "states.md": states}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, wanted = REFERENCE / name, make()
        if not path.exists() or path.read_text() != wanted:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(wanted)
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"stale: {', '.join(stale)}; run python tools/reference.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
