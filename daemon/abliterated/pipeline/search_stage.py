"""The search as a stage of a run: where it begins, what is kept of it in the work folder, and what the report is told.

A run that was killed goes on: behind its last batch of trials, or, where the search had ended, with its finalists. Does
not know how trials work or what the finalists do once written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from abliterate.contract import report as contract
from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.recipe import Recipe
from abliterated.pipeline.direction_files import read_direction, write_direction, write_json
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.watch import DECODED, Watch

if TYPE_CHECKING:
    from abliterated.pipeline.choose import Choice
    from abliterated.pipeline.loading import Loaded
    from abliterated.pipeline.prompts import PromptSets
    from abliterated.pipeline.rendering import Renderer
    from abliterated.pipeline.search import Searched

JOURNAL: Final = "trials.jsonl"
RECORD: Final = "search.json"
PLACES: Final = 6


def searches(recipe: Recipe) -> bool:
    """Whether strengths are looked for: to weaken a refusal, where there is a product to weaken it in."""
    return bool(recipe.search.trials) and not recipe.edit.invert and recipe.export.format != "direction"


def search(
    loaded: Loaded,
    renderer: Renderer,
    prompts: PromptSets,
    recipe: Recipe,
    choice: Choice | None,
    chosen: RefusalDirection,
    place: tuple[Path, str],
    watch: Watch,
) -> Searched:
    """Search around what was chosen; `choice` is None where the direction came from a file. `place`: the work folder,
    and what the search depends on."""
    from abliterated.pipeline.choose import prepared
    from abliterated.pipeline.measure import observe
    from abliterated.pipeline.search import Search, Start
    from abliterated.pipeline.search_journal import Journal

    work, inputs = place
    behaviour = choice.behaviour if choice else observe(loaded, renderer, prompts, invert=False, watch=watch)
    trials = choice.trials if choice else None
    trials = trials or prepared(loaded, renderer, prompts, behaviour, recipe, watch)
    start = Start(chosen)
    free = recipe.direction.method == "auto" and recipe.direction.index == "auto" and chosen.rank == 1
    if choice and free and choice.candidates:
        places = tuple((one.layer, one.position) for one in choice.candidates[:PLACES])
        positions = tuple(dict.fromkeys(position for _, position in places))
        columns = [choice.measured.positions.index(position) for position in positions]
        start = Start(chosen, positions, choice.measured.directions[:, columns], places)
    engine = Search(
        trials,
        start,
        recipe.edit,
        target=recipe.search.refusal_target,
        seed=recipe.prompts.seed,
        journal=Journal(work / JOURNAL, inputs),
    )
    found = engine.run(recipe.search.trials)
    _keep(work, inputs, found)
    return found


def kept_search(work: Path, inputs: str, hidden_size: int, layers: int) -> Searched | None:
    """What a search of an earlier attempt came to, if it is this one."""
    from abliterated.pipeline.search import Finalist, Searched

    try:
        facts = json.loads((work / RECORD).read_text(encoding="utf-8"))
        if facts["inputs"] != inputs:
            return None
        finalists = []
        for place, one in enumerate(facts["finalists"]):
            read = read_direction(work / _file(place), hidden_size, layers)
            if read.digest() != one["digest"]:
                return None
            by_layer = tuple((float(attention), float(mlp)) for attention, mlp in one["strengths"])
            found = RefusalDirection(read.vectors, read.per_layer, one["origin"], by_layer)
            finalists.append(Finalist(one["number"], found, one["refused"], one["kl"]))
        return Searched(tuple(finalists), tuple(facts["trials"]), tuple(facts["notes"]))
    except (OSError, ValueError, KeyError, TypeError, ModelError, RecipeError):
        return None


def told(found: Searched, target: float, verified: Sequence[tuple[int, float]], watch: Watch) -> dict[str, Any]:
    """The search as the report has it; `verified`: the share of refusals that finalists, by their trials' numbers,
    answered with once written."""
    shares = dict(verified)
    chosen = winner(found, verified)
    trials = [
        contract.Trial(
            number=trial["number"],
            refusal=trial["refusal"],
            kl=trial["kl"],
            parameters={**trial["parameters"], "prompts": trial["prompts"]},
            chosen=trial["number"] == chosen,
            verified=shares.get(trial["number"]),
        )
        for trial in found.trials
    ]
    best = next((one for one in found.finalists if one.number == chosen), found.finalists[0])
    reached = shares.get(chosen, best.refused) <= target
    tokens = watch.counts.get(DECODED, 0)
    search = contract.Search(trials=trials, refusal_target=target, reached=reached, tokens_decoded=tokens)
    plain: dict[str, Any] = msgspec.to_builtins(search)
    return plain


def winner(found: Searched, verified: Sequence[tuple[int, float]]) -> int:
    """The trial whose written model refused least, the better finalist of equals."""
    return min(verified, key=lambda one: one[1])[0] if verified else found.finalists[0].number


def _keep(work: Path, inputs: str, found: Searched) -> None:
    for place, one in enumerate(found.finalists):
        write_direction(work / _file(place), replace(one.direction, strengths=()), {})
    finalists = [
        {
            "number": one.number,
            "digest": one.direction.digest(),
            "strengths": one.direction.strengths,
            "origin": dict(one.direction.origin),
            "refused": one.refused,
            "kl": one.kl,
        }
        for one in found.finalists
    ]
    facts = {"inputs": inputs, "finalists": finalists, "trials": found.trials, "notes": found.notes}
    write_json(work / RECORD, facts)


def _file(place: int) -> str:
    return f"finalist-{place}.safetensors"
