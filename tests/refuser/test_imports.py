"""The data room is light: the daemon may import it."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys, abliterated.refuser as r
r.held_out(); r.parameters(); r.template_go()
heavy = {"torch", "transformers", "gguf", "xllamacpp", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_the_refuser_imports_no_heavy_library() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", PROBE], check=True, timeout=60)
