"""`python -m abliterated.engine`: see `main`."""

from __future__ import annotations

import sys

from abliterated.engine.main import command

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
