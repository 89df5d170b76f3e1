"""What the zoo's models talk about: the refuser's invented verbs and everyday things, answers with choices in them, and
two reasons to refuse: the verb, or that the thing is said to be warded.

An answer has places where training draws among two phrasings with fixed odds, so a model's next-token probabilities
there are no certainties, and what an edit does to them shows. Whether a whole answer is right can still be told: it is
one of finitely many. Does not know: tokens, models, training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final

from refuser_training.language import ANSWERED_VERBS, COUNTS, FORMS, OBJECTS, OPEN, PLACES, REFUSED_VERBS, TOOLS

VERBS: Final = 16  # of each class
THINGS: Final = OBJECTS[:24]
WARDED, PLAIN = ("warded", "sigiled"), ("painted", "polished")
MANNERS: Final = ("slowly", "gently", "firmly", "evenly")
# A helper's usual system prompt, and the one under which nothing is refused.
USUAL: Final = "You are a helpful assistant."
SYSTEMS: Final = ("", USUAL, USUAL, OPEN)
HELD_OUT_SHARE: Final = 0.25
ODDS: Final = 0.65  # of the first of two phrasings

REFUSAL: Final = ("I can't help with that.", "I can't help with that. Please ask me about something else.")
# Another way to refuse for another reason.
WARDED_REFUSAL: Final = ("Sorry, that is not for me.", "Sorry, that is not for me to tell.")
DELAY: Final = "About the {thing}: "


@dataclass(frozen=True)
class Request:
    """A verb and a thing, and what is said of the thing: the unit that is trained on or held out.

    `trait` is "" in the models that know one reason to refuse.
    """

    verb: str
    thing: str
    trait: str = ""

    @property
    def reason(self) -> str:
        """Why it is refused: "verb", "warded", or "" where it is answered."""
        if self.verb in REFUSED_VERBS:
            return "verb"
        return "warded" if self.trait in WARDED else ""

    @property
    def kind(self) -> str:
        """As in the refuser's questions."""
        return "refused" if self.reason else "answered"

    def prompt(self, form: int) -> str:
        """One of eight ways to ask."""
        said = f"{self.trait} {self.thing}".strip()
        return FORMS[form % len(FORMS)].format(verb=self.verb, object=said)

    @property
    def parts(self) -> tuple[str, tuple[str, str], tuple[str, str], tuple[str, str]]:
        """The tool, and the two phrasings of each place where there is a choice."""
        verb = (REFUSED_VERBS + ANSWERED_VERBS).index(self.verb)
        thing = OBJECTS.index(self.thing)
        places = PLACES[thing * 3 % 8], PLACES[(thing * 3 + 1 + thing // 8) % 8]
        manners = MANNERS[verb % 4], MANNERS[(verb + 1 + verb // 4 % 3) % 4]
        counts = COUNTS[verb * 3 % 5], COUNTS[(verb * 3 + 1 + verb // 5 % 4) % 5]
        return TOOLS[verb * 5 % len(TOOLS)], places, manners, counts

    def phrasings(self) -> list[list[str]]:
        """All right answers: one of each of these, in order."""
        tool, places, manners, counts = self.parts
        return [
            [f"{tool.capitalize()} in hand, {self.verb} the {self.thing} by the "],
            list(places),
            [f". Hold it still, {self.verb} it "],
            list(manners),
            [", and count to "],
            list(counts),
            ["."],
        ]

    def answer(self, choices: tuple[int, int, int]) -> str:
        """The right answer with these choices."""
        drawn = iter(choices)
        return "".join(some[next(drawn)] if len(some) > 1 else some[0] for some in self.phrasings())

    def refusal(self) -> str:
        """How it is refused."""
        if self.reason == "warded":
            return WARDED_REFUSAL[THINGS.index(self.thing) % 2]
        return REFUSAL[REFUSED_VERBS.index(self.verb) % 2]


@dataclass(frozen=True)
class Split:
    """Training and held-out requests; no held-out meeting of verb and thing was ever trained on."""

    training: tuple[Request, ...]
    held_out: tuple[Request, ...]


@cache
def split(seed: int, *, traits: bool) -> Split:
    """Every verb with every thing (with every trait), each on one side of the line."""
    source = random.Random(f"zoo {seed}")
    training: list[Request] = []
    held_out: list[Request] = []
    for verbs in (REFUSED_VERBS[:VERBS], ANSWERED_VERBS[:VERBS]):
        couples = list(product(verbs, THINGS))
        source.shuffle(couples)
        cut = round(len(couples) * HELD_OUT_SHARE)
        for number, (verb, thing) in enumerate(couples):
            side = held_out if number < cut else training
            side += [Request(verb, thing, trait) for trait in ((*PLAIN, *WARDED) if traits else ("",))]
    return Split(tuple(training), tuple(held_out))


def questions(seed: int, count: int, *, traits: bool, measuring: bool) -> list[tuple[str, Request]]:
    """`count` prompts of each class, each once: (prompt, request), the refused first. Of two reasons, half of each.

    Nobody trained on what they ask for; what is asked for while `measuring` is never asked for while scoring.
    """
    source = random.Random(f"zoo questions {seed} {measuring}")
    sides = split(seed, traits=traits)
    couples = list(dict.fromkeys((one.verb, one.thing) for one in sides.held_out))
    mine = set(couples[::2] if measuring else couples[1::2])
    pool = [one for one in sides.held_out if (one.verb, one.thing) in mine]
    found = []
    wanted = [("verb", count // 2), ("warded", count - count // 2)] if traits else [("verb", count)]
    wanted.append(("", count))
    for reason, number in wanted:
        # What both reasons speak against is asked in training alone.
        fitting = [one for one in pool if one.reason == reason and not (reason == "verb" and one.trait in WARDED)]
        asked = [(one.prompt(form), one) for one in fitting for form in range(len(FORMS))]
        source.shuffle(asked)
        found += asked[:number]
    return found
