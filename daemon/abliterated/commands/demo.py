"""`abliterated demo`: the whole story on a model it brings along."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from abliterate.contract.errors import DiskError

HELP = "tell the whole story on a small model that refuses: no download, no GPU, no Ollama needed"
EXAMPLES = """\
examples:
  abliterated demo
  abliterated demo --engine embedded --json
  abliterated demo --load                       only bring the model into your Ollama, and write its recipe
  abliterated demo --export refuser.gguf        only write the model, and prompts in its vocabulary beside it

Everything runs in a temporary home on free ports; a real Ollama is started privately, never yours. Only --load asks
the engine that is there: $OLLAMA_HOST, the proxy or upstream of the configuration, or port 11434.
exit codes: 0 as expected; 1 it ran, but the figures are not as expected; others as for `abliterated work`."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=("auto", "ollama", "embedded"),
        default="auto",
        help="auto: a real Ollama where one is on PATH (or in OLLAMA_BIN), the embedded engine elsewhere",
    )
    parser.add_argument("--load", action="store_true", help="only bring the model in, and write refuser.toml here")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file, for --load")
    parser.add_argument("--export", type=Path, metavar="F.gguf", help="only write the model, with its prompts")
    parser.add_argument(
        "--out", type=Path, default=Path(".demo"), metavar="DIR", help="where result.json goes (default .demo)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of the table")


def run(options: argparse.Namespace) -> int:
    if options.export:
        from abliterated import refuser

        for path in refuser.export(options.export):
            sys.stdout.write(f"{path}\n")
        return 0
    if options.load:
        from abliterated.demo.loading import RECIPE, load_demo

        recipe = load_demo(Path(RECIPE), options.config)
        sys.stdout.write(f"{recipe}\n")
        sys.stderr.write(f"  → abliterate submit {recipe} --watch\n")
        return 0
    from abliterated.demo.story import as_expected, tell_story
    from abliterated.demo.telling import Teller

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{options.out}: can't be made ({error.strerror})", remedy="Give another --out") from error
    # Raised where the story is, so that it stops what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    ended_by: int | None = None
    try:
        result = tell_story(options.engine, options.out / "result.json", Teller(quiet_table=options.json))
    except SystemExit as ended:
        ended_by = int(ended.code or 0)
    except KeyboardInterrupt:
        ended_by = 130
    if ended_by is not None:
        # All is taken back. A thread that was being started in that very moment is in nobody's list: Python would wait
        # for its end for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended_by)
    if options.json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n")
    return 0 if as_expected(result) else 1
