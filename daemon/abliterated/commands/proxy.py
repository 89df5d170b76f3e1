"""`abliterated proxy`: the proxy alone."""

from __future__ import annotations

import argparse

HELP = "run the transparent proxy alone"
EXAMPLES = """\
examples:
  abliterated proxy --listen 127.0.0.1:11434 --upstream http://127.0.0.1:11435

exit codes: 0 stopped; 2 a wrong address; 75 the port is taken."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1:11434", metavar="HOST:PORT", help="default 127.0.0.1:11434")
    parser.add_argument(
        "--upstream", default="http://127.0.0.1:11435", metavar="URL", help="default http://127.0.0.1:11435"
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen beyond loopback: everybody who reaches the port reaches Ollama",
    )


def run(options: argparse.Namespace) -> int:
    from abliterated import logs
    from abliterated.proxy import server

    logs.set_up()
    return server.run(options.listen, options.upstream, allow_remote=options.allow_remote)
