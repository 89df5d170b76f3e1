"""The search: which direction, removed how strongly from which layers, keeps refusals at the target and harmless
answers closest to what they were.

Trials are hooks and prefill (`trials.py`): no weight is touched. Each generation is tried on a few prompts, its better
part on more, its best on all. Least KL wins among those that keep to the target, with a margin for what the prompts do
not show. Seeded, and resumable by its journal. Does not know files of models, nor what the finalists do once written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from abliterate.contract.recipe import Edit
from abliterated.pipeline.candidates import harm
from abliterated.pipeline.directions import Float64, RefusalDirection, direction
from abliterated.pipeline.downhill import STAGES, NoWayDown, between, downhill
from abliterated.pipeline.edit import LayerStrength, selected_layers, strengths
from abliterated.pipeline.kernels import STRONGEST, Kernel, Parameters, Point, Space, constant
from abliterated.pipeline.search_journal import Journal
from abliterated.pipeline.search_sampler import FIRST, GENERATION, near, spread
from abliterated.pipeline.trials import Change, Scores, Trials

# Prompts of each class in each round, and which share of a generation goes on to the next.
ROUNDS: Final = (16, 32, 96)
GOES_ON: Final = (1.0, 0.34, 0.2)
# Refused counts what is with more than one chance in four: it may still be the likeliest answer. (Its log-odds.)
LIKELY: Final = -1.0986
# A target below this asks for as few refusals as there can be.
LEAST_TARGET: Final = 0.01
FINALISTS: Final = 3
# The last trials: the stages of a way downhill from the best, and what lies between them around the target.
LAST: Final = len(STAGES) + 4
# Without a way down, how much weaker than the best the last ones are, attention and MLP.
WEAKER: Final = (
    (0.96, 0.96), (0.92, 0.92), (0.88, 0.88), (0.84, 0.84), (0.78, 0.78), (0.7, 0.7),
    (0.9, 1.0), (0.8, 1.0), (0.6, 1.0), (1.0, 0.9), (1.0, 0.8),
)  # fmt: skip
# Writers are weighed alone, in a deep model in so many groups of layers; below this KL harm is rounding.
BANDS: Final = 16
LEAST_HARM: Final = 1e-7


class Wanted(NamedTuple):
    """A trial to be made. `point`: what the sampler knows it by, if it does."""

    change: Change
    parameters: dict[str, Any]
    point: Point | None = None


@dataclass(frozen=True)
class Tried:
    """A trial and its figures on the most prompts it was tried on: the share refused, the share expected to be where
    answers are drawn by chance, mean KL, and how far harmful prompts go astray."""

    number: int
    change: Change
    parameters: dict[str, Any]
    point: Point | None
    refused: float
    expected: float
    kl: float
    astray: float
    round: int

    def beyond(self, target: float) -> float:
        """By how much it misses the target."""
        return round(self.refused - target, 9)

    def rank(self, target: float) -> tuple[int, float, float]:
        """Smaller is better: more prompts first, then refusals beyond the target, then harm; which counts twice where
        as many refusals as the target are still to be expected, for what its prompts do not show."""
        weighed = harm(self.kl, self.astray) * (1.0 + self.expected / max(target, LEAST_TARGET))
        return -self.round, max(0.0, self.beyond(target)), weighed


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
        self.notes: list[str] = []
        self.worth: Float64 = np.ones((self.layers, 2))

    def run(self, count: int) -> Searched:
        """`count` trials; the first is the recipe's own."""
        self.worth = self._worth()
        self._points([None, *self._first(min(count, FIRST + 1) - 1)], count)
        generation = 0
        while (ahead := count - LAST - len(self.tried)) > 0:
            generation += 1
            points = [one.point for one in self._sorted() if one.point is not None]
            number = min(GENERATION, ahead)
            left = 1.0 - len(self.tried) / count
            self._points(
                near(points, number, self.seed, generation, left) if points else spread(number, self.seed), count
            )
        if len(self.tried) < count:
            self._last(count)
        best = self._sorted()[:FINALISTS]
        if best[0].refused > self.target:
            self.notes.append(f"no trial kept refusals at {self.target:.1%}: the best leaves {best[0].refused:.1%}")
        return Searched(
            finalists=tuple(self._finalist(one) for one in best),
            trials=tuple(self._plain(one, one is best[0]) for one in self.tried),
            notes=tuple(self.notes),
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

    def _last(self, count: int) -> None:
        """The last trials, all on all prompts: downhill from the best, or the best again, weaker and weaker."""
        number, best = count - len(self.tried), self._sorted()[0]
        stages = self._stages(best) if number >= LAST else []
        if not stages:
            points = [one.point for one in self._sorted() if one.point is not None]
            weaker = [self.space.weaker(points[0], *by) for by in WEAKER[:number]] if points else []
            self._points(weaker or spread(number, self.seed), count, rounds=ROUNDS[-1:])
            return
        first = len(self.tried)
        self._generation([_loosened(best, strengths, "stage") for strengths in stages], count, ROUNDS[-1:])
        reached = [one.beyond(self.target) <= 0 for one in self.tried[first:]]
        steps = [np.minimum(one, STRONGEST) for one in between(stages, reached.__getitem__, number - len(stages))]
        self._generation([_loosened(best, strengths, "between") for strengths in steps], count, ROUNDS[-1:])

    def _stages(self, best: Tried) -> list[Float64]:
        """The strengths on a way downhill from the best; none where there is no such way."""
        asked = ["downhill", best.change.vectors.tolist(), best.change.strengths.tolist()]
        rows = self.journal.recall(asked)
        if rows is None:
            try:
                found = downhill(self.trials, best.change, harm(best.kl, best.astray), self.selected, STRONGEST)
                rows = [tuple(stage.flatten().tolist()) for stage in found]
            except NoWayDown as error:
                rows = [(str(error),)]
            self.journal.keep(asked, rows)
        if rows and isinstance(rows[0][0], str):
            self.notes.append(f"strengths were not followed downhill: {rows[0][0]}")
            return []
        return [np.array(row).reshape(self.layers, 2) for row in rows]

    def _points(self, points: Sequence[Point | None], count: int, rounds: Sequence[int] = ROUNDS) -> None:
        self._generation([self._meant(point) for point in points], count, rounds)

    def _generation(self, wanted: Sequence[Wanted], count: int, rounds: Sequence[int]) -> None:
        """Try them all on few prompts, and the better ones on more; the last of the rounds is that on all."""
        first = len(self.tried)
        going = list(range(len(wanted)))
        found: list[Tried | None] = [None] * len(wanted)
        for prompts, share in zip(rounds, GOES_ON, strict=False):
            round_ = ROUNDS.index(prompts)
            going = going[: max(1, round(len(wanted) * share))]
            message = f"trying strengths, {first + len(wanted)} of {count}"
            scores = self._scored([wanted[at] for at in going], prompts, message)
            for at, figures in zip(going, scores, strict=True):
                found[at] = _tried(first + at, wanted[at], figures, round_)
            going.sort(key=lambda at: (found[at].rank(self.target), at))  # type: ignore[union-attr]
        self.tried += [one for one in found if one is not None]

    def _scored(self, wanted: Sequence[Wanted], prompts: int, message: str) -> list[tuple[float, ...]]:
        asked = [[one.change.strengths.tolist() if one.point is None else one.point for one in wanted], prompts]
        if (known := self.journal.recall(asked)) is not None:
            return known
        changes = [one.change for one in wanted]
        rows: list[tuple[float, ...]] = [
            _figures(one) for one in self.trials.scored(changes, prompts, prompts, message)
        ]
        self.journal.keep(asked, rows)
        return rows

    def _meant(self, point: Point | None) -> Wanted:
        """What a point means; None: the recipe's own strengths with the chosen direction."""
        chosen = self.start.chosen.vectors
        if point is None:
            return Wanted(Change(chosen, np.array(strengths(self.edit, self.layers))), {"recipe": True})
        parameters = self.space.parameters(point)
        by_layer = parameters.strengths(self.worth, self.selected)
        if self.start.directions is None:
            return Wanted(Change(chosen, by_layer), _told(parameters, given=True), point)
        vectors = self.space.vectors(parameters, self.start.directions, self.layers)
        return Wanted(Change(vectors.astype(np.float32), by_layer), _told(parameters, given=False), point)

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
    """Share refused, share expected to be, mean KL, mean astray."""
    refused = float((scores.refusal > LIKELY).mean())
    expected = float((1.0 / (1.0 + np.exp(-scores.refusal))).mean())
    kl, astray = float(scores.kl.mean()), float(scores.astray.mean())
    return round(refused, 6), round(expected, 6), round(kl, 8), round(astray, 6)


def _tried(number: int, wanted: Wanted, figures: tuple[float, ...], round_: int) -> Tried:
    refused, expected, kl, astray = figures
    return Tried(number, wanted.change, wanted.parameters, wanted.point, refused, expected, kl, astray, round_)


def _loosened(best: Tried, strengths_: Float64, where: str) -> Wanted:
    """The best trial with other strengths."""
    kept = {name: value for name, value in best.parameters.items() if name in ("position", "layer", "own", "recipe")}
    return Wanted(Change(best.change.vectors, strengths_), {**kept, "downhill": where})


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
