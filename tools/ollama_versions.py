"""Writes docs/reference/ollama-versions.md from what the contract tests know of engines."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from contract.page import PAGE, render

if __name__ == "__main__":
    PAGE.write_text(render())
