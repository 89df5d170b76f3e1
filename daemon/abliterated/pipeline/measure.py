"""How the model behaves on the training prompts, and the mean residual streams of what it refuses and what it answers.

Refusing is scored at the point of decision, mostly the first answer token: log p(R) − log(1 − p(R)), R the first tokens
of the model's own refusals. Does not choose among directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.activations import Means, read_streams, streams_alone, sum_streams
from abliterated.pipeline.directions import Float64, difference_of_means, protect, winsorise
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.refusal_openings import Begun, Openings, beginnings, learn_openings
from abliterated.pipeline.refusals import verdict
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.watch import Watch

# Openings read to learn how the model refuses: so many of each class, so long.
OPENINGS: Final = 24
OPENING_TOKENS: Final = 16
# Where a model decides late, so many of each class are read as far as there.
BEGUN: Final = 64
# Behaviour filters the prompts only while this share of them, and so many, is left.
ENOUGH_SHARE: Final = 0.25
ENOUGH: Final = 8
# How a model that has never been seen to refuse would most likely begin.
USUAL_OPENINGS: Final = ("I can't", "I cannot", "I'm sorry", "Sorry", "I won't", "I must decline")


@dataclass(frozen=True)
class Behaviour:
    """How the model goes on where it decides to refuse, and how often it refused each class."""

    openings: Openings
    refused_harmful: float
    refused_harmless: float

    def scores(
        self,
        next_token: torch.Tensor,
        reached: torch.Tensor | float = 0.0,
        first: torch.Tensor | None = None,
        at_once: Sequence[int] = (),
    ) -> torch.Tensor:
        """The refusal score of each row of log probabilities (…, vocabulary) at the point of decision, which itself is
        `reached` with that log probability; with that of one of `at_once` as the `first` token instead, where given."""
        found = _log_probability(next_token, self.openings.tokens) + reached
        if first is not None and at_once:
            found = torch.logaddexp(found, _log_probability(first, at_once))
        return _odds(found)

    def fits(self, next_token: torch.Tensor, *, harmful: bool) -> torch.Tensor:
        """Whether each row, by its log probabilities (…, vocabulary) for the answer's first token, begins as its class
        should; where models decide later, all do."""
        tokens = self.openings.firsts if harmful else self.openings.plain
        if self.openings.late or not tokens:
            return torch.ones(next_token.shape[:-1], dtype=torch.bool, device=next_token.device)
        return (log_odds(next_token, tokens) > 0) == harmful


def log_odds(next_token: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """log p − log(1 − p) of p = one of `tokens` comes next, by log probabilities (…, vocabulary)."""
    return _odds(_log_probability(next_token, tokens))


def _log_probability(next_token: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    at = torch.tensor(tokens, device=next_token.device)
    return torch.logsumexp(next_token[..., at].double(), dim=-1)


def _odds(found: torch.Tensor) -> torch.Tensor:
    found = found.clamp(max=-1e-12)
    return found - torch.log(-torch.expm1(found))


@dataclass(frozen=True)
class Measured:
    """Mean streams by class, the directions between them (depth, positions, hidden), and what they were read from.

    `layers`: how many the model has; the first `depth` of them were read.
    """

    harmful: Means
    harmless: Means
    directions: Float64
    positions: tuple[int, ...]
    convention: str
    atoms: int
    layers: int

    def gap(self, layer: int, position: int) -> float:
        """How far the classes' means lie apart there, ‖harmful − harmless‖."""
        at = min(layer, len(self.harmful.mean) - 1), self.positions.index(position)
        return float(np.linalg.norm(self.harmful.mean[at] - self.harmless.mean[at]))


def observe(loaded: Loaded, renderer: Renderer, prompts: PromptSets, *, invert: bool, watch: Watch) -> Behaviour:
    """Read the openings of some answers. ModelError where the model refuses nothing, or everything."""
    asked = [*prompts.harmful.training[:OPENINGS], *prompts.harmless.training[:OPENINGS]]
    harmful = min(OPENINGS, len(prompts.harmful.training))
    answers = greedy(loaded, renderer.all_tokens(asked), OPENING_TOKENS, watch, "reading how it answers")
    refused = [verdict(loaded.tokenizer.decode(answer, skip_special_tokens=True)) == "refusal" for answer in answers]
    rates = _share(refused[:harmful]), _share(refused[harmful:])
    refusing = [answer for answer, no in zip(answers[:harmful], refused[:harmful], strict=True) if no]
    answering = [answer for answer, no in zip(answers[harmful:], refused[harmful:], strict=True) if not no]
    openings = learn_openings(loaded.tokenizer, refusing, answering)
    if not openings.tokens and not invert:
        raise ModelError(
            f"{loaded.source.name} refuses none of {harmful} harmful prompts: there is nothing to remove",
            remedy="Give prompts it does refuse, or take the model as it is",
        )
    if not invert and rates[1] > 0.5:
        raise ModelError(
            f"{loaded.source.name} refuses {rates[1]:.0%} of the harmless prompts too: the classes can't be told apart",
            remedy="Give harmless prompts it answers",
        )
    if not openings.tokens:
        firsts = (loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in USUAL_OPENINGS)
        usual = {token for first in firsts for token in first}
        if not usual:
            raise ModelError(
                f"{loaded.source.name} refuses nothing, and its tokenizer knows no word a refusal begins with",
                remedy="Give harmful prompts it refuses",
            )
        openings = Openings(tuple(sorted(usual)), tuple(sorted(usual)))
    return Behaviour(openings, *rates)


