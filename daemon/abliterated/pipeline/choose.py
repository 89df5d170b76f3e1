"""Which direction: the recipe's own layer, one for each layer, or the best of all candidates on validation prompts.

`auto` tries every position × layer below 0.8 L: with the direction taken out of what is added to the residual stream,
harmful prompts must lose their refusal score (bypass) while harmless answers stay (KL); added to a harmless prompt, it
must bring refusal about (induce). Prefill only. Does not know files or weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Direction, Recipe
from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.contributions import Ablation, Addition, Contributions, find_contributions
from abliterated.pipeline.directions import (
    Float64,
    RefusalDirection,
    between_layers,
    direction,
    further_directions,
    same_means,
    without_gaps,
)
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.measure import Behaviour, Measured, measure, observe, streams_at
from abliterated.pipeline.passes import Changing, Pass, Rows, run_pass
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.taps import decoder_layers
from abliterated.pipeline.watch import Watch

LAST_LAYER: Final = 0.8
MOST_KL: Final = 0.1
KL_TOKENS: Final = 8
# A first round on few prompts, where there are more candidates than the second should see.
SECOND_ROUND: Final = 24
FIRST_ROUND_PROMPTS: Final = 8


@dataclass(frozen=True)
class Candidate:
    """A layer and a position, and how well their direction does on the validation prompts."""

    layer: float
    position: int
    bypass: float = math.nan
    kl: float = math.nan
    induce: float = math.nan


@dataclass(frozen=True)
class Choice:
    """The direction, and what it was chosen from."""

    direction: RefusalDirection
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]


def find_direction(loaded: Loaded, renderer: Renderer, prompts: PromptSets, recipe: Recipe, watch: Watch) -> Choice:
    """Measure, and choose as the recipe says. ModelError where there is no direction to be found."""
    asked, invert = recipe.direction, recipe.edit.invert
    behaviour = observe(loaded, renderer, prompts, invert=invert, watch=watch)
    measured = measure(
        loaded,
        renderer,
        prompts,
        behaviour,
        positions=renderer.positions if asked.method == "auto" else (asked.position,),
        convention=asked.convention,
        orthogonalize=asked.orthogonalize,
        depth=_depth(asked, loaded.source.layers),
        watch=watch,
    )
    if not np.any(measured.directions):
        raise same_means()
    origin = _origin(asked, prompts, behaviour, measured)
    if asked.method == "per-layer":
        rows = without_gaps(measured.directions[:, 0])
        return Choice(direction(rows, origin=origin, per_layer=True), (), ())
    candidates = _candidates(asked, measured)
    notes: tuple[str, ...] = ()
    if len(candidates) > 1:
        trial = _Trial.prepare(loaded, renderer, prompts, behaviour, measured, watch)
        candidates, notes = trial.ranked(candidates, induce_first=invert and behaviour.refused_harmful == 0)
    best = candidates[0]
    first = _vector(measured, best)
    rows = _ranked_up(loaded, renderer, prompts, asked, first, best, watch)
    origin |= {name: _rounded(value) for name, value in asdict(best).items() if not _missing(value)}
    return Choice(direction(rows, origin=origin), tuple(candidates), notes)


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


def _ranked_up(
    loaded: Loaded,
    renderer: Renderer,
    prompts: PromptSets,
    asked: Direction,
    first: Float64,
    best: Candidate,
    watch: Watch,
) -> Float64:
    """(rank, hidden): the chosen direction, and further ones where the recipe asks for more."""
    if asked.rank == 1:
        return first[None, :]
    place = (round(best.layer), best.position, asked.convention)
    harmful = streams_at(loaded, renderer, prompts.harmful.training, place, watch)
    harmless = streams_at(loaded, renderer, prompts.harmless.training, place, watch)
    return further_directions(first, harmful, harmless, asked.rank)


@dataclass(frozen=True)
class _Trial:
    """What every candidate is tried on: validation prompts, and the model's own harmless answers to stay close to."""

    loaded: Loaded
    contributions: Contributions
    behaviour: Behaviour
    measured: Measured
    watch: Watch
    harmful: Rows
    harmless: Rows
    answered: Rows  # harmless prompts with the answer's beginning behind them
    lengths: tuple[int, ...]  # of those beginnings
    base: torch.Tensor  # log probabilities (prompts, KL_TOKENS, vocabulary) of the model as it is

    @classmethod
    def prepare(
        cls,
        loaded: Loaded,
        renderer: Renderer,
        prompts: PromptSets,
        behaviour: Behaviour,
        measured: Measured,
        watch: Watch,
    ) -> _Trial:
        harmful = renderer.all_tokens(prompts.harmful.validation)
        harmless = renderer.all_tokens(prompts.harmless.validation)
        begun = greedy(loaded, harmless, KL_TOKENS, watch, "answering validation prompts")
        # Teacher forcing: the position before each token of the answer predicts it.
        answered = [row + answer[:-1] for row, answer in zip(harmless, begun, strict=True)]
        lengths = tuple(max(1, len(answer)) for answer in begun)
        base = torch.log_softmax(tail_logits(loaded, answered, KL_TOKENS, watch), dim=-1)
        contributions = find_contributions(loaded, max(harmful, key=len), watch)
        return cls(loaded, contributions, behaviour, measured, watch, harmful, harmless, answered, lengths, base)

    def ranked(self, candidates: list[Candidate], *, induce_first: bool) -> tuple[list[Candidate], tuple[str, ...]]:
        """The candidates, best first, those of the second round alone scored on everything."""
        rest: list[Candidate] = []
        if len(candidates) > SECOND_ROUND:
            tried = self.scored(candidates, FIRST_ROUND_PROMPTS, "trying candidates")
            tried.sort(key=lambda one: (one.kl > MOST_KL, one.bypass))
            candidates, rest = tried[:SECOND_ROUND], tried[SECOND_ROUND:]
        scored = self.induced(self.scored(candidates, len(self.harmful), "scoring candidates"))
        if induce_first:
            scored.sort(key=lambda one: -one.induce)
        else:
            scored.sort(key=lambda one: (one.kl > MOST_KL, one.induce <= 0, one.bypass))
        notes = []
        if scored[0].kl > MOST_KL:
            notes.append(f"no direction keeps harmless answers within KL {MOST_KL}; the least harmful one was taken")
            scored.sort(key=lambda one: one.kl if one.bypass < 0 else one.kl + 1e6)
        if scored[0].bypass > 0 and not induce_first:
            notes.append("even without the best direction, more than half of the validation prompts stay refused")
        return [*scored, *rest], tuple(notes)

    def scored(self, candidates: Sequence[Candidate], prompts: int, message: str) -> list[Candidate]:
        """Bypass over so many harmful prompts, KL over as many harmless ones."""
        harmful, answered = self.harmful[:prompts], self.answered[:prompts]
        bypass = np.zeros((len(candidates), len(harmful)))
        kl = np.zeros((len(candidates), len(answered)))
        total = len(candidates) * (len(harmful) + len(answered))
        for pairs, logits in self._ablated(candidates, harmful, 1, (0, total, message)):
            scores = self.behaviour.scores(torch.log_softmax(logits[:, 0], dim=-1)).cpu()
            bypass[tuple(zip(*pairs, strict=True))] = scores
        for pairs, logits in self._ablated(candidates, answered, KL_TOKENS, (bypass.size, total, message)):
            for (candidate, row), found in zip(pairs, torch.log_softmax(logits, dim=-1), strict=True):
                wanted = self.base[row, -self.lengths[row] :]
                parts = wanted.exp() * (wanted - found[-self.lengths[row] :])
                kl[candidate, row] = float(parts.sum(-1).mean())
        return [
            replace(candidate, bypass=float(bypass[number].mean()), kl=float(kl[number].mean()))
            for number, candidate in enumerate(candidates)
        ]

    def induced(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """How much refusal each direction brings about where it is added to harmless prompts."""
        layers = decoder_layers(self.loaded.model)
        if self.measured.convention == "input":
            # What enters layer i left layer i − 1; nothing to hook before the first.
            behind = [max(0, round(one.layer) - 1) for one in candidates]
        else:
            behind = [round(one.layer) for one in candidates]
        vectors = torch.stack([self._shift(one) for one in candidates])
        scores = np.zeros((len(candidates), len(self.harmless)))

        def adding(numbers: list[int]) -> Addition:
            where = torch.tensor([behind[number] for number in numbers], device=self.loaded.device)
            return Addition(layers, vectors[numbers], where)

        place = (0, scores.size, "inducing refusal")
        for pairs, logits in self._tried(len(candidates), self.harmless, 1, adding, place):
            found = self.behaviour.scores(torch.log_softmax(logits[:, 0], dim=-1)).cpu()
            scores[tuple(zip(*pairs, strict=True))] = found
        return [replace(one, induce=float(scores[number].mean())) for number, one in enumerate(candidates)]

    def _shift(self, candidate: Candidate) -> torch.Tensor:
        """The direction, as long as the classes lie apart along it."""
        layer, position = round(candidate.layer), self.measured.positions.index(candidate.position)
        vector = _vector(self.measured, candidate)
        apart = self.measured.harmful.mean[layer, position] - self.measured.harmless.mean[layer, position]
        return torch.tensor(vector * float(apart @ vector), dtype=torch.float32, device=self.loaded.device)

    def _ablated(self, candidates: Sequence[Candidate], rows: Rows, tail: int, place: tuple[int, int, str]) -> Any:
        """Batches of (candidate, row) pairs, each with its logits under that candidate's ablation."""
        found = np.stack([_vector(self.measured, one) for one in candidates]).astype(np.float32)
        vectors = torch.from_numpy(found).to(self.loaded.device)[:, None, :]
        yield from self._tried(
            len(candidates), rows, tail, lambda numbers: Ablation(self.contributions, vectors[numbers]), place
        )

    def _tried(
        self, candidates: int, rows: Rows, tail: int, changing: Changing, place: tuple[int, int, str]
    ) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
        """Every candidate with every row, all in one pass."""
        pairs = [(number, row) for row in range(len(rows)) for number in range(candidates)]
        asked = Pass(
            [rows[row] for _, row in pairs],
            tail=tail,
            variants=tuple(number for number, _ in pairs),
            changing=changing,
        )
        for part in run_pass(self.loaded, asked, self.watch, place[2], place[:2]):
            assert part.logits is not None
            yield [pairs[number] for number in part.rows], part.logits


def _origin(asked: Direction, prompts: PromptSets, behaviour: Behaviour, measured: Measured) -> dict[str, Any]:
    """How it was found, without times and places: the same run gives the same words."""
    return {
        "method": asked.method,
        "convention": asked.convention,
        "layers": measured.layers,
        "orthogonalized": asked.orthogonalize,
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
