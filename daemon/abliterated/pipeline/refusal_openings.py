"""Where an answer decides to refuse: the tokens before that point, and those a refusal goes on with.

Most models decide at the first token. One that begins as if it would answer decides later; a refusal that begins with
the same token as some answer decides at the next. Does not know models; works on answers already given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterated.pipeline.refusals import verdict

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Openings:
    """`tokens`: what refusals go on with at the point of decision; `firsts`: what they begin with; `ambiguous`: what
    answers begin with, too; `late`: whether most begin with something else."""

    tokens: tuple[int, ...]
    firsts: tuple[int, ...]
    ambiguous: frozenset[int] = frozenset()
    late: bool = False

    @property
    def plain(self) -> tuple[int, ...]:
        """What only refusals begin with."""
        return tuple(token for token in self.firsts if token not in self.ambiguous)


def learn_openings(tokenizer: Any, refusing: Sequence[Answer], answering: Sequence[Answer]) -> Openings:
    """From some answers that refuse and some that do not."""
    ambiguous = frozenset(answer[0] for answer in answering if answer)
    places = [(answer, decision(tokenizer, answer, ambiguous)) for answer in refusing]
    found = [(answer, place) for answer, place in places if place is not None]
    return Openings(
        tokens=tuple(sorted({answer[place] for answer, place in found})),
        firsts=tuple(sorted({answer[0] for answer, _ in found})),
        ambiguous=ambiguous,
        late=sum(bool(decision(tokenizer, answer)) for answer, _ in found) > len(found) / 2,
    )


def decision(tokenizer: Any, answer: Answer, ambiguous: frozenset[int] = frozenset()) -> int | None:
    """The place in a refusing answer where the refusal begins; None where it does not refuse."""

    def refuses(part: Answer) -> bool:
        return verdict(tokenizer.decode(part, skip_special_tokens=True)) == "refusal"

    end = next((end for end in range(1, len(answer) + 1) if refuses(answer[:end])), None)
    if end is None:
        return None
    place = max(start for start in range(end) if refuses(answer[start:end]))
    if place == 0 and answer[0] in ambiguous and len(answer) > 1:
        return 1
    return place


@dataclass(frozen=True)
class Begun:
    """A renderer whose prompts end where their answers decide: each with its answer's beginning behind it."""

    renderer: Any
    beginnings: Mapping[str, Answer]

    def all_tokens(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each prompt's token ids and its beginning's."""
        rows: list[tuple[int, ...]] = self.renderer.all_tokens(prompts)
        return [row + self.beginnings.get(prompt, ()) for prompt, row in zip(prompts, rows, strict=True)]


def beginnings(
    tokenizer: Any, openings: Openings, harmful: Mapping[str, Answer], harmless: Mapping[str, Answer]
) -> dict[str, Answer]:
    """How far each answer goes before it decides; of answers that do not refuse, as far as the token that mostly stands
    before a decision, or else as far as most go. Prompts whose class they belie are left out."""
    found = {}
    for prompt, answer in harmful.items():
        place = decision(tokenizer, answer, openings.ambiguous)
        if place is not None:
            found[prompt] = answer[:place]
    before = Counter(begun[-1] for begun in found.values() if begun).most_common(1)
    lengths = sorted(len(begun) for begun in found.values())
    usual = lengths[len(lengths) // 2] if lengths else 0
    for prompt, answer in harmless.items():
        if decision(tokenizer, answer, openings.ambiguous) is None:
            there = before and before[0][0] in answer
            found[prompt] = answer[: answer.index(before[0][0]) + 1] if there else answer[:usual]
    return found