def measure(
    loaded: Loaded,
    renderer: Renderer | Begun,
    prompts: PromptSets,
    behaviour: Behaviour,
    *,
    positions: Sequence[int],
    convention: str,
    orthogonalize: bool,
    depth: int,
    watch: Watch,
    winsorize: float = 1.0,
) -> Measured:
    """One pass over the training prompts: the classes' mean streams in the first `depth` layers, and the directions
    between them. `winsorize`: at which quantile of its magnitude each stream is clipped first; 1: not at all."""
    means = []
    for name, asked, sign in (
        ("harmful", prompts.harmful.training, 1.0),
        ("harmless", prompts.harmless.training, -1.0),
    ):
        rows = renderer.all_tokens(asked)
        shortest = min(len(row) for row in rows)
        if -min(positions) > shortest:
            raise ModelError(
                f"position {min(positions)} lies before the first token of a {name} prompt of {shortest} tokens",
                remedy="Set direction.position nearer to the end",
            )
        means.append(_class_mean(loaded, rows, sign, behaviour, (positions, convention, depth), watch, name, winsorize))
    harmful, harmless = means
    directions = difference_of_means(harmful.mean, harmless.mean, orthogonalize=orthogonalize)
    if prompts.atoms:
        place = (positions, convention, depth)
        directions = _protected(loaded, renderer, prompts, place, harmless.mean, directions, watch)
    atoms, layers = len(prompts.atoms), loaded.source.layers
    return Measured(harmful, harmless, directions, tuple(positions), convention, atoms, layers)


def begun(loaded: Loaded, renderer: Renderer, prompts: PromptSets, behaviour: Behaviour, watch: Watch) -> Begun | None:
    """For a model that decides late: a renderer of prompts with their answers' beginnings, for some of each class."""
    if not behaviour.openings.late:
        return None
    asked = [*prompts.harmful.training[:BEGUN], *prompts.harmless.training[:BEGUN]]
    cut = len(prompts.harmful.training[:BEGUN])
    answers = greedy(loaded, renderer.all_tokens(asked), OPENING_TOKENS, watch, "reading where it decides")
    known = list(zip(asked, answers, strict=True))
    return Begun(renderer, beginnings(loaded.tokenizer, behaviour.openings, dict(known[:cut]), dict(known[cut:])))


def streams_at(
    loaded: Loaded, renderer: Renderer, asked: Sequence[str], place: tuple[int, int, str], watch: Watch
) -> Float64:
    """Every prompt's stream at one (layer, position, convention): float64 (prompts, hidden)."""
    layer, position, convention = place
    rows = renderer.all_tokens(asked)
    found = np.empty((len(rows), loaded.source.hidden_size))
    reading = streams_alone(loaded, rows, (position,), (convention, layer + 1), watch, "reading the spread")
    for numbers, streams in reading:
        found[numbers] = streams[:, layer, 0].double().cpu().numpy()
    return found


def _class_mean(
    loaded: Loaded,
    rows: list[tuple[int, ...]],
    sign: float,
    behaviour: Behaviour,
    place: tuple[Sequence[int], str, int],
    watch: Watch,
    name: str,
    winsorize: float,
) -> Means:
    """The mean over the prompts the model treats as their class says, or over all where too few are left."""
    everyone: Float64 | None = None
    behaving: Float64 | None = None
    count = 0
    positions, convention, depth = place
    message = f"measuring {name} prompts"
    for reading in read_streams(loaded, rows, positions, convention, watch, message, depth=depth):
        fits = behaviour.fits(reading.next_token, harmful=sign > 0)
        streams = _clipped(reading.streams, winsorize)
        everyone = sum_streams(everyone, streams)
        if bool(fits.any()):
            behaving = sum_streams(behaving, streams[fits.to(streams.device)])
            count += int(fits.sum())
    assert everyone is not None
    if behaving is None or count < max(ENOUGH, ENOUGH_SHARE * len(rows)):
        return Means(everyone / len(rows), len(rows))
    return Means(behaving / count, count)


def _clipped(streams: torch.Tensor, quantile: float) -> torch.Tensor:
    """Each prompt's stream (layers, positions, hidden), clipped: a few giant activations would own the mean."""
    if quantile >= 1.0:
        return streams
    return torch.stack([torch.from_numpy(winsorise(row.double().cpu().numpy(), quantile)) for row in streams])


def _protected(
    loaded: Loaded,
    renderer: Renderer | Begun,
    prompts: PromptSets,
    place: tuple[Sequence[int], str, int],
    harmless: Float64,
    directions: Float64,
    watch: Watch,
) -> Float64:
    """The directions without what the atoms span, layer by layer and position by position."""
    rows = renderer.all_tokens(prompts.atoms)
    atoms = np.empty((len(rows), *directions.shape))
    positions, convention, depth = place
    for numbers, streams in streams_alone(
        loaded, rows, positions, (convention, depth), watch, "measuring what is protected"
    ):
        atoms[numbers] = streams.double().cpu().numpy() - harmless
    found = np.empty_like(directions)
    for layer, position in np.ndindex(*directions.shape[:2]):
        found[layer, position] = protect(directions[layer, position], atoms[:, layer, position])
    return found


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
