"""`abliterate retry`: queues failed or cancelled jobs again."""

from __future__ import annotations

import argparse

from abliterate.acts import configure_act, run_act

_DESCRIPTION = """\
Queue failed or cancelled jobs again, under the same id. Finished stages are not done twice."""
_EPILOG = """\
examples:
  abliterate logs 4kz9            see what went wrong
  abliterate retry 4kz9"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    configure_act(parser, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    return run_act(args, "retry")
