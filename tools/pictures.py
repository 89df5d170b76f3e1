"""Draws the pictures of the explanation with the report's own charts, from a run on the small model that refuses.

python tools/pictures.py [FOLDER]      (half a minute; default docs/pictures)

The run is seeded, so the same machine draws the same pictures; another's may differ in the last digit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from abliterate.contract.report import REPORT_FILE, Report, read_report
from abliterated import refuser, run_recipe
from abliterated.report import charts
from abliterated.report.markup import Markup
from abliterated.report.style import DARK, LIGHT, STYLE

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
# What the page's style sheet says of drawings, and nothing else of it.
MARKS = ("svg text", ".grid{", ".target", ".line", ".dot", ".picked", ".cell", ".bar", ".whisker")


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in pictures(measured()).items():
        (folder / f"{name}.svg").write_text(alone(drawn))
        sys.stdout.write(f"{folder / name}.svg\n")
    return 0


def measured() -> Report:
    """A run that tries every layer and position, and searches a little."""
    data = refuser.files()
    recipe = {
        "model": str(data.model),
        "prompts": {"harmful": str(data.harmful), "harmless": str(data.harmless), "count": 96},
        "search": {"trials": 40},
        "evaluate": {"prompts": 40, "tokens": 48},
        "export": {"register": False},
    }
    with tempfile.TemporaryDirectory() as out:
        run_recipe(recipe, out)
        return read_report((Path(out) / REPORT_FILE).read_bytes())


def pictures(report: Report) -> dict[str, str]:
    """Each drawing by its name."""
    layer, position = report.direction.get("layer"), report.direction.get("position")
    chosen = (float(round(layer)), int(position)) if layer is not None and position is not None else None
    apart = [one for one in report.separation if one.chosen] or report.separation[-1:]
    drawn = {
        "candidates": charts.heat_map(report.candidates, chosen),
        "separation-by-layer": charts.apart_by_layer(report.separation),
        "separation": charts.histogram(apart[0], "chosen") if apart else None,
        "trials": charts.trade_off(report.search) if report.search else None,
    }
    return {name: picture for name, picture in drawn.items() if picture is not None}


def alone(drawn: str) -> str:
    """A drawing of the page's as a file of its own, light and dark."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    marks = "".join(f"{line}\n" for line in STYLE.splitlines() if line.startswith(MARKS))
    style = (
        f"svg{{{light}background:var(--card);font-family:system-ui,sans-serif}}\n"
        f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}\n{marks}"
    )
    head, _, rest = drawn.replace("<svg ", '<svg width="520" ', 1).partition(">")
    return Markup(f"{head}><style>\n{style}</style>{rest}\n")


if __name__ == "__main__":
    sys.exit(main())
