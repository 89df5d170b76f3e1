"""`abliterate chat`: talks to a model, before a person's eyes or in a pipe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abliterate.chat.conversation import Conversation
    from abliterate.chat.engine import Engine
    from abliterate.cli import VerbParser

_DESCRIPTION = """\
Talk to a model. In a terminal it is a conversation, with /? for help; with a prompt, or with text on stdin, it is
one question, and stdout gets the answer alone. The engine is $OLLAMA_HOST, or else the daemon's proxy."""
_EPILOG = """\
examples:
  abliterate chat qwen3-abliterated:8b
  abliterate chat qwen3-abliterated:8b "why is the sky blue?"
  git diff | abliterate chat qwen3-abliterated:8b "write a commit message for this" > message.txt
  abliterate chat qwen3-abliterated:8b --system "answer in one sentence" --set num_ctx=8192 --set temperature=0
  abliterate chat qwen3-abliterated:8b --tools "what is 12.5 % of 1880, and what time is it in Tokyo?"

in the conversation:
  \"\"\" begins and ends a message of several lines · Ctrl-C stops the answer · Ctrl-D leaves · /? tells the rest

exit codes: 0 · 2 an option is wrong · 5 the engine refused · 7 no such model · 75 nobody answers · 130 interrupted"""


def configure(parser: VerbParser) -> None:
    """Add this verb's arguments."""
    parser.intermixed = True
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="NAME", help="the model, as Ollama names it")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", default=[], help="ask this and leave; left out: a conversation"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the engine, as in num_ctx=8192 or temperature=0; may be repeated",
    )
    parser.add_argument(
        "--think",
        metavar="LEVEL",
        choices=("yes", "no", "low", "medium", "high"),
        help="yes, no, low, medium or high; left out: as the model does",
    )
    parser.add_argument("--hide-thinking", action="store_true", help="let it think, but don't show it")
    parser.add_argument("--tools", action="store_true", help="hand it demo tools: clock, calculator, dice, word count")
    parser.add_argument("--verbose", action="store_true", help="tell tokens and speed after each answer")
    parser.add_argument("--keepalive", metavar="TIME", default="", help="how long the model stays loaded, as in 5m")
    parser.add_argument("--no-history", action="store_true", help="don't keep the lines typed here")
    parser.add_argument("--host", default="", metavar="URL", help="the engine; else $OLLAMA_HOST, else the daemon's")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.chat.address import find_address
    from abliterate.chat.conversation import THINK, Conversation
    from abliterate.chat.engine import Engine
    from abliterate.chat.options import parse_options
    from abliterate.chat.terminal import asked_once

    conversation = Conversation(
        model=args.model,
        system=args.system,
        options=parse_options(args.settings),
        think=THINK[args.think] if args.think else None,
        show_thinking=not args.hide_thinking,
        tools=args.tools,
        verbose=args.verbose,
        keep_alive=args.keepalive,
    )
    engine = Engine(find_address(args))
    asked = asked_once(args.prompt)
    if asked is None:
        return _converse(engine, conversation, keep=not args.no_history)
    return _ask_once(engine, conversation, asked)


def _ask_once(engine: Engine, conversation: Conversation, asked: str) -> int:
    from abliterate.chat.screen import Screen
    from abliterate.chat.talk import turn
    from abliterate.contract.errors import RecipeError

    if not asked.strip():
        raise RecipeError("there is nothing to ask", remedy="Give a prompt, or run it in a terminal to talk")
    turn(engine, conversation, Screen(sys.stdout, sys.stderr, show_thinking=conversation.show_thinking), asked)
    return 0


def _converse(engine: Engine, conversation: Conversation, *, keep: bool) -> int:
    from abliterate.chat.screen import Screen
    from abliterate.chat.talk import converse
    from abliterate.chat.terminal import lines

    engine.show(conversation.model)  # an absent model is an error now, not at the first question
    screen = Screen(sys.stdout, sys.stderr, show_thinking=conversation.show_thinking)
    screen.note(f"{conversation.model} at {engine.address}; /? for help, Ctrl-D leaves")
    with lines(keep=keep) as read:
        converse(engine, conversation, screen, read)
    return 0
