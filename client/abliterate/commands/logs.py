"""`abliterate logs`: a job's log, once or followed."""

from __future__ import annotations

import argparse
import codecs
import sys
import time

from abliterate.contract.errors import DaemonUnavailable
from abliterate.render import clean
from abliterate.settings import daemon

_DESCRIPTION = """\
Print a job's log. With -f, go on printing until the job has ended, through a restart of the daemon too."""
_EPILOG = """\
examples:
  abliterate logs 4kz9
  abliterate logs 4kz9 -f

On a terminal, escape sequences in the log are spelt out; in a pipe the bytes come as they are."""
_PATIENCE = 60.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("id", metavar="ID", help="a job's id, or four or more characters of it")
    parser.add_argument("-f", "--follow", action="store_true", help="follow it until the job has ended")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    server = daemon(args)
    job = server.job(args.id).id
    decoder = codecs.getincrementaldecoder("utf-8")("replace") if sys.stdout.isatty() else None
    offset = 0
    answered = time.monotonic()
    while True:
        try:
            with server.log(job, follow=args.follow, offset=offset) as stream:
                for chunk in stream.chunks():
                    offset += len(chunk)
                    answered = time.monotonic()
                    if decoder is None:
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.buffer.flush()
                    else:
                        sys.stdout.write(_harmless(decoder.decode(chunk)))
                        sys.stdout.flush()
            return 0
        except DaemonUnavailable:
            if not args.follow or time.monotonic() - answered > _PATIENCE:
                raise
            time.sleep(0.5)


def _harmless(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char if char in "\n\t" else clean(char) for char in text)
