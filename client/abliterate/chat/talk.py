"""A turn of a conversation: ask, stream, do what the model calls, ask again. And the loop of turns before a person.

Ctrl-C stops the answer and never the program. Does not know the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from abliterate.chat.conversation import Conversation, command, is_command
from abliterate.chat.engine import Piece
from abliterate.chat.screen import Screen
from abliterate.chat.tools import call_tool
from abliterate.contract.errors import AbliteratedError

ROUNDS: Final = 8  # calls upon calls
_QUOTES: Final = '"""'


class Asked(Protocol):
    """Whoever answers: an engine, or a model in this process."""

    def show(self, model: str) -> Mapping[str, Any]: ...
    def chat(self, body: Mapping[str, Any]) -> AbstractContextManager[Iterable[Piece]]: ...


def turn(engine: Asked, conversation: Conversation, screen: Screen, text: str) -> None:
    """Ask `text` and show the answer. Raises what the engine raises, and KeyboardInterrupt; either way the
    conversation can go on: an answer's beginning is kept, a question without one is taken back."""
    conversation.ask(text)
    try:
        for _ in range(ROUNDS):
            if not _answer(engine, conversation, screen):
                return
        screen.note(f"  stopped: {ROUNDS} rounds of calls are enough")
    except BaseException:
        if conversation.messages and conversation.messages[-1]["role"] != "assistant":
            conversation.take_back()
        raise
    finally:
        screen.end_line()


def _answer(engine: Asked, conversation: Conversation, screen: Screen) -> bool:
    """One answer; returns whether a tool was called, whose answer the model waits for."""
    content: list[str] = []
    thinking: list[str] = []
    calls: list[Mapping[str, Any]] = []
    try:
        with engine.chat(conversation.request()) as answer:
            for piece in answer:
                screen.think(piece.thinking)
                screen.say(piece.content)
                thinking.append(piece.thinking)
                content.append(piece.content)
                calls += piece.calls
                if piece.done and conversation.verbose:
                    screen.end_line()
                    screen.speed(piece.numbers)
    except BaseException:
        if "".join(content).strip():
            conversation.answered("".join(content))
        raise
    conversation.answered("".join(content), "".join(thinking), calls)
    for call in calls:
        name, shown, result = call_tool(call)
        screen.call(shown, result)
        conversation.told(name, result)
    return bool(calls)


def converse(engine: Asked, conversation: Conversation, screen: Screen, read: Callable[[str], str]) -> None:
    """Turn after turn, until the person leaves. `read` asks for a line; it raises EOFError at the end."""
    while True:
        try:
            text = _message(read)
        except EOFError:
            screen.note("")
            return
        except KeyboardInterrupt:
            screen.note("\nCtrl-D or /bye leaves")
            continue
        if not text.strip():
            continue
        try:
            if is_command(text):
                told = command(conversation, text)
                if told.leave:
                    return
                if told.load:
                    engine.show(told.load)
                    conversation.model = told.load
                    told = type(told)(f"Now {told.load}.")
                screen.show_thinking = conversation.show_thinking
                screen.note(told.text)
                continue
            turn(engine, conversation, screen, text)
        except AbliteratedError as error:
            screen.note(f"{error.message}" + (f"\n  → {error.remedy}" if error.remedy else ""))
        except KeyboardInterrupt:
            screen.note("stopped")


def _message(read: Callable[[str], str]) -> str:
    """A line, or the lines between triple quotes."""
    first = read(">>> ")
    if not first.lstrip().startswith(_QUOTES):
        return first
    text = first.lstrip().removeprefix(_QUOTES)
    while not text.rstrip().endswith(_QUOTES):
        text += "\n" + read("... ")
    return text.rstrip().removesuffix(_QUOTES).strip("\n")
