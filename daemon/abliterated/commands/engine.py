"""`abliterated engine`: the embedded engine alone."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run the embedded engine alone: Ollama's API over llama.cpp"
EXAMPLES = """\
examples:
  abliterated engine --listen 127.0.0.1:11435 --models ~/models
  OLLAMA_HOST=127.0.0.1:11435 ollama list

The folder has Ollama's own layout: a real Ollama can open it.
exit codes: 0 stopped; 2 a wrong address; 75 the port is taken."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1:11435", metavar="HOST:PORT", help="default 127.0.0.1:11435")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder of blobs and manifests")
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    from abliterated.engine import main

    return main.run(options.listen, options.models, options.parent_fd)
