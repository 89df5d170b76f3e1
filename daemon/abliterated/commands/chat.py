"""`abliterated chat`: talk to a model in this process, with a direction taken out while it runs, no weight touched."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.chat.conversation import Conversation
from abliterate.chat.engine import Piece
from abliterate.chat.screen import Screen
from abliterate.chat.talk import converse, turn
from abliterate.chat.terminal import asked_once, lines
from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import Progress
from abliterate.render import clean
from abliterated.commands.foreground import MODEL_HELP, common, recipe_of
from abliterated.once import resolve

if TYPE_CHECKING:
    from abliterated.pipeline.talking import Talker

HELP = "talk to a model with a direction taken out of it as it runs, without touching its weights"
EXAMPLES = """\
examples:
  abliterated direction qwen3:8b -o refusal.pt
  abliterated chat qwen3:8b --direction refusal.pt
  abliterated chat ./model.gguf --direction refusal.pt "How do I pick a lock?"
  abliterated chat ./folder < prompt.txt

The model is read into this process, for as long as it lasts, and answers greedily, with thinking off. What its layers
add to the residual stream loses its share along the direction: the same as `abliterated apply` without norms kept, and
gone when the program ends. Ctrl-C stops an answer, Ctrl-D leaves, /? tells the rest.
stdout, in a pipe: the answer alone. `abliterate chat` is the one for models that an engine serves.
exit codes: 0 done; 2 an option or the direction file is wrong; 3 the model can't be used; 70 out of memory;
75 Ollama is away; 130 interrupted."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="ask this and leave")
    parser.add_argument("--direction", type=Path, metavar="FILE", help="a .pt or .safetensors file")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    common(parser)
    _mix(parser)


def _mix(parser: argparse.ArgumentParser) -> None:
    """Let the prompt stand behind options too: argparse gives an optional word up at the first option."""
    plain = parser.parse_known_args

    def mixed(args: Any = None, namespace: Any = None) -> Any:
        parser.parse_known_args = plain  # type: ignore[method-assign]
        try:
            return parser.parse_known_intermixed_args(args, namespace)
        finally:
            parser.parse_known_args = mixed  # type: ignore[method-assign]

    parser.parse_known_args = mixed  # type: ignore[method-assign]


def run(options: argparse.Namespace) -> int:
    if options.tokens < 1:
        raise RecipeError("--tokens counts from 1", remedy="Give a positive number")
    if options.direction and not options.direction.exists():
        raise RecipeError(
            f"--direction {options.direction}: no such file", remedy="`abliterated direction MODEL -o FILE` makes one"
        )
    asked = asked_once([options.prompt] if options.prompt else [])
    engine = _Here(_talker(options), options.tokens)
    conversation = Conversation(options.model, system=options.system)
    screen = Screen(sys.stdout, sys.stderr)
    if asked is not None:
        if not asked.strip():
            raise RecipeError("there is nothing to ask", remedy="Give a prompt, or run it in a terminal to talk")
        turn(engine, conversation, screen, asked)
        return 0
    without = f" without {options.direction.name}" if options.direction else ""
    screen.note(f"{options.model}{without}; /? for help, Ctrl-D leaves")
    with lines(keep=True) as read:
        converse(engine, conversation, screen, read)
    return 0


def _talker(options: argparse.Namespace) -> Talker:
    recipe = recipe_of(options)
    source, _ = resolve(recipe)
    with _telling(options) as tell:
        if not source:
            from abliterated.pipeline.hub import fetch

            def fetched(done: float, total: float) -> None:
                tell(Progress(stage="fetch", done=done, total=total, unit="B", message=f"fetching {recipe.model}"))

            source = str(fetch(recipe.model, progress=fetched, cancelled=lambda: False).folder)
        from abliterated.pipeline.source import open_source
        from abliterated.pipeline.talking import Talker
        from abliterated.pipeline.watch import Watch

        return Talker(open_source(Path(source)), recipe.run, options.direction, Watch(tell))


@contextlib.contextmanager
def _telling(options: argparse.Namespace) -> Iterator[Callable[[Progress], None]]:
    """What is waited for, on one line of a terminal that is gone afterwards."""
    live = not options.quiet and sys.stderr.isatty()

    def tell(progress: Progress) -> None:
        if live:
            share = f" {progress.done / progress.total:.0%}" if progress.total else ""
            sys.stderr.write(f"\r\x1b[K{clean(progress.message or 'reading the model')[:100]}{share} …")
            sys.stderr.flush()

    tell(Progress(stage="load"))
    try:
        yield tell
    finally:
        if live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class _Here:
    """An engine that is this process: what a conversation asks of one."""

    def __init__(self, talker: Talker, tokens: int) -> None:
        self._talker, self._tokens = talker, tokens

    def show(self, model: str) -> Mapping[str, Any]:
        raise RecipeError("one model is loaded here", remedy=f"Leave, and run `abliterated chat {model}`")

    def chat(self, body: Mapping[str, Any]) -> _Answer:
        if body.get("tools") or body.get("options") or body.get("think"):
            raise RecipeError(
                "no tools, options or thinking here: it answers greedily", remedy="`abliterate chat` has them"
            )
        return _Answer(self._talker.answer(body["messages"], self._tokens))


class _Answer:
    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if close := getattr(self._pieces, "close", None):
            close()  # the hooks go with the answer

    def __iter__(self) -> Iterator[Piece]:
        for text in self._pieces:
            yield Piece(content=text)
        yield Piece(done=True)
