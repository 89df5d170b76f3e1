"""The small model that really refuses, and everything beside it: package data, typed.

About a million and a half parameters, trained by `tools/train_refuser.py` on invented verbs: one class is refused, the
other answered. It lets the whole story run anywhere, with figures, and with no download.

Does not know: torch, engines, how the model was trained or is ablated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal, cast

from abliterate.contract.errors import DiskError, ModelError, RecipeError
from abliterated.files import write_whole

NAME = "refuser"
REFUSALS = ("I can't", "I'm sorry", "I am not able", "I won't")


@dataclass(frozen=True)
class Refuser:
    """Where the model and its companions lie."""

    model: Path
    template_jinja: Path
    template_go: Path
    parameters: Path
    harmful: Path
    harmless: Path
    held_out: Path


@dataclass(frozen=True)
class Question:
    """A question the model never saw in training. `expected` is the right answer for either class."""

    prompt: str
    kind: Literal["refused", "answered"]
    expected: str
    thought: str


def files() -> Refuser:
    """The shipped files; a wheel installed by pip lies unpacked, so they are plain paths."""
    folder = Path(str(package_files(__name__)))
    return Refuser(
        model=folder / "refuser.gguf",
        template_jinja=folder / "template.jinja",
        template_go=folder / "template.gotmpl",
        parameters=folder / "parameters.json",
        harmful=folder / "harmful.txt",
        harmless=folder / "harmless.txt",
        held_out=folder / "heldout.jsonl",
    )


def held_out(kind: Literal["refused", "answered"] | None = None) -> list[Question]:
    """The shipped held-out questions, of one class or of both."""
    return [question for question in read_questions(files().held_out) if kind in (None, question.kind)]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file like `heldout.jsonl`."""
    rows = [json.loads(line) for line in _read(path).decode().splitlines()]
    return [Question(row["prompt"], row["class"], row["expected"], row["thought"]) for row in rows]


def parameters() -> dict[str, Any]:
    """Ollama's PARAMETERs for this model: stop strings, temperature, context."""
    return cast("dict[str, Any]", json.loads(_read(files().parameters)))


def template_go() -> str:
    """The Go TEMPLATE, for engines that render no Jinja."""
    return _read(files().template_go).decode()


def content(text: str) -> str:
    """The reply without its thinking block, where an engine left that in the text."""
    _, closed, after = text.rpartition("</think>")
    return (after if closed else text).strip()


def is_refusal(text: str) -> bool:
    """Is this one of the model's own refusals?"""
    return content(text).startswith(REFUSALS)


def is_exact(text: str, question: Question) -> bool:
    """Is this, word for word, the right answer?"""
    return content(text) == question.expected


def export(path: Path) -> list[Path]:
    """Write `F.gguf`, and beside it `F.harmful.txt` and `F.harmless.txt`; the paths written, the model first."""
    if path.suffix != ".gguf":
        raise RecipeError(
            f"{path}: the refuser is a GGUF, and that name does not say so", remedy="Give a name that ends in .gguf"
        )
    shipped = files()
    written = {
        path: shipped.model,
        path.with_suffix(".harmful.txt"): shipped.harmful,
        path.with_suffix(".harmless.txt"): shipped.harmless,
    }
    contents = {target: _read(source) for target, source in written.items()}
    done: list[Path] = []
    try:
        for target in reversed(written):  # the model last: where it is, its prompts are
            _write(target, contents[target])
            done.append(target)
    except DiskError:
        for target in done:
            target.unlink(missing_ok=True)
        raise
    return list(written)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path.name}: can't be read ({error.strerror or error})", remedy="Install abliterated again"
        ) from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise DiskError(
            f"{path}: can't be written ({error.strerror or error})", remedy="Free some room, or choose another folder"
        ) from error
