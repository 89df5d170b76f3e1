"""A conversation: what was said, how it is asked for, and the commands that change it. Pure.

A question whose answer failed or was stopped before its first word is taken back, so that roles always alternate.
Does not know the engine, nor the terminal.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from abliterate.chat.options import add_option
from abliterate.chat.tools import TOOLS
from abliterate.contract.errors import RecipeError

Think = bool | str | None
THINK: Final[dict[str, Think]] = {
    "yes": True, "no": False, "true": True, "false": False, "low": "low", "medium": "medium", "high": "high",
}  # fmt: skip

HELP: Final = """\
  /set system TEXT        what the model is told beforehand; without TEXT: nothing
  /set parameter KEY VAL  an option, as num_ctx 8192
  /set think [LEVEL]      let it think; /set nothink: don't
  /set thinking shown     or hidden
  /set verbose            tell speed after each answer; /set quiet: don't
  /tools                  hand it the demo tools, or take them away
  /load NAME              go on with another model
  /show                   what is set
  /clear                  forget what was said
  /bye                    leave, as Ctrl-D does
  \"\"\" … \"\"\"             a message of several lines
  Ctrl-C                  stops an answer, and clears a line"""
COMMANDS: Final = ("/set", "/tools", "/load", "/show", "/clear", "/bye", "/exit", "/quit", "/help", "/?")


@dataclass
class Conversation:
    """`messages` are as the API wants them, without the system prompt."""

    model: str
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    think: Think = None
    show_thinking: bool = True
    tools: bool = False
    verbose: bool = False
    keep_alive: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """The body of `/api/chat`."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*before, *self.messages]}
        if self.options:
            body["options"] = self.options
        if self.think is not None:
            body["think"] = self.think
        if self.tools:
            body["tools"] = [tool.schema() for tool in TOOLS]
        if self.keep_alive:
            body["keep_alive"] = self.keep_alive
        return body

    def ask(self, text: str) -> None:
        """Add the person's words."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, content: str, thinking: str = "", calls: Sequence[Mapping[str, Any]] = ()) -> None:
        """Add the model's; what it thought is kept only beside a call, whose answer it may still need."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message |= {"tool_calls": list(calls)} | ({"thinking": thinking} if thinking else {})
        self.messages.append(message)

    def told(self, tool: str, result: str) -> None:
        """Add a tool's answer."""
        self.messages.append({"role": "tool", "tool_name": tool, "content": result})

    def take_back(self) -> None:
        """Drop the last question and what followed it."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass


@dataclass(frozen=True)
class Told:
    """What a command says. `leave`: it was the last; `load`: a model to look for before it is taken."""

    text: str = ""
    leave: bool = False
    load: str = ""


def is_command(line: str) -> bool:
    """Whether a line is for us and not for the model: a path that begins with a slash isn't."""
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    return first.startswith("/") and "/" not in first[1:] and len(first) < 12


def command(conversation: Conversation, line: str) -> Told:
    """Carry out a `/command`. Raises RecipeError for one that isn't understood."""
    words = line.split()
    name, rest = words[0], words[1:]
    if name in ("/bye", "/exit", "/quit"):
        return Told(leave=True)
    if name in ("/?", "/help"):
        return Told(HELP)
    if name == "/clear":
        conversation.messages.clear()
        return Told("Forgotten.")
    if name == "/tools":
        conversation.tools = not conversation.tools
        names = ", ".join(tool.name for tool in TOOLS)
        return Told(f"Tools: {names}." if conversation.tools else "No tools.")
    if name == "/load" and len(rest) == 1:
        return Told(load=rest[0])
    if name == "/show":
        return Told(_settings(conversation))
    if name == "/set":
        return Told(_set(conversation, rest, line))
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    raise RecipeError(f"{line.strip()}: not understood", remedy=f"Did you mean {near[0]}?" if near else "See /?")


def _set(conversation: Conversation, words: list[str], line: str) -> str:
    match words:
        case ["system", *_]:
            conversation.system = line.split(maxsplit=2)[2].strip().strip('"') if len(words) > 1 else ""
            return "System prompt set." if conversation.system else "No system prompt."
        case ["parameter", key, value, *more]:
            add_option(conversation.options, key, " ".join([value, *more]))
            return f"{key} = {json.dumps(conversation.options[key])}"
        case ["think"]:
            conversation.think = True
            return "It may think."
        case ["think", level] if level in THINK:
            conversation.think = THINK[level]
            return f"Thinking: {level}."
        case ["nothink"]:
            conversation.think = False
            return "It answers without thinking."
        case ["thinking", ("shown" | "hidden") as how]:
            conversation.show_thinking = how == "shown"
            return f"Thinking is {how}."
        case ["verbose" | "quiet" as how]:
            conversation.verbose = how == "verbose"
            return "Speed is told." if conversation.verbose else "Speed is not told."
    raise RecipeError(f"{line.strip()}: not understood", remedy="See /?")


def _settings(conversation: Conversation) -> str:
    spelt: dict[Think, str] = {None: "as the model does", True: "yes", False: "no"}
    think = spelt.get(conversation.think, str(conversation.think))
    facts = [
        ("model", conversation.model),
        ("system", conversation.system or "none of ours"),
        ("options", ", ".join(f"{key}={value}" for key, value in conversation.options.items()) or "the model's"),
        ("thinks", f"{think}, {'shown' if conversation.show_thinking else 'hidden'}"),
        ("tools", ", ".join(tool.name for tool in TOOLS) if conversation.tools else "none"),
        ("said", f"{len(conversation.messages)} messages"),
    ]
    return "\n".join(f"  {name:<8} {value}" for name, value in facts)
