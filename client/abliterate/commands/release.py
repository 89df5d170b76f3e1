"""`abliterate release`: lets held jobs start again."""

from __future__ import annotations

import argparse

from abliterate.acts import configure_act, run_act

_DESCRIPTION = """\
Let held jobs start again: those held by hand, by `schedule.hold`, or after too many crashes."""
_EPILOG = """\
examples:
  abliterate release 4kz9"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    configure_act(parser, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    return run_act(args, "release")
