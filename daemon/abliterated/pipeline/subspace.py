"""Where one direction does not suffice: the smallest subspace that does, at one of the best places. Does not know how
the first direction was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from abliterate.contract.errors import ModelError
from abliterated.pipeline.activations import read_streams
from abliterated.pipeline.candidates import MOST_KL, SECOND_ROUND_PROMPTS, Candidate, harm, tried_out, vector_of, whole
from abliterated.pipeline.directions import Float64, difference_of_means, further_directions, orthonormal
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.measure import Behaviour, Measured
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.refusal_openings import Begun
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.trials import Trials
from abliterated.pipeline.watch import Watch

# So many directions at most.
MOST_RANK: Final = 4
# Prompts refused in one way, to tell its direction.
FEWEST: Final = 8


class Streams:
    """Every training prompt's stream at some candidates' places, read in one pass a class."""

    def __init__(
        self,
        loaded: Loaded,
        renderer: Renderer | Begun,
        prompts: PromptSets,
        behaviour: Behaviour,
        candidates: Sequence[Candidate],
        convention: str,
        watch: Watch,
    ) -> None:
        self._places = list(dict.fromkeys((round(one.layer), one.position) for one in candidates))
        positions = tuple(sorted({position for _, position in self._places}, reverse=True))
        depth = 1 + max(layer for layer, _ in self._places)
        at = [(layer, positions.index(position)) for layer, position in self._places]
        self._classes = []
        openings, self._kinds = behaviour.openings, np.zeros(0, dtype=np.int64)
        ways = openings.tokens if openings.late else openings.firsts
        for split in (prompts.harmful, prompts.harmless):
            rows = renderer.all_tokens(split.training)
            found = np.empty((len(at), len(rows), loaded.source.hidden_size))
            kinds = np.zeros(len(rows), dtype=np.int64)
            message = "reading the spread"
            for reading in read_streams(loaded, rows, positions, convention, watch, message, depth=depth):
                for number, (layer, position) in enumerate(at):
                    found[number, reading.rows] = reading.streams[:, layer, position].double().cpu().numpy()
                kinds[reading.rows] = reading.next_token[:, list(ways)].argmax(-1).cpu().numpy()
            self._classes.append(found)
            if split is prompts.harmful:
                self._kinds = kinds

    def subspaces(self, first: Float64, candidate: Candidate, rank: int) -> Iterator[Float64]:
        """What may be taken out there together: the directions of the ways to refuse, where there are so many of them,
        and `first` with those along which refused prompts spread most."""
        number = self._places.index((round(candidate.layer), candidate.position))
        harmful, harmless = (classes[number] for classes in self._classes)
        groups = [harmful[self._kinds == kind] for kind in np.unique(self._kinds)]
        groups = sorted((group for group in groups if len(group) >= FEWEST), key=len, reverse=True)[:rank]
        with suppress(ModelError):  # the prompts may span no more there
            if len(groups) == rank:
                base = harmless.mean(0)
                ways = [difference_of_means(group.mean(0), base, orthogonalize=True) for group in groups]
                yield orthonormal(np.stack(ways))
        with suppress(ModelError):
            yield self.rows(first, candidate, rank)

    def rows(self, first: Float64, candidate: Candidate, rank: int) -> Float64:
        """(rank, hidden): `first`, and further directions read at the candidate's place."""
        number = self._places.index((round(candidate.layer), candidate.position))
        return further_directions(first, self._classes[0][number], self._classes[1][number], rank)


def deepened(
    trials: Trials, measured: Measured, streams: Streams, candidates: Sequence[Candidate], target: float
) -> tuple[Candidate, Float64]:
    """The smallest subspace that brings refusals to the target, or the one that leaves the fewest."""

    def cost(pair: tuple[Candidate, Float64]) -> float:
        return harm(pair[0].kl, pair[0].astray)

    tried = [(candidates[0], vector_of(measured, candidates[0])[None, :])]
    for rank in range(2, MOST_RANK + 1):
        places, spans = [], []
        for one in candidates:
            for rows in streams.subspaces(vector_of(measured, one), one, rank):
                spans.append(rows)
                places.append(replace(one, rank=rank))
        if not spans:
            break
        changes = [whole(rows, trials.layers) for rows in spans]
        scored = tried_out(trials, places, changes, SECOND_ROUND_PROMPTS, f"trying {rank} directions together")
        tried += zip(scored, spans, strict=True)
        reached = [pair for pair in tried if pair[0].refused <= target and pair[0].kl <= MOST_KL]
        if reached:
            return min(reached, key=lambda pair: (cost(pair), pair[0].bypass))
    return min(tried, key=lambda pair: (pair[0].kl > MOST_KL, pair[0].refused, cost(pair)))
