"""The search: which direction, removed how strongly from which layers, keeps refusals at the target and harmless
answers closest to what they were.

Trials are hooks and prefill (`trials.py`): no weight is touched. Each generation is tried on a few prompts, its better
part on more, its best on all. Least KL wins among those that keep to the target, with a margin for what the prompts do
not show. Seeded, and resumable by its journal. Does not know files of models, nor what the finalists do once written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from abliterate.contract.recipe import Edit
from abliterated.pipeline.candidates import harm
from abliterated.pipeline.directions import Float64, RefusalDirection, direction
from abliterated.pipeline.edit import LayerStrength, selected_layers, strengths
from abliterated.pipeline.kernels import Kernel, Parameters, Point, Space, constant
from abliterated.pipeline.search_journal import Journal
from abliterated.pipeline.search_sampler import FIRST, GENERATION, near, spread
from abliterated.pipeline.trials import Change, Scores, Trials

# Prompts of each class in each round, and which share of a generation goes on to the next.
ROUNDS: Final = (16, 32, 96)
GOES_ON: Final = (1.0, 0.34, 0.2)
# A prompt counts as safe where the model would refuse it with less than one chance in ten.
MARGIN: Final = 2.197
FINALISTS: Final = 3
# How much weaker than the best the last ones are, attention and MLP: as far as the target lets them.
WEAKER: Final = (
    (0.96, 0.96), (0.92, 0.92), (0.88, 0.88), (0.84, 0.84), (0.78, 0.78), (0.7, 0.7),
    (0.9, 1.0), (0.8, 1.0), (0.6, 1.0), (1.0, 0.9), (1.0, 0.8),
)  # fmt: skip
# Writers are weighed alone, in a deep model in so many groups of layers; below this KL harm is rounding.
BANDS: Final = 16
LEAST_HARM: Final = 1e-7


@dataclass(frozen=True)
class Tried:
    """A trial and its figures on the most prompts it was tried on: shares refused and not safe, mean KL, and how far
    harmful prompts go astray."""

    number: int
    change: Change
    parameters: dict[str, Any]
    point: Point | None
    refused: float
    unsafe: float
    kl: float
    astray: float
    round: int

    def rank(self, target: float) -> tuple[int, float, float]:
        """Smaller is better: more prompts first, then refusals beyond the target, then harm."""
        return -self.round, max(0.0, round(self.unsafe - target, 9)), harm(self.kl, self.astray)


@dataclass(frozen=True)
class Finalist:
    """What may be written. `number` is its trial's."""

    number: int
    direction: RefusalDirection
    refused: float
    kl: float


@dataclass(frozen=True)
class Searched:
    """`finalists`, best first; every trial as plain values; what should be said."""

    finalists: tuple[Finalist, ...]
    trials: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """Where a search begins: the direction chosen, and, where it may be chosen anew, all that were read (depth,
    positions, hidden) with the best places among them."""

    chosen: RefusalDirection
    positions: tuple[int, ...] = (-1,)
    directions: Float64 | None = None
    places: tuple[tuple[float, int], ...] = ()


