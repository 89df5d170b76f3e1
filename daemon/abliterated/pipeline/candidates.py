"""Candidates for the refusal direction, a layer and a position each, tried one against the other: what their direction
does where it is taken out, and where it is added. Prefill only. Does not know how directions are measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from abliterated.pipeline.contributions import Addition
from abliterated.pipeline.directions import Float64, between_layers
from abliterated.pipeline.measure import Measured
from abliterated.pipeline.taps import decoder_layers
from abliterated.pipeline.trials import Change, Trials

MOST_KL: Final = 0.1
# What it counts that a harmful prompt gets neither refusal nor answer, in KL of harmless ones.
ASTRAY: Final = 0.001
# A first round on few prompts, where there are more candidates than the second should see.
SECOND_ROUND: Final = 24
FIRST_ROUND_PROMPTS: Final = 8
SECOND_ROUND_PROMPTS: Final = 32


@dataclass(frozen=True)
class Candidate:
    """A layer and a position, and how well their direction does on the validation prompts.

    `refused`: the share of them that stays refused. `astray`: how much of their first token's probability goes to
    neither refusals nor answers. `rank`: how many directions were taken out there.
    """

    layer: float
    position: int
    bypass: float = math.nan
    kl: float = math.nan
    induce: float = math.nan
    refused: float = math.nan
    astray: float = math.nan
    rank: int = 1


def harm(kl: float, astray: float) -> float:
    """What an edit costs: KL of harmless answers, and a little for harmful prompts that get no sensible answer."""
    return kl + ASTRAY * astray


def vector_of(measured: Measured, candidate: Candidate) -> Float64:
    position = measured.positions.index(candidate.position)
    return between_layers(measured.directions[:, position], candidate.layer)


def whole(rows: Float64, layers: int) -> Change:
    """Directions (rank, hidden) wholly removed from everything that writes."""
    return Change(rows.astype(np.float32)[None], np.ones((layers, 2)))


def tried_out(
    trials: Trials, candidates: Sequence[Candidate], changes: Sequence[Change], prompts: int, message: str
) -> list[Candidate]:
    found = trials.scored(changes, prompts, prompts, message)
    return [
        replace(
            candidate,
            bypass=float(scores.refusal.mean()),
            kl=float(scores.kl.mean()),
            refused=float((scores.refusal > 0).mean()),
            astray=float(scores.astray.mean()),
        )
        for candidate, scores in zip(candidates, found, strict=True)
    ]


def preferred(one: Candidate) -> tuple[bool, bool, float]:
    """Smaller is better: harmless answers kept first, then refusal brought about where it is added, then the bypass."""
    return one.kl > MOST_KL, one.induce <= 0, one.bypass


def ranked(
    trials: Trials, measured: Measured, candidates: list[Candidate], *, induce_first: bool
) -> tuple[list[Candidate], tuple[str, ...]]:
    """The candidates, best first, those of the second round alone scored on everything."""

    def tried(some: Sequence[Candidate], prompts: int, message: str) -> list[Candidate]:
        changes = [whole(vector_of(measured, one)[None], trials.layers) for one in some]
        return tried_out(trials, some, changes, prompts, message)

    rest: list[Candidate] = []
    if len(candidates) > SECOND_ROUND:
        first = tried(candidates, FIRST_ROUND_PROMPTS, "trying candidates")
        first.sort(key=lambda one: (one.kl > MOST_KL, one.bypass))
        candidates, rest = first[:SECOND_ROUND], first[SECOND_ROUND:]
    scored = induced(trials, measured, tried(candidates, SECOND_ROUND_PROMPTS, "scoring candidates"))
    if induce_first:
        scored.sort(key=lambda one: -one.induce)
    else:
        scored.sort(key=preferred)
    notes: tuple[str, ...] = ()
    if scored[0].kl > MOST_KL:
        notes = (f"no direction keeps harmless answers within KL {MOST_KL}; the least harmful one was taken",)
        scored.sort(key=lambda one: one.kl if one.bypass < 0 else one.kl + 1e6)
    return [*scored, *rest], notes


def induced(trials: Trials, measured: Measured, candidates: Sequence[Candidate]) -> list[Candidate]:
    """How much refusal each direction brings about where it is added to harmless prompts."""
    if trials.behaviour.openings.late:  # the first token of an answer would not show it
        return list(candidates)
    layers, device = decoder_layers(trials.loaded.model), trials.loaded.device
    # What enters layer i left layer i − 1; there is nothing to hook before the first.
    back = 1 if measured.convention == "input" else 0
    behind = [max(0, round(one.layer) - back) for one in candidates]
    shifts = []
    for one in candidates:
        layer, position, vector = round(one.layer), measured.positions.index(one.position), vector_of(measured, one)
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
