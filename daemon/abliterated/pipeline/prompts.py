"""The prompts: read from where the recipe says, drawn with its seed, split, and rendered as the model was trained.

`PromptSets` keeps apart what is measured (training), what selects (validation) and what is asked at the end (held
out). Does not know what a model answers, or tensors.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Prompts

Kind = Literal["harmful", "harmless"]

# Of a set that is measured whole, this share is kept back for selecting and evaluating.
HELD_BACK: Final = 0.25
VALIDATION: Final = 32


@dataclass(frozen=True)
class Split:
    """One class of prompts, in three disjoint parts."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class PromptSets:
    """Both classes, what is to be protected, and the system prompt that goes before them all."""

    harmful: Split
    harmless: Split
    atoms: tuple[str, ...]
    system: str

    def digest(self) -> str:
        """sha256 (hex) of every prompt in its place."""
        content = hashlib.sha256()
        for split in (self.harmful, self.harmless):
            for part in (split.training, split.validation, split.held_out):
                content.update(("\n".join(part) + "\0").encode())
        content.update(("\n".join(self.atoms) + "\0" + self.system).encode())
        return content.hexdigest()


def read_prompts(asked: Prompts) -> PromptSets:
    """Every prompt the recipe asks for, drawn with its seed. RecipeError names file and line."""
    return PromptSets(
        harmful=_split(_read(asked.harmful, "harmful"), asked, "harmful"),
        harmless=_split(_read(asked.harmless, "harmless"), asked, "harmless"),
        atoms=tuple(_read(asked.atoms, "harmless")) if asked.atoms else (),
        system=asked.system,
    )


def _read(sources: str | Sequence[str], kind: Kind) -> list[str]:
    """All prompts of these sources, in order, each once."""
    found: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if source == "builtin":
            text = resources.files(__package__).joinpath(f"prompts/{kind}.txt").read_text(encoding="utf-8")
            found += _lines(text)
        elif source.startswith("hf:"):
            raise RecipeError(
                f"{source} can't be fetched yet", remedy="Download the data set and give a text file, one prompt a line"
            )
        else:
            found += _from_path(Path(source).expanduser())
    return list(dict.fromkeys(found))


def _from_path(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise RecipeError(f"no prompts: {path} holds no *.txt", remedy="Put text files there, one prompt a line")
        return [line for file in files for line in _from_path(file)]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"can't read the prompts in {path}: {error.strerror}", remedy="Check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8", remedy="Save the file as UTF-8") from error
    found = _lines(text)
    if not found:
        line = text.count("\n") + 1
        raise RecipeError(
            f"{path}, line {line}: the file ends without a prompt", remedy="Write one prompt a line; # begins a comment"
        )
    return found


def _lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith("#")]


def _split(pool: list[str], asked: Prompts, kind: Kind) -> Split:
    """Draw `count` to measure on; what selects and evaluates comes from the rest, or is kept back where there is none.

    Drawing depends on the seed and the prompts' order alone, and never on the other class.
    """
    if len(pool) < 4:
        raise RecipeError(
            f"prompts.{kind} has {len(pool)} prompts; at least 4 are needed",
            remedy="Two to measure on, one to select with, one to evaluate with, and better many more",
        )
    drawn = list(pool)
    random.Random(f"{asked.seed} {kind}").shuffle(drawn)  # noqa: S311 - reproducible, not secret
    back = max(2, round(min(len(drawn), asked.count) * HELD_BACK))
    training = drawn[: min(asked.count, len(drawn) - back)]
    rest = drawn[len(training) :]
    selecting = min(VALIDATION, max(1, len(rest) // 2))
    return Split(tuple(training), tuple(rest[:selecting]), tuple(rest[selecting:]))
