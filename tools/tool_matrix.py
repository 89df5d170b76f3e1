"""Runs the tool matrix on every engine found and writes it down: `make matrix`.

Families: our own templates, and those of the folder that CHAT_TEMPLATES_DIR names. `--page` only renders the page anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from engines import find_engines  # noqa: E402
from templates.families import own_families, published_families  # noqa: E402
from templates.matrix import run_engine  # noqa: E402
from templates.page import render  # noqa: E402

DATA = ROOT / "docs" / "reference" / "tool-matrix.json"
PAGE = DATA.with_suffix(".md")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", action="append", default=[], help="only this one, by its id; may be repeated")
    parser.add_argument("--page", action="store_true", help="render the page from what was last run")
    options = parser.parse_args(arguments)
    found = json.loads(DATA.read_text()) if DATA.is_file() else {}
    if not options.page:
        families = [*own_families(), *published_families()]
        for engine in find_engines():
            if engine.missing or (options.engine and engine.id not in options.engine):
                print(f"{engine.id}: left out{': ' + engine.missing if engine.missing else ''}", file=sys.stderr)
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows = run_engine(engine, families, Path(folder))
            # Without the published templates their rows stay as they were.
            found[engine.id] = {**found.get(engine.id, {}), **rows}
            print(f"{engine.id}: {len(rows)} rows", file=sys.stderr)
        DATA.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    PAGE.write_text(render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
