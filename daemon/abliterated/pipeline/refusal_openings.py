"""Where an answer decides to refuse: the tokens before that point, and those a refusal goes on with.

Most models decide at the first token. One that begins as if it would answer decides later; one that begins a refusal
and an answer with the same word decides at the next. Does not know models; works on answers already given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterated.pipeline.refusals import verdict

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Openings:
    """`tokens`: what a refusal goes on with at the point of decision; `ambiguous`: first tokens that refusals and
    answers share; `late`: whether the decision comes behind the first token, so each prompt has its own beginning."""

    tokens: tuple[int, ...]
    ambiguous: frozenset[int]
    late: bool


def learn_openings(tokenizer: Any, refusing: Sequence[Answer], answering: Sequence[Answer]) -> Openings:
    """From some answers that refuse and some that do not."""
    firsts = frozenset(answer[0] for answer in answering if answer)
    found = [place for answer in refusing if (place := decision(tokenizer, answer, firsts)) is not None]
    late = sum(place > 0 for place in found) > len(found) / 2
    tokens = {
        answer[place]
        for answer in refusing
        if (place := decision(tokenizer, answer, firsts)) is not None and (place > 0) == late
    }
    return Openings(tuple(sorted(tokens)), firsts if late else frozenset(), late)


def decision(tokenizer: Any, answer: Answer, ambiguous: frozenset[int] = frozenset()) -> int | None:
    """The place in a refusing answer where the refusal begins; None where it does not refuse."""

    def refuses(part: Answer) -> bool:
        return verdict(tokenizer.decode(part, skip_special_tokens=True)) == "refusal"

    end = next((end for end in range(1, len(answer) + 1) if refuses(answer[:end])), None)
    if end is None:
        return None
    place = max(start for start in range(end) if refuses(answer[start:end]))
    if place == 0 and answer[0] in ambiguous and end > 1:
        return 1
    return place
