"""Where a conversation's words come from: one question out of arguments and a pipe, or lines that a person types.

Does not know what is done with them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence


def asked_once(prompt: Sequence[str]) -> str | None:
    """The one question: what stdin has, then the prompt. None where a person is to be asked."""
    given = " ".join(prompt)
    if sys.stdin is None or sys.stdin.isatty():
        return given or None
    piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip("\n")
    return "\n\n".join(part for part in (piped, given) if part.strip())


@contextlib.contextmanager
def lines(*, keep: bool) -> Iterator[Callable[[str], str]]:
    """Ask for lines with editing and history, kept in a file of ours between two conversations."""
    try:
        import readline
    except ImportError:  # a Python without it: lines, but no arrows
        yield input
        return
    from abliterate.contract.paths import directories

    file = directories().state / "chat-history"
    if keep:
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
    readline.set_history_length(1000)
    if "libedit" not in (readline.__doc__ or ""):
        # Python turns this off; with it, lines that are pasted together are one message.
        readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        yield input
    finally:
        if keep:
            with contextlib.suppress(OSError):
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                file.touch(mode=0o600)
                readline.write_history_file(file)
