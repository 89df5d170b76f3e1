"""`abliterate hold`: keeps queued jobs from starting."""

from __future__ import annotations

import argparse

from abliterate.acts import configure_act, run_act

_DESCRIPTION = """\
Keep queued jobs from starting until they are released. A running job can't be held."""
_EPILOG = """\
examples:
  abliterate hold 4kz9
  abliterate release 4kz9         lets it start again"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    configure_act(parser, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    return run_act(args, "hold")
