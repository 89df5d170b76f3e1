"""Which direction: the recipe's own layer, one for each layer, or the best of all candidates on validation prompts.

`auto` tries every position × layer below 0.8 L: with the direction taken out of what is added to the residual stream,
harmful prompts must lose their refusal score (bypass) while harmless answers stay (KL); added to a harmless prompt, it
must bring refusal about (induce). Where one direction leaves too many refusals, further ones are added to it. Prefill
only. Does not know files or weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Direction, Recipe
from abliterated.pipeline.activations import read_streams
from abliterated.pipeline.contributions import Addition
from abliterated.pipeline.directions import (
    Float64,
    RefusalDirection,
    between_layers,
    direction,
    further_directions,
    same_means,
    without_gaps,
)
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.measure import Behaviour, Measured, begun, measure, observe
from abliterated.pipeline.prompts import PromptSets, Split
from abliterated.pipeline.refusal_openings import Begun
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.taps import decoder_layers
from abliterated.pipeline.trials import Change, Trials
from abliterated.pipeline.watch import Watch

LAST_LAYER: Final = 0.8
MOST_KL: Final = 0.1
# A first round on few prompts, where there are more candidates than the second should see.
SECOND_ROUND: Final = 24
FIRST_ROUND_PROMPTS: Final = 8
SECOND_ROUND_PROMPTS: Final = 32
# What a search is tried on: enough to tell apart what a target of a few per cent asks for.
HARMFUL: Final = 96
HARMLESS: Final = 48
BEGUN_POSITIONS: Final = (-1, -2)
# Where one direction does not suffice: so many at most, beginning at so many of the best places.
MOST_RANK: Final = 4
DEEPENED: Final = 6


@dataclass(frozen=True)
class Candidate:
    """A layer and a position, and how well their direction does on the validation prompts.

    `refused`: the share of them that stays refused. `rank`: how many directions were taken out there.
    """

    layer: float
    position: int
    bypass: float = math.nan
    kl: float = math.nan
    induce: float = math.nan
    refused: float = math.nan
    rank: int = 1


@dataclass(frozen=True)
class Choice:
    """The direction, what it was chosen from, and what a search goes on with."""

    direction: RefusalDirection
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    behaviour: Behaviour
    measured: Measured
    trials: Trials | None = None


def find_direction(loaded: Loaded, renderer: Renderer, prompts: PromptSets, recipe: Recipe, watch: Watch) -> Choice:
    """Measure, and choose as the recipe says. ModelError where there is no direction to be found."""
    asked, invert = recipe.direction, recipe.edit.invert
    behaviour = observe(loaded, renderer, prompts, invert=invert, watch=watch)
    # A model that decides late is read where it decides.
    late = begun(loaded, renderer, prompts, behaviour, watch) if asked.method == "auto" else None
    reading = late or renderer
    drawn, prompts = prompts, only(prompts, late) if late else prompts
    positions = BEGUN_POSITIONS if late else renderer.positions
    measured = measure(
        loaded,
        reading,
        prompts,
        behaviour,
        positions=positions if asked.method == "auto" else (asked.position,),
        convention=asked.convention,
        orthogonalize=asked.orthogonalize,
        winsorize=asked.winsorize,
        depth=_depth(asked, loaded.source.layers),
        watch=watch,
    )
    if not np.any(measured.directions):
        raise same_means()
    origin, few = _origin(asked, drawn, behaviour, measured), _few(drawn, recipe.prompts.count)
    if asked.method == "per-layer":
        rows = without_gaps(measured.directions[:, 0])
        origin["gap_norm"] = _rounded(max(measured.gap(layer, asked.position) for layer in range(len(rows))))
        return Choice(direction(rows, origin=origin, per_layer=True), (), few, behaviour, measured)
    candidates = _candidates(asked, measured)
    notes: tuple[str, ...] = ()
    trials = None
    if len(candidates) > 1:
        trials = prepared(loaded, renderer, prompts, behaviour, recipe, watch)
        candidates, notes = _ranked(
            trials, measured, candidates, induce_first=invert and behaviour.refused_harmful == 0
        )
    best = candidates[0]
    rows = _vector(measured, best)[None, :]
    if asked.rank > 1:
        rows = _Streams(loaded, reading, prompts, [best], asked.convention, watch).rows(rows[0], best, asked.rank)
    elif trials and not invert and best.refused > recipe.search.refusal_target:
        streams = _Streams(loaded, reading, prompts, candidates[:DEEPENED], asked.convention, watch)
        best, rows = _deepened(trials, measured, streams, candidates[:DEEPENED], recipe.search.refusal_target)
        candidates = [best, *candidates]
    if best.bypass > 0 and not invert:
        notes = (*notes, "even without the best direction, more than half of the validation prompts stay refused")
    origin |= {name: _rounded(value) for name, value in asdict(best).items() if not _missing(value)}
    origin["gap_norm"] = _rounded(measured.gap(round(best.layer), best.position))
    return Choice(direction(rows, origin=origin), tuple(candidates), (*few, *notes), behaviour, measured, trials)


def prepared(
    loaded: Loaded, renderer: Renderer, prompts: PromptSets, behaviour: Behaviour, recipe: Recipe, watch: Watch
) -> Trials:
    """Trials on the validation prompts first, then on those that were measured."""
    trials = Trials(loaded, renderer, behaviour, watch, gains=recipe.edit.post_norm)

    def some(split: Split, count: int) -> tuple[str, ...]:
        return (*split.validation, *split.training)[:count]

    trials.ask(some(prompts.harmful, HARMFUL), some(prompts.harmless, HARMLESS))
    return trials


def _few(prompts: PromptSets, wanted: int) -> tuple[str, ...]:
    """What is to be said where there were fewer prompts than asked for."""
    classes = (("harmful", prompts.harmful), ("harmless", prompts.harmless))
    return tuple(
        f"measured on {len(split.training)} {name} prompts, not on {wanted}: there are no more to spare"
        for name, split in classes
        if len(split.training) < wanted
    )


def only(prompts: PromptSets, late: Begun) -> PromptSets:
    """The prompts to measure on, those of them alone whose answers' beginnings are known."""

    def known(split: Split) -> Split:
        return replace(split, training=tuple(prompt for prompt in split.training if prompt in late.beginnings))

    return replace(prompts, harmful=known(prompts.harmful), harmless=known(prompts.harmless))


