"""`abliterate cancel`: stops jobs."""

from __future__ import annotations

import argparse

from abliterate.acts import configure_act, run_act

_DESCRIPTION = """\
Stop jobs. A queued one leaves the queue at once; a running one ends within seconds,
and its GPU memory is free when it has. What it had written is not kept visible anywhere."""
_EPILOG = """\
examples:
  abliterate cancel 4kz9          the end of an id, as `abliterate status` prints it
  abliterate cancel 4kz9 7qm2     several"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    configure_act(parser, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    return run_act(args, "cancel")
