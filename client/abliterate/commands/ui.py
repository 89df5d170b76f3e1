"""`abliterate ui`: serves the read-only page on a loopback port, to whoever has the link printed here."""

from __future__ import annotations

import argparse
import sys
import threading

from abliterate.settings import whereabouts

_DESCRIPTION = """\
Serve a page that shows the queue and why jobs wait, the running job as it goes, what ended, with its report, memory
and GPUs, and the proxy's traffic by model. It changes nothing. It listens on 127.0.0.1 only, and lets in whoever
opens the link printed here, once; Enter prints another one."""
_EPILOG = """\
examples:
  abliterate ui
  abliterate ui --open                       in the browser of this desktop
  abliterate ui --port 8011                  with ssh -L 8011:127.0.0.1:8011 HOST, opened where you sit

exit codes: 0 left with Ctrl-C · 69 the daemon does not answer · 75 the port is taken"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--port", type=int, default=0, metavar="N", help="listen there; any free port if left out")
    parser.add_argument("--open", action="store_true", help="open it in a browser too")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon
    from abliterate.contract.errors import AlreadyRunning, RecipeError
    from abliterate.ui.server import PageServer

    where = whereabouts(args)
    control = Daemon(where.socket)
    control.status()  # an absent daemon is an error now, not an empty page
    if not 0 <= args.port < 65536:
        raise RecipeError(f"--port {args.port}: no port", remedy="1 to 65535, or leave it out")
    try:
        server = PageServer(control, where.home.jobs if where.home else None, args.port)
    except OSError as error:
        raise AlreadyRunning(
            f"127.0.0.1:{args.port}: can't be listened on ({error.strerror})", remedy="Leave --port out for a free one"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="page", daemon=True)
    thread.start()
    try:
        link = server.gate.link()
        sys.stdout.write(f"{link}\n")
        sys.stdout.flush()
        if args.open:
            import webbrowser

            webbrowser.open(link)
        if sys.stdin is not None and sys.stdin.isatty():
            sys.stderr.write("The link works once. Enter: another one. Ctrl-C: leave.\n")
            while sys.stdin.readline():
                sys.stdout.write(f"{server.gate.link()}\n")
                sys.stdout.flush()
        thread.join()
    except KeyboardInterrupt:
        return 0
    finally:
        server.end()
    return 0
