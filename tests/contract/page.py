"""The differences between engines as a page of the docs: each field of `Expected`, its comment, and who answers how.

Does not know: how an engine is asked.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from contract import differences
from contract.differences import Expected, expected
from engines import REPOSITORY, Engine

PAGE = REPOSITORY / "docs" / "reference" / "ollama-versions.md"
# One engine for each span in which all answers are the same.
SPANS = {
    "before 0.11.5": (0, 11, 0),
    "from 0.11.5": (0, 11, 5),
    "from 0.13.3": (0, 13, 3),
    "from 0.14": (0, 14, 0),
    "from 0.30": (0, 34, 4),
}

_TOP = """\
# Engines, and where they differ

Made by `tools/ollama_versions.py` from `tests/contract/differences.py`; do not edit.

One suite of tests (`tests/contract`) runs against the embedded engine and every real Ollama found; what is not here,
all of them answer alike. The suite has seen Ollama 0.11.0 and 0.34.4; the versions between are as Ollama's own source
has them.

| | {spans} | embedded |
|---|{rules}---|
"""


def comments() -> dict[str, str]:
    """The `#:` lines above each field."""
    source = Path(differences.__file__).read_text()
    found = re.findall(r"((?:    #: .*\n)+)    (\w+):", source)
    return {name: " ".join(line.strip().removeprefix("#: ") for line in text.splitlines()) for text, name in found}


def render() -> str:
    engines = [Engine(f"ollama-{span}", embedded=False, version=version) for span, version in SPANS.items()]
    answers: list[Expected] = [*map(expected, engines), expected(Engine("embedded", embedded=True))]
    told = comments()
    rows = [
        f"| {told[field.name]} | " + " | ".join(_word(getattr(answer, field.name)) for answer in answers) + " |"
        for field in fields(Expected)
    ]
    top = _TOP.format(spans=" | ".join(SPANS), rules="---|" * len(SPANS))
    return top + "\n".join(rows) + "\n"


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
