"""Ollama's modelfile, read and written: pure text in, a frozen value out.

Three spellings meet here. What a person writes follows Ollama's grammar. What `/api/show` prints follows a quoting that
its own grammar cannot always undo (`PARAMETER stop "` is printed bare; a template may hold a closing `\"\"\"`), so
`from_show` uses the exact values of the other fields of that answer as hints. What `write` prints reads back exactly,
or is refused. Nothing is ever sent to Ollama as text: creation uses JSON (see `request`).

Does not know the network, nor what a parameter means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from abliterate.contract.errors import ModelError

Scalar = str | int | float | bool

COMMANDS = frozenset(
    {
        "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
        "requires",
    }
)  # fmt: skip
ROLES = frozenset({"system", "user", "assistant"})
NO_TEMPLATE = "{{ .Prompt }}"  # what Ollama prints for a model without any template

_INTEGERS = frozenset(
    {
        "num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
        "num_thread", "mirostat", "draft_num_predict",
    }
)  # fmt: skip
_FLOATS = frozenset(
    {
        "top_p", "min_p", "typical_p", "tfs_z", "temperature", "repeat_penalty", "presence_penalty",
        "frequency_penalty", "mirostat_tau", "mirostat_eta",
    }
)  # fmt: skip
_BOOLEANS = frozenset(
    {"use_mmap", "use_mlock", "numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "penalize_newline"}
)


@dataclass(frozen=True)
class Message:
    """One MESSAGE line."""

    role: str
    content: str


@dataclass(frozen=True)
class Modelfile:
    """What a modelfile says. `models`: the FROM lines, the model first, then projectors. `template` None: no such line.

    `others`: commands we don't know (of an Ollama newer than us), as found in a `/api/show` answer.
    """

    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    template: str | None = None
    system: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    parameters: tuple[tuple[str, Scalar], ...] = ()
    licenses: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    def parameter_map(self) -> dict[str, Scalar | list[Scalar]]:
        """As `/api/create` takes them: a repeated name (and `stop` always) becomes a list."""
        found: dict[str, list[Scalar]] = {}
        for name, value in self.parameters:
            found.setdefault(name, []).append(value)
        return {name: values if name == "stop" or len(values) > 1 else values[0] for name, values in found.items()}


@dataclass
class _Reader:
    """A cursor over the text. `known`: exact values by command, longest first, in Ollama's quoting."""

    text: str
    known: Mapping[str, list[str]] = field(default_factory=dict)
    position: int = 0

    def line_end(self, start: int) -> int:
        end = self.text.find("\n", start)
        return len(self.text) if end < 0 else end

    def error(self, what: str) -> ModelError:
        line = self.text.count("\n", 0, self.position) + 1
        return ModelError(f"modelfile, line {line}: {what}", remedy="Look at it with `ollama show --modelfile`")

    def skip_to_command(self) -> bool:
        """Past blank lines and comments; False at the end."""
        while self.position < len(self.text):
            end = self.line_end(self.position)
            line = self.text[self.position : end].strip()
            if line and not line.startswith("#"):
                return True
            self.position = end + 1
        return False

    def word(self) -> str:
        """The next word of this line, and the one blank after it."""
        match = re.compile(r"[ \t]*([^ \t\n]*)(?:[ \t]|(?=\n)|\Z)").match(self.text, self.position)
        assert match is not None
        self.position = match.end()
        return match.group(1)

    def value(self, command: str) -> str:
        """The value that begins here, to the end of its last line."""
        for exact in self.known.get(command, ()):
            quoted = ollama_quote(exact)
            end = self.position + len(quoted)
            if self.text.startswith(quoted, self.position) and self.goes_on_after(end):
                self.position = end + 1
                return exact
        while self.text[self.position : self.position + 1] in (" ", "\t"):
            self.position += 1
        end = self.line_end(self.position)
        line = self.text[self.position : end].strip()
        if line.startswith('"""'):
            return self.quoted('"""')
        if line.startswith('"'):
            if len(line) > 1 and line.endswith('"'):
                self.position = end + 1
                return line[1:-1]
            return self.quoted('"')
        self.position = end + 1
        return line

    def quoted(self, mark: str) -> str:
        """A value in quotes: it ends where a quote ends its line and a command, a comment or nothing follows."""
        start = self.position + len(mark)
        at = self.text.find(mark, start if mark == '"""' else self.line_end(start))
        first = -1
        while at >= 0:
            end = at + len(mark)
            rest = self.text[end : self.line_end(end)]
            if not rest.strip():
                first = at if first < 0 else first
                if self.goes_on_after(end + len(rest)):
                    self.position = end + len(rest) + 1
                    return self.text[start:at]
            if mark == '"':
                break  # Ollama writes single quotes only around what holds none
            at = self.text.find(mark, at + 1)
        if mark == '"':  # a bare value that happens to begin with a quote
            end = self.line_end(self.position)
            line = self.text[self.position : end].strip()
            self.position = end + 1
            return line
        if first < 0:
            raise self.error('an opening """ is never closed')
        self.position = self.line_end(first) + 1
        return self.text[start:first]

    def goes_on_after(self, end: int) -> bool:
        """Is `end` an end of line, with a command, a comment, a blank line or the end of the text after it?"""
        if end >= len(self.text):
            return end == len(self.text)
        if self.text[end] != "\n":
            return False
        line = self.text[end + 1 : self.line_end(end + 1)].strip()
        head = re.split(r"[ \t]", line, maxsplit=1)[0]
        return not line or line.startswith("#") or head.lower() in COMMANDS


