"""Which direction: the recipe's own layer, one for each layer, or the best of all candidates on validation prompts.

`auto` tries every position × layer below 0.8 L: with the direction taken out of what is added to the residual stream,
harmful prompts must lose their refusal score (bypass) while harmless answers stay (KL); added to a harmless prompt, it
must bring refusal about (induce). Where one direction leaves too many refusals, further ones are added to it. Prefill
only. Does not know files or weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Direction, Recipe
from abliterated.pipeline.candidates import Candidate, ranked, vector_of
from abliterated.pipeline.directions import (
    RefusalDirection,
    direction,
    same_means,
    without_gaps,
)
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.measure import Behaviour, Measured, begun, measure, observe
from abliterated.pipeline.prompts import PromptSets, Split
from abliterated.pipeline.refusal_openings import Begun
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.subspace import Streams, deepened
from abliterated.pipeline.trials import Trials
from abliterated.pipeline.watch import Watch

LAST_LAYER: Final = 0.8
# At so many of the best places further directions are looked for, where one does not suffice.
DEEPENED: Final = 6
# What a search is tried on: enough to tell apart what a target of a few per cent asks for.
HARMFUL: Final = 96
HARMLESS: Final = 96
BEGUN_POSITIONS: Final = (-1, -2)


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
        candidates, notes = ranked(trials, measured, candidates, induce_first=invert and behaviour.refused_harmful == 0)
    best = candidates[0]
    rows = vector_of(measured, best)[None, :]
    if asked.rank > 1:
        rows = Streams(loaded, reading, prompts, behaviour, [best], asked.convention, watch).rows(
            rows[0], best, asked.rank
        )
    elif trials and not invert and best.refused > recipe.search.refusal_target:
        streams = Streams(loaded, reading, prompts, behaviour, candidates[:DEEPENED], asked.convention, watch)
        best, rows = deepened(trials, measured, streams, candidates[:DEEPENED], recipe.search.refusal_target)
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
    """What is to be said where a set holds fewer prompts than asked for; keeping some back to choose with is none."""
    classes = (("harmful", prompts.harmful), ("harmless", prompts.harmless))
    return tuple(
        f"there are {total} {name} prompts, not {wanted}: measured on {len(split.training)} of them"
        for name, split in classes
        if (total := len(split.training) + len(split.validation) + len(split.held_out)) < wanted
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
    real = [candidate for candidate in dict.fromkeys(found) if np.any(vector_of(measured, candidate))]
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
