"""What the foreground verbs about models share: which engine they ask, and with what configuration.

Does not know what is asked.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from abliterate.contract.config import home, load_config
from abliterated.care import Care
from abliterated.config import listening

USUAL = "http://127.0.0.1:11434"


def add_whereabouts(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--config`."""
    parser.add_argument(
        "--url", metavar="URL", default="", help="the engine; default $OLLAMA_HOST, proxy.upstream, then port 11434"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file")


def care(options: argparse.Namespace) -> Care:
    """The same as the daemon's, with no daemon and no journal behind it."""
    config = load_config(options.config)
    url = options.url or os.environ.get("OLLAMA_HOST") or ""
    if not url:
        url = config.proxy.upstream if listening(config.proxy.upstream) else USUAL
    return Care(url if "://" in url else f"http://{url}", config, home(config))