def _candidates(asked: Direction, measured: Measured) -> list[Candidate]:
    """What is to be tried, in order."""
    layers = measured.layers
    if asked.index != "auto":
        if not 0 <= asked.index <= layers - 1:
            raise ModelError(
                f"direction.index = {asked.index}, but the layers count from 0 to {layers - 1}",
                remedy="Give an index between them",
            )
        found = [Candidate(float(asked.index), position) for position in measured.positions]
    elif asked.method == "layer":
        wanted = asked.layer if isinstance(asked.layer, list) else [asked.layer]
        found = [Candidate(float(layer_number(layer, layers)), measured.positions[0]) for layer in wanted]
    else:
        below = len(measured.directions)
        found = [Candidate(float(layer), position) for position in measured.positions for layer in range(below)]
    real = [candidate for candidate in dict.fromkeys(found) if np.any(_vector(measured, candidate))]
    if not real:
        raise same_means()
    return real


def _depth(asked: Direction, layers: int) -> int:
    """How many layers' streams the candidates need."""
    if asked.method == "per-layer":
        return layers
    if asked.index != "auto":
        return max(1, min(layers, math.ceil(asked.index) + 1))
    if asked.method == "layer":
        wanted = asked.layer if isinstance(asked.layer, list) else [asked.layer]
        return 1 + max(layer_number(layer, layers) for layer in wanted)
    return max(1, math.ceil(LAST_LAYER * layers))