def parse(text: str, known: Mapping[str, Iterable[str]] | None = None, *, lenient: bool = False) -> Modelfile:
    """Read a modelfile. Raises ModelError that names the line; `lenient` keeps unknown commands in `others`."""
    hints = {command: sorted(set(values), key=len, reverse=True) for command, values in (known or {}).items()}
    reader = _Reader(text.removeprefix("\ufeff"), hints)
    found: dict[str, list[str]] = {command: [] for command in COMMANDS}
    parameters: list[tuple[str, Scalar]] = []
    messages: list[Message] = []
    others: list[tuple[str, str]] = []
    while reader.skip_to_command():
        word = reader.word()
        command = word.lower()
        if command not in COMMANDS:
            if not (lenient and re.fullmatch(r"[A-Z_]{2,40}", word)):
                raise reader.error(f"{word[:40]!r} is no command")
            others.append((word, reader.value(command)))
        elif command == "parameter":
            name = reader.word()
            parameters.append((name, parameter_value(name, reader.value(f"parameter {name}"))))
        elif command == "message":
            role = reader.word()
            if role not in ROLES:
                raise reader.error(f"{role[:40]!r} is no role of a message")
            messages.append(Message(role, reader.value("message")))
        else:
            found[command].append(reader.value(command))

    def last(command: str) -> str:
        return found[command][-1] if found[command] else ""

    return Modelfile(
        models=tuple(found["from"]),
        adapters=tuple(found["adapter"]),
        drafts=tuple(found["draft"]),
        template=last("template") if found["template"] else None,
        system=last("system"),
        renderer=last("renderer"),
        parser=last("parser"),
        requires=last("requires"),
        parameters=tuple(parameters),
        licenses=tuple(found["license"]),
        messages=tuple(messages),
        others=tuple(others),
    )


def from_show(show: Mapping[str, Any]) -> Modelfile:
    """The modelfile of a `/api/show` answer: its text, read with the exact values its other fields give."""
    exact = read_parameters(str(show.get("parameters") or ""))
    said = [m for m in show.get("messages") or () if isinstance(m, Mapping)]
    known: dict[str, list[str]] = {
        "system": [str(show.get("system") or "")],
        "template": [str(show.get("template") or "")],
        "license": [str(show.get("license") or "")],
        "message": [str(m.get("content", "")) for m in said],
    }
    for name, value in exact or ():
        known.setdefault(f"parameter {name}", []).append(_written(value))
    known = {command: kept for command, values in known.items() if (kept := [value for value in values if value])}
    modelfile = parse(str(show.get("modelfile") or ""), known, lenient=True)
    if exact:
        modelfile = replace(modelfile, parameters=exact)
    return modelfile


