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
from abliterate.contract.report import PromptSource

Kind = Literal["harmful", "harmless"]

# Of a set that is measured whole, this share is kept back for selecting and evaluating.
HELD_BACK: Final = 0.25
VALIDATION: Final = 32
BUILTIN_LICENCE: Final = "Apache-2.0"


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
    sources: tuple[PromptSource, ...] = ()

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
    harmful, harmless = _read(asked.harmful, "harmful"), _read(asked.harmless, "harmless")
    atoms = _read(asked.atoms, "harmless", "atoms")
    _check_apart(harmful[0], harmless[0])
    return PromptSets(
        harmful=_split(harmful[0], asked, "harmful"),
        harmless=_split(harmless[0], asked, "harmless"),
        atoms=tuple(atoms[0]),
        system=asked.system,
        sources=(*harmful[1], *harmless[1], *atoms[1]),
    )


def data_sets(asked: Prompts) -> list[str]:
    """The sources that come from a hub, each once."""
    named = [asked.harmful, asked.harmless, asked.atoms]
    every = [source for some in named for source in ([some] if isinstance(some, str) else some)]
    return list(dict.fromkeys(source for source in every if source.startswith("hf:")))


def _read(sources: str | Sequence[str], kind: Kind, told: str = "") -> tuple[list[str], list[PromptSource]]:
    """All prompts of these sources, in order, each once, and what there is to say of each source."""
    found: list[str] = []
    listed: list[PromptSource] = []
    for source in [sources] if isinstance(sources, str) else sources:
        licence = revision = ""
        name = source
        if source == "builtin":
            text = resources.files(__package__).joinpath(f"prompts/{kind}.txt").read_text(encoding="utf-8")
            some, licence = _lines(text), BUILTIN_LICENCE
        elif source.startswith("hf:"):
            # The hub's client is read only where it is needed.
            from abliterated.pipeline.datasets import read_column

            column = read_column(source)
            some, name, licence, revision = list(column.texts), column.name, column.licence, column.revision
        else:
            path = Path(source).expanduser()
            some, name = _from_path(path), path.name
        found += some
        listed.append(PromptSource(kind=told or kind, name=name, count=len(some), licence=licence, revision=revision))
    return list(dict.fromkeys(found)), listed


def _check_apart(harmful: Sequence[str], harmless: Sequence[str]) -> None:
    """What both classes hold makes no difference between them; drawn differently it would pass for one."""
    both = len(set(harmful) & set(harmless))
    if 2 * both > min(len(harmful), len(harmless)):
        raise RecipeError(
            f"prompts.harmful and prompts.harmless have {both} prompts in common: nothing tells them apart",
            remedy="Give prompts of two different kinds",
        )


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