def layer_number(layer: float | int, layers: int) -> int:
    """A layer's number from an index (a whole number) or a fraction of the depth. ModelError beyond the last."""
    if isinstance(layer, float) and layer <= 1.0:
        return min(int(layer * layers), layers - 1)
    if int(layer) >= layers:
        raise ModelError(
            f"direction.layer = {layer}, but the layers count from 0 to {layers - 1}", remedy="Give a smaller number"
        )
    return int(layer)


def _vector(measured: Measured, candidate: Candidate) -> Float64:
    position = measured.positions.index(candidate.position)
    return between_layers(measured.directions[:, position], candidate.layer)


def _whole(rows: Float64, layers: int) -> Change:
    """Directions (rank, hidden) wholly removed from everything that writes."""
    return Change(rows.astype(np.float32)[None], np.ones((layers, 2)))


def _scored(
    trials: Trials, candidates: Sequence[Candidate], changes: Sequence[Change], prompts: int, message: str
) -> list[Candidate]:
    found = trials.scored(changes, prompts, prompts, message)
    return [
        replace(
            candidate,
            bypass=float(scores.refusal.mean()),
            kl=float(scores.kl.mean()),
            refused=float((scores.refusal > 0).mean()),
        )
        for candidate, scores in zip(candidates, found, strict=True)
    ]


def _ranked(
    trials: Trials, measured: Measured, candidates: list[Candidate], *, induce_first: bool
) -> tuple[list[Candidate], tuple[str, ...]]:
    """The candidates, best first, those of the second round alone scored on everything."""

    def tried(some: Sequence[Candidate], prompts: int, message: str) -> list[Candidate]:
        changes = [_whole(_vector(measured, one)[None], trials.layers) for one in some]
        return _scored(trials, some, changes, prompts, message)

    rest: list[Candidate] = []
    if len(candidates) > SECOND_ROUND:
        first = tried(candidates, FIRST_ROUND_PROMPTS, "trying candidates")
        first.sort(key=lambda one: (one.kl > MOST_KL, one.bypass))
        candidates, rest = first[:SECOND_ROUND], first[SECOND_ROUND:]
    scored = _induced(trials, measured, tried(candidates, SECOND_ROUND_PROMPTS, "scoring candidates"))
    if induce_first:
        scored.sort(key=lambda one: -one.induce)
    else:
        scored.sort(key=lambda one: (one.kl > MOST_KL, one.induce <= 0, one.bypass))
    notes: tuple[str, ...] = ()
    if scored[0].kl > MOST_KL:
        notes = (f"no direction keeps harmless answers within KL {MOST_KL}; the least harmful one was taken",)
        scored.sort(key=lambda one: one.kl if one.bypass < 0 else one.kl + 1e6)
    return [*scored, *rest], notes


def _induced(trials: Trials, measured: Measured, candidates: Sequence[Candidate]) -> list[Candidate]:
    """How much refusal each direction brings about where it is added to harmless prompts."""
    if trials.behaviour.openings.late:  # the first token of an answer would not show it
        return list(candidates)
    layers, device = decoder_layers(trials.loaded.model), trials.loaded.device
    # What enters layer i left layer i − 1; there is nothing to hook before the first.
    back = 1 if measured.convention == "input" else 0
    behind = [max(0, round(one.layer) - back) for one in candidates]
    shifts = []
    for one in candidates:
        layer, position, vector = round(one.layer), measured.positions.index(one.position), _vector(measured, one)
        # As long as the classes lie apart along it.
        apart = measured.harmful.mean[layer, position] - measured.harmless.mean[layer, position]
        shifts.append(vector * float(apart @ vector))
    vectors = torch.tensor(np.stack(shifts), dtype=torch.float32, device=device)

    def adding(numbers: list[int]) -> Addition:
        return Addition(layers, vectors[numbers], torch.tensor([behind[number] for number in numbers], device=device))

    rows = trials.harmless[:SECOND_ROUND_PROMPTS]
    scores = np.zeros((len(candidates), len(rows)))
    for pairs, logits in trials.tried(len(candidates), rows, 1, adding, (0, scores.size, "inducing refusal")):
        found = trials.behaviour.scores(torch.log_softmax(logits[:, 0], dim=-1)).cpu()
        scores[tuple(zip(*pairs, strict=True))] = found
    return [replace(one, induce=float(scores[number].mean())) for number, one in enumerate(candidates)]