def write(modelfile: Modelfile) -> str:
    """The text of a modelfile, which reads back as the same. Raises ModelError where no quoting can say it."""
    lines = [f"FROM {quote(name)}" for name in modelfile.models]
    lines += [f"ADAPTER {quote(name)}" for name in modelfile.adapters]
    lines += [f"DRAFT {quote(name)}" for name in modelfile.drafts]
    if modelfile.template is not None:
        lines.append(f"TEMPLATE {quote(modelfile.template)}")
    for command in ("system", "renderer", "parser", "requires"):
        if value := getattr(modelfile, command):
            lines.append(f"{command.upper()} {quote(value)}")
    lines += [f"PARAMETER {name} {quote(_written(value))}" for name, value in modelfile.parameters]
    lines += [f"LICENSE {quote(text)}" for text in modelfile.licenses]
    lines += [f"MESSAGE {message.role} {quote(message.content)}" for message in modelfile.messages]
    text = "\n".join(lines) + "\n"
    if parse(text) != replace(modelfile, others=()):
        raise ModelError(
            'this model holds a text that no modelfile can quote (a line ending in """ before a command)',
            remedy="Ollama takes it as JSON all the same; only the text can't be printed",
        )
    return text


def quote(value: str) -> str:
    """Quotes where reading needs them: an empty or multi-line value, blanks at its edges, a quote at its start."""
    if value and value == value.strip() and not re.search(r"[\r\n]", value) and not value.startswith('"'):
        return value
    return f'"{value}"' if '"' not in value else f'"""{value}"""'


def ollama_quote(value: str) -> str:
    """As Ollama prints a value in `/api/show`: quotes only for a line break or a blank at an edge."""
    if "\n" in value or value.startswith(" ") or value.endswith(" "):
        return f'"""{value}"""' if '"' in value else f'"{value}"'
    return value


def parameter_value(name: str, text: str) -> Scalar:
    """A parameter's text in its own type; a text that doesn't fit stays a string."""
    try:
        if name in _INTEGERS:
            number = float(text)
            return int(number) if number.is_integer() else number
        if name in _FLOATS:
            return float(text)
        if name in _BOOLEANS and text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
    except (ValueError, OverflowError):
        return text
    return text


def read_parameters(text: str) -> tuple[tuple[str, Scalar], ...] | None:
    """The `parameters` field of `/api/show`, its strings quoted as Go does; None where it can't be read."""
    found: list[tuple[str, Scalar]] = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        name, _, value = line.partition(" ")
        value = value.strip(" ")
        if value.startswith('"'):
            exact = _go_unquote(value)
            if exact is None:
                return None
            found.append((name, exact))
        elif value in ("true", "false"):
            found.append((name, value == "true"))
        else:
            found.append((name, parameter_value(name, value)))
    return tuple(found)


_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(rf"\\(?:x({_HEX}{{2}})|u({_HEX}{{4}})|U({_HEX}{{8}})|([abfnrtv\\\"']))")
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _go_unquote(text: str) -> str | None:
    if len(text) < 2 or not text.endswith('"'):
        return None
    inner = text[1:-1]
    if re.search(r'(?<!\\)(?:\\\\)*"', inner) or "\\" in _ESCAPE.sub("", inner):
        return None

    def plain(match: re.Match[str]) -> str:
        code = match.group(1) or match.group(2) or match.group(3)
        return chr(int(code, 16)) if code else _SIMPLE.get(match.group(4), match.group(4))

    return _ESCAPE.sub(plain, inner)


def _written(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else repr(value)