class Search:
    """One search; `run` does it."""

    def __init__(self, trials: Trials, start: Start, edit: Edit, *, target: float, seed: int, journal: Journal) -> None:
        self.trials, self.start, self.edit = trials, start, edit
        self.target, self.seed, self.journal = target, seed, journal
        self.layers = trials.layers
        self.selected = selected_layers(edit.layers, self.layers)
        depth = 1 if start.directions is None else len(start.directions)
        self.space = Space(start.positions, depth, given=start.directions is None)
        self.tried: list[Tried] = []
        self.worth: Float64 = np.ones((self.layers, 2))

    def run(self, count: int) -> Searched:
        """`count` trials; the first is the recipe's own."""
        self.worth = self._worth()
        self._generation([None, *self._first(min(count, FIRST + 1) - 1)], count)
        generation = 0
        while len(self.tried) < count:
            generation += 1
            points = [one.point for one in self._sorted() if one.point is not None]
            left = 1.0 - len(self.tried) / count
            number = min(GENERATION, count - len(self.tried))
            if points and len(self.tried) + number == count:
                weaker = [self.space.weaker(points[0], *by) for by in WEAKER[:number]]
                self._generation(weaker, count, rounds=ROUNDS[-1:])
                break
            points = near(points, number, self.seed, generation, left) if points else spread(number, self.seed)
            self._generation(points, count)
        best = self._sorted()[:FINALISTS]
        notes = []
        if best[0].refused > self.target:
            notes.append(f"no trial kept refusals at {self.target:.1%}: the best leaves {best[0].refused:.1%}")
        return Searched(
            finalists=tuple(self._finalist(one) for one in best),
            trials=tuple(self._plain(one, one is best[0]) for one in self.tried),
            notes=tuple(notes),
        )

    def _first(self, count: int) -> list[Point]:
        """The best places with the whole strength everywhere, weaker and stronger, and points all over."""
        position = self.space.positions[0]
        places = self.start.places or ((0.0, position),)
        known = [self.space.point(index, place, constant(1.0), constant(1.0)) for index, place in places[:4]]
        index, place = places[0]
        known += [self.space.point(index, place, constant(weak), constant(weak)) for weak in (0.8, 1.2)]
        late = Kernel(peak=1.0, center=0.7, width=0.6, floor=0.0)
        known.append(self.space.point(index, place, late, late))
        for lean, peak in ((0.5, 1.0), (1.0, 1.0), (1.0, 0.7)):
            known.append(self.space.point(index, place, constant(peak), constant(peak), lean))
        return [*known, *spread(max(0, count - len(known)), self.seed)][:count]

    def _worth(self) -> Float64:
        """(layers, 2): the refusal score that goes for the harm done, where the chosen direction is taken out of one
        writer, or a few neighbouring ones in a deep model, alone; about 1 in the middle."""
        bands = np.array_split(np.arange(self.layers), min(self.layers, BANDS))
        changes = [Change(self.start.chosen.vectors, np.zeros((self.layers, 2)))]
        for band in bands:
            for path in (0, 1):
                strengths_ = np.zeros((self.layers, 2))
                strengths_[band, path] = 1.0
                changes.append(Change(self.start.chosen.vectors, strengths_))
        asked = ["worth", ROUNDS[1]]
        rows = self.journal.recall(asked)
        if rows is None:
            found = self.trials.scored(changes, ROUNDS[1], ROUNDS[1], "weighing single writers")
            rows = [
                (round(float(one.refusal.mean()), 6), round(harm(float(one.kl.mean()), float(one.astray.mean())), 10))
                for one in found
            ]
            self.journal.keep(asked, rows)
        ratios = np.array([max(0.0, rows[0][0] - score) / (hurt + LEAST_HARM) for score, hurt in rows[1:]])
        if not (ratios > 0).any():
            return np.ones((self.layers, 2))
        ratios = ratios / np.exp(np.log(ratios[ratios > 0]).mean())
        worth = np.ones((self.layers, 2))
        for band, pair in zip(bands, ratios.reshape(-1, 2), strict=True):
            worth[band] = pair
        return worth

    def _sorted(self) -> list[Tried]:
        return sorted(self.tried, key=lambda one: (one.rank(self.target), one.number))

    def _generation(self, points: Sequence[Point | None], count: int, rounds: Sequence[int] = ROUNDS) -> None:
        """Try them all on few prompts, and the better ones on more; the last of the rounds is that on all."""
        changes = [self._change(point) for point in points]
        first = len(self.tried)
        going = list(range(len(points)))
        found: list[Tried | None] = [None] * len(points)
        for prompts, share in zip(rounds, GOES_ON, strict=False):
            round_ = ROUNDS.index(prompts)
            going = going[: max(1, round(len(points) * share))]
            message = f"trying strengths, {first + len(points)} of {count}"
            scores = self._scored(points, going, [changes[at][0] for at in going], prompts, message)
            for at, (refused, unsafe, kl, astray) in zip(going, scores, strict=True):
                change, parameters = changes[at]
                found[at] = Tried(first + at, change, parameters, points[at], refused, unsafe, kl, astray, round_)
            going.sort(key=lambda at: (found[at].rank(self.target), at))  # type: ignore[union-attr]
        self.tried += [one for one in found if one is not None]

    def _scored(
        self, points: Sequence[Point | None], going: list[int], changes: list[Change], prompts: int, message: str
    ) -> list[tuple[float, ...]]:
        asked = [[points[at] for at in going], prompts]
        if (known := self.journal.recall(asked)) is not None:
            return known
        rows: list[tuple[float, ...]] = [
            _figures(one) for one in self.trials.scored(changes, prompts, prompts, message)
        ]
        self.journal.keep(asked, rows)
        return rows

    def _change(self, point: Point | None) -> tuple[Change, dict[str, Any]]:
        """What a point means; None: the recipe's own strengths with the chosen direction."""
        chosen = self.start.chosen.vectors
        if point is None:
            return Change(chosen, np.array(strengths(self.edit, self.layers))), {"recipe": True}
        parameters = self.space.parameters(point)
        by_layer = parameters.strengths(self.worth, self.selected)
        if self.start.directions is None:
            return Change(chosen, by_layer), _told(parameters, given=True)
        vectors = self.space.vectors(parameters, self.start.directions, self.layers)
        return Change(vectors.astype(np.float32), by_layer), _told(parameters, given=False)

    def _finalist(self, tried: Tried) -> Finalist:
        by_layer = tuple(LayerStrength(*(round(float(one), 6) for one in row)) for row in tried.change.strengths)
        origin = {**self.start.chosen.origin, "trial": tried.number}
        if not tried.parameters.get("recipe"):
            origin |= {name: value for name, value in tried.parameters.items() if name in ("layer", "position")}
        found = tried.change.vectors
        chosen = direction(found if len(found) > 1 else found[0], origin=origin, per_layer=len(found) > 1)
        return Finalist(tried.number, chosen.removed_by(by_layer), tried.refused, tried.kl)

    def _plain(self, tried: Tried, chosen: bool) -> dict[str, Any]:
        return {
            "number": tried.number,
            "refusal": round(tried.refused, 6),
            "kl": round(tried.kl, 8),
            "astray": round(tried.astray, 6),
            "prompts": ROUNDS[tried.round],
            "parameters": tried.parameters,
            "chosen": chosen,
        }


def _figures(scores: Scores) -> tuple[float, float, float, float]:
    """Share refused, share not safe, mean KL, mean astray."""
    refused, unsafe = (float((scores.refusal > bar).mean()) for bar in (0.0, -MARGIN))
    kl, astray = float(scores.kl.mean()), float(scores.astray.mean())
    return round(refused, 6), round(unsafe, 6), round(kl, 8), round(astray, 6)


def _told(parameters: Parameters, *, given: bool) -> dict[str, Any]:
    """A trial's parameters as people read them."""
    found: dict[str, Any] = {}
    if not given:
        found["position"] = parameters.position
        found |= {"own": True} if parameters.own else {"layer": parameters.index}
    found["lean"] = round(parameters.lean, 4)
    for path, kernel in (("attention", parameters.attention), ("mlp", parameters.mlp)):
        found |= {f"{path}.{name}": round(value, 4) for name, value in asdict(kernel).items()}
    return found