class _Streams:
    """Every training prompt's stream at some candidates' places, read in one pass a class."""

    def __init__(
        self,
        loaded: Loaded,
        renderer: Renderer | Begun,
        prompts: PromptSets,
        candidates: Sequence[Candidate],
        convention: str,
        watch: Watch,
    ) -> None:
        self._places = list(dict.fromkeys((round(one.layer), one.position) for one in candidates))
        positions = tuple(sorted({position for _, position in self._places}, reverse=True))
        depth = 1 + max(layer for layer, _ in self._places)
        at = [(layer, positions.index(position)) for layer, position in self._places]
        self._classes = []
        for split in (prompts.harmful, prompts.harmless):
            rows = renderer.all_tokens(split.training)
            found = np.empty((len(at), len(rows), loaded.source.hidden_size))
            message = "reading the spread"
            for reading in read_streams(loaded, rows, positions, convention, watch, message, depth=depth):
                for number, (layer, position) in enumerate(at):
                    found[number, reading.rows] = reading.streams[:, layer, position].double().cpu().numpy()
            self._classes.append(found)

    def rows(self, first: Float64, candidate: Candidate, rank: int) -> Float64:
        """(rank, hidden): `first`, and further directions read at the candidate's place."""
        number = self._places.index((round(candidate.layer), candidate.position))
        return further_directions(first, self._classes[0][number], self._classes[1][number], rank)


def _deepened(
    trials: Trials, measured: Measured, streams: _Streams, candidates: Sequence[Candidate], target: float
) -> tuple[Candidate, Float64]:
    """The smallest subspace that brings refusals to the target, or the one that leaves the fewest."""
    tried = [(candidates[0], _vector(measured, candidates[0])[None, :])]
    for rank in range(2, MOST_RANK + 1):
        places, spans = [], []
        for one in candidates:
            try:
                spans.append(streams.rows(_vector(measured, one), one, rank))
            except ModelError:
                continue  # the prompts span no more there
            places.append(replace(one, rank=rank))
        if not spans:
            break
        changes = [_whole(rows, trials.layers) for rows in spans]
        scored = _scored(trials, places, changes, SECOND_ROUND_PROMPTS, f"trying {rank} directions together")
        tried += zip(scored, spans, strict=True)
        reached = [pair for pair in tried if pair[0].refused <= target and pair[0].kl <= MOST_KL]
        if reached:
            return min(reached, key=lambda pair: (pair[0].kl, pair[0].bypass))
    return min(tried, key=lambda pair: (pair[0].kl > MOST_KL, pair[0].refused, pair[0].kl))


def _origin(asked: Direction, prompts: PromptSets, behaviour: Behaviour, measured: Measured) -> dict[str, Any]:
    """How it was found, without times and places: the same run gives the same words."""
    return {
        "method": asked.method,
        "convention": asked.convention,
        "layers": measured.layers,
        "orthogonalized": asked.orthogonalize,
        **({"winsorized": asked.winsorize} if asked.winsorize < 1 else {}),
        "harmful_prompts": measured.harmful.count,
        "harmless_prompts": measured.harmless.count,
        "atoms": measured.atoms,
        "prompts": prompts.digest(),
        "refused_harmful": _rounded(behaviour.refused_harmful),
        "refused_harmless": _rounded(behaviour.refused_harmless),
        **({"position": asked.position} if asked.method != "auto" else {}),
    }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
