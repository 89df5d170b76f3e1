"""`abliterate submit`: validates a recipe, hands it to the daemon, or leaves it in the in-tray when that is down."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.contract.errors import DaemonUnavailable
from abliterate.render import clean, json_text
from abliterate.settings import Whereabouts, whereabouts

if TYPE_CHECKING:
    from abliterate.api import Daemon
    from abliterate.wishes import Wish

_DESCRIPTION = """\
Queue a recipe. The job's id is printed on stdout. The recipe is validated first; paths in it are relative
to the recipe's folder, those in --set to the current one. While the daemon is down, the recipe is left
in its in-tray and starts with it."""
_EPILOG = """\
examples:
  abliterate submit qwen3:8b                      the default recipe, for a model Ollama has
  abliterate submit qwen3:8b --watch              followed to its end
  abliterate submit recipe.toml --set edit.strength=0.8 --name qwen3-mild:8b
  abliterate submit ./model.gguf
  abliterate new qwen3:8b | abliterate submit -

exit codes: 0 queued · 2 the recipe is wrong · 7 no such file; with --watch those of `abliterate wait`"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "asked", metavar="RECIPE|MODEL|-", help="a recipe's file, a model (a name, hf:ORG/REPO, a path), or stdin"
    )
    parser.add_argument("--name", default="", help="what the product is called in Ollama")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set a key of the recipe, as in edit.strength=0.8; may be repeated",
    )
    parser.add_argument("--watch", action="store_true", help="follow the job on stderr until it has ended")
    parser.add_argument("--json", action="store_true", help='print {"id", "target", "existing", "delivered"}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon
    from abliterate.contract.ids import new_id
    from abliterate.contract.recipe import target_name
    from abliterate.wishes import read_wish

    wish = read_wish(args.asked, name=args.name, settings=args.settings)
    where = whereabouts(args)
    server = Daemon(where.socket)
    answer = {"id": new_id(), "target": target_name(wish.recipe).short(), "existing": False}
    note = _deliver(server, where, wish, answer)
    if args.json:
        sys.stdout.write(json_text(answer) + "\n")
    else:
        sys.stdout.write(f"{answer['id']}\n")
    sys.stdout.flush()
    if note:
        sys.stderr.write(f"abliterate: {clean(note)}\n  → Start it with `abliterated serve`; the job starts with it\n")
    if not args.watch:
        return 0
    return DaemonUnavailable.exit_code if note else _watch(server, str(answer["id"]))


def _deliver(server: Daemon, where: Whereabouts, wish: Wish, answer: dict[str, object]) -> str:
    """Hand the recipe over; fills `answer`, and returns a note where only the folder could be reached."""
    from abliterate.contract.messages import Submit
    from abliterate.spool import drop

    job = str(answer["id"])
    try:
        submitted = server.submit(Submit(recipe=wish.text, id=job, label=wish.label))
    except DaemonUnavailable as error:
        if where.home is None:
            raise DaemonUnavailable(
                error.message,
                remedy="Start it with `abliterated serve`, or give --config, so that its in-tray is known",
            ) from error
        # The same id: had the daemon heard us after all, it recognises the file.
        path = drop(where.home, job, wish.label, wish.text.encode())
        answer |= {"delivered": "folder", "path": str(path)}
        return f"{error.message}; the recipe lies in its in-tray as {path.name}"
    answer |= {"id": submitted.id, "existing": submitted.existing, "delivered": "daemon"}
    if submitted.target:
        answer["target"] = submitted.target
    return ""


def _watch(server: Daemon, job: str) -> int:
    from abliterate.follow import Feed, exit_code
    from abliterate.live import watch_job

    try:
        with Feed(server, [job]) as feed:
            return exit_code([watch_job(feed, job, sys.stderr)])
    except KeyboardInterrupt:
        sys.stderr.write(f"\nabliterate: no longer watching; the job goes on\n  → abliterate cancel {job[-6:]}\n")
        return 130
