"""The matrix as a page of the docs: plain data in, Markdown out.

Does not know: how a run is made.
"""

from __future__ import annotations

from typing import Any

from templates.asking import DIALECTS
from templates.matrix import CHECKS

Run = dict[str, dict[str, dict[str, Any]]]  # engine, family, what came out

_TOP = """\
# Tools and thinking, family by family

Made by `make matrix` from `tool-matrix.json`; do not edit.

Every row is a chat template with a model whose answers are scripted in that template's own dialect, with its real
control tokens. Each is asked over {routes}, whole and streamed. What the model answers tells what its prompt held; how
the engine splits that tells what it parses. So **yes** is a proof for all of them, **no** means none, anything else
names those that fail; a dash where the question makes no sense (a template that never thinks, a model that makes one
call at a time). *mended* is the same family with the variant that `[export] tool_template` bakes in.

The first families are our own templates, each standing for a kind; the others are published ones, by the name of their
model. What fails is under each table, in the engine's own words or in the model's.
"""


def render(run: Run) -> str:
    routes = ", ".join(f"`{dialect}`" for dialect in DIALECTS)
    parts = [_TOP.format(routes=routes)]
    for engine, rows in run.items():
        parts.append(f"\n## {_title(engine)}\n")
        parts.append("| family | " + " | ".join(check.name for check in CHECKS) + " |")
        parts.append("|---" * (len(CHECKS) + 1) + "|")
        ordered = sorted(rows.items(), key=lambda item: (not item[1]["own"], item[0].lower()))
        parts += [row(name, said) for name, said in ordered]
        if reasons := _reasons(dict(ordered)):
            parts += ["\nWhat fails:\n", *reasons]
    return "\n".join(parts) + "\n"


def row(name: str, said: dict[str, Any]) -> str:
    template = " (no Go template)" if said.get("template") == "none" else ""
    cells = (said["cells"].get(check.name, {"cell": "–"})["cell"] for check in CHECKS)
    return f"| {name}{template} | " + " | ".join(cells) + " |"


def _reasons(rows: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each reason, with whom it concerns and what it spoils."""
    spoilt: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, said in rows.items():
        reasons: dict[str, list[str]] = {}
        for check, cell in said["cells"].items():
            if "why" in cell:
                reasons.setdefault(cell["why"], []).append(check)
        for why, checks in reasons.items():
            spoilt.setdefault((why, tuple(checks)), []).append(name)
    return [
        f"- `{why.replace('`', chr(39))}`: {', '.join(names)} ({', '.join(checks)})"
        for (why, checks), names in spoilt.items()
    ]


def _title(engine: str) -> str:
    if engine == "embedded":
        return "The embedded engine"
    version = engine.removeprefix("ollama-")
    old = tuple(int(part) for part in version.split(".")) < (0, 30, 0)
    return f"Ollama {version}" + (", with the Go template registration sends" if old else "")
