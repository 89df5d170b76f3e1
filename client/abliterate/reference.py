"""The page `docs/reference/client.md`, generated from the command line's own help: `python -m abliterate.reference`."""

from __future__ import annotations

import sys

from abliterate.introspect import main_help, verbs

_HEAD = """\
# The client: `abliterate`

Generated from the program: `python -m abliterate.reference > docs/reference/client.md`. Content goes to stdout,
commentary to stderr. An error is one line that says what failed, and one that begins with `→` and says what to do next.
"""


def reference() -> str:
    """The page: the main help, then a section a verb."""
    parts = [_HEAD, f"```text\n{main_help()}```\n"]
    parts += [f"## {verb.name}\n\n```text\n{verb.help.rstrip()}\n```\n" for verb in verbs()]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
