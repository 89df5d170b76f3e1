"""Trying changes without touching a weight: what is added to the residual stream loses its share along some
directions, layer by layer as strongly as a change says, and two things are read off, by prefill alone:

the refusal score of harmful prompts, log p − log(1 − p) of p = the model goes on with one of its own refusals at the
point of decision; and how far harmless answers stray, KL over the tokens of the model's own ones (teacher forcing).
Equal to the plain edit of every writer. Many changes go through the model in one pass. Does not know what to try next.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.contributions import Contributions, find_contributions
from abliterated.pipeline.directions import Float32, Float64
from abliterated.pipeline.edit import seen_through_norms
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.measure import OPENING_TOKENS, Behaviour, log_odds
from abliterated.pipeline.passes import Pass, Rows, run_pass
from abliterated.pipeline.refusal_openings import decision
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.taps import decoder_layers, stream_of
from abliterated.pipeline.watch import Watch

KL_TOKENS: Final = 32
# The share of probability that counts as what answers begin with.
SENSIBLE: Final = 0.999
# Of fewer prompts than these nothing could be told, so that the rest is taken, too.
FEWEST: Final = 4
# Of a token's distribution the likeliest so many are kept, and the rest as one: KL is exact but for what moves there.
LIKELIEST: Final = 128
_MLP: Final = re.compile(r"mlp|ffn|ffw|feed_?forward|moe|expert", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """`vectors`: orthonormal rows to remove, (1 or layers, rank, hidden); `strengths`: (layers, 2), attention, MLP."""

    vectors: Float32
    strengths: Float64


@dataclass(frozen=True)
class Scores:
    """By prompt: refusal score of the harmful ones, mean KL of the harmless ones; and how much of their first token's
    probability the harmful ones give to neither a refusal nor anything an answer begins with."""

    refusal: Float64
    kl: Float64
    astray: Float64


@dataclass(frozen=True)
class Answered:
    """Harmless prompts with the model's own answers behind them, and what it expected at each of their tokens:
    the likeliest tokens (prompts, tokens, LIKELIEST), their log probabilities, and that of all others together."""

    rows: Rows
    lengths: tuple[int, ...]
    tokens: torch.Tensor
    expected: torch.Tensor
    others: torch.Tensor


class Trials:
    """One model, the prompts it is tried on, and what it does as it is."""

    def __init__(self, loaded: Loaded, renderer: Renderer, behaviour: Behaviour, watch: Watch, *, gains: bool) -> None:
        self.loaded, self.renderer, self.behaviour, self.watch = loaded, renderer, behaviour, watch
        self.layers = loaded.source.layers
        self.gains = gains  # whether directions are seen through norms between writer and stream
        self.harmful: Rows = ()
        self.harmless: Rows = ()
        self.beginnings: tuple[int, ...] = ()  # how many of a harmful row's tokens are its answer's beginning
        self.answered: Answered
        self.sensible: tuple[int, ...] = ()  # what answers, and refusals, begin with; empty where that can't be told
        self.contributions: Contributions
        self.paths: list[list[int]] = []  # 0 attention, 1 MLP, for each contribution

    def ask(self, harmful: Sequence[str], harmless: Sequence[str], tokens: int = KL_TOKENS) -> int:
        """Make ready to be tried on these; the number of harmful prompts left, those the model refuses."""
        rows: Rows = self.renderer.all_tokens(harmful)
        self.look(max(rows, key=len))
        begun = self._refused(rows)
        if len(begun) < min(FEWEST, len(rows)):
            begun = [(row, ()) for row in rows]
        begun = self._both_ways(begun)
        self.harmful = [row + beginning for row, beginning in begun]
        self.beginnings = tuple(len(beginning) for _, beginning in begun)
        self.harmless = self.renderer.all_tokens(harmless)
        self.answered = self._answers(self.harmless, tokens)
        self.sensible = () if self.behaviour.openings.late else self._sensible()
        return len(self.harmful)

    def look(self, probe: tuple[int, ...]) -> None:
        """Find what writes to the stream, by one pass."""
        self.contributions = find_contributions(self.loaded, probe, self.watch)
        self.paths = path_numbers(self.loaded, self.contributions)

    def scored(self, changes: Sequence[Change], harmful: int, harmless: int, message: str) -> list[Scores]:
        """Every change on the first so many prompts of each class."""
        rows, answered = self.harmful[:harmful], self.answered.rows[:harmless] if harmless else []
        refusal, kl = np.zeros((len(changes), len(rows))), np.zeros((len(changes), len(answered)))
        astray = np.zeros_like(refusal)
        total = len(changes) * (len(rows) + len(answered))

        def changing(numbers: list[int]) -> AbstractContextManager[Any]:
            return ChangedModel(self, [changes[number] for number in numbers])

        tail = 1 + max(self.beginnings[: len(rows)], default=0)
        for pairs, logits in self.tried(len(changes), rows, tail, changing, (0, total, message)):
            for (change, row), found in zip(pairs, torch.log_softmax(logits, dim=-1), strict=True):
                refusal[change, row] = float(self.refusing(found, row))
                astray[change, row] = float(self.gone_astray(found, row))
        if answered:
            tail = max(self.answered.lengths)
            for pairs, logits in self.tried(len(changes), answered, tail, changing, (refusal.size, total, message)):
                for (change, row), found in zip(pairs, torch.log_softmax(logits, dim=-1), strict=True):
                    kl[change, row] = float(self.strayed(found, row))
        rounded = refusal.round(6), kl.round(8), astray.round(6)
        return [Scores(*parts) for parts in zip(*rounded, strict=True)]

    def tried(
        self,
        changes: int,
        rows: Rows,
        tail: int,
        changing: Callable[[list[int]], AbstractContextManager[Any]],
        place: tuple[int, int, str],
    ) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
        """Every change with every row, all in one pass: (change, row) pairs and their logits."""
        pairs = [(number, row) for row in range(len(rows)) for number in range(changes)]
        asked = Pass(
            [rows[row] for _, row in pairs],
            tail=tail,
            variants=tuple(number for number, _ in pairs),
            changing=changing,
        )
        for part in run_pass(self.loaded, asked, self.watch, place[2], place[:2]):
            assert part.logits is not None
            yield [pairs[number] for number in part.rows], part.logits

    def refusing(self, found: torch.Tensor, row: int) -> torch.Tensor:
        """The refusal score from the log probabilities (tail, vocabulary) of one harmful row: of both ways where it has
        a beginning, that refusal at once and that behind the beginning."""
        begun = self.beginnings[row]
        if not begun:
            return self.behaviour.scores(found[-1])
        beginning = torch.tensor(self.harmful[row][-begun:], device=found.device)[:, None]
        reached = found[-1 - begun : -1].gather(1, beginning).double().sum()
        at_once = () if self.behaviour.openings.late else self.behaviour.openings.plain
        return self.behaviour.scores(found[-1], reached, found[-1 - begun], at_once)

    def gone_astray(self, found: torch.Tensor, row: int) -> torch.Tensor:
        """The probability of what neither answers nor refusals begin with, by a harmful row's log probabilities (tail,
        vocabulary)."""
        if not self.sensible:
            return found.new_zeros((), dtype=torch.float64)
        at = torch.tensor(self.sensible, device=found.device)
        first = found[-1 - self.beginnings[row], at].double()
        return (1.0 - first.exp().sum()).clamp(min=0.0)

    def _sensible(self) -> tuple[int, ...]:
        """The likeliest first tokens of the answers to harmless prompts, all but a little of their probability, and of
        refusals."""
        logits = tail_logits(self.loaded, self.harmless, 1, self.watch)[:, 0]
        mean = torch.softmax(logits, dim=-1).double().mean(0)
        order = mean.argsort(descending=True, stable=True)
        count = int((mean[order].cumsum(0) < SENSIBLE).sum()) + 1
        return tuple(sorted({*order[:count].tolist(), *self.behaviour.openings.firsts}))

    def strayed(self, found: torch.Tensor, row: int) -> torch.Tensor:
        """Mean KL over one harmless answer's tokens, from the log probabilities (tail, vocabulary)."""
        length, base = self.answered.lengths[row], self.answered
        found = found[-length:]
        tokens, expected, others = base.tokens[row, -length:], base.expected[row, -length:], base.others[row, -length:]
        now = found.gather(1, tokens).double()
        rest = torch.log((1.0 - now.exp().sum(-1)).clamp(min=1e-9))
        parts = (expected.exp() * (expected - now)).sum(-1) + others.exp() * (others - rest)
        return parts.mean().clamp(min=0.0)

    def _refused(self, rows: Rows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The rows the model refuses, each with what its answer begins with before it decides to. Only of those whose
        first token leaves it open is the beginning decoded."""
        openings = self.behaviour.openings
        found: dict[int, tuple[int, ...]] = {}
        open_ = list(range(len(rows)))
        if openings.plain and not openings.late:
            first = torch.log_softmax(tail_logits(self.loaded, rows, 1, self.watch)[:, 0], dim=-1)
            certain = (log_odds(first, openings.plain) > 0).tolist()
            likeliest = first.argmax(-1).tolist()
            found = {row: () for row in open_ if certain[row]}
            open_ = [row for row in open_ if not certain[row] and likeliest[row] in openings.firsts]
        chosen = [rows[row] for row in open_]
        answers = greedy(self.loaded, chosen, OPENING_TOKENS, self.watch, "reading where it decides") if chosen else []
        for row, answer in zip(open_, answers, strict=True):
            place = decision(self.loaded.tokenizer, answer, openings.ambiguous)
            if place is not None and answer[place] in openings.tokens:
                found[row] = answer[:place]
        return [(rows[row], found[row]) for row in sorted(found)]

    def _both_ways(self, begun: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Any]:
        """Rows refused at once get the usual beginning of the others behind them, for a change may turn the one way of
        refusing into the other."""
        usual = Counter(beginning for _, beginning in begun if beginning).most_common(1)
        if self.behaviour.openings.late or not usual or usual[0][1] < FEWEST:
            return begun
        return [(row, beginning or usual[0][0]) for row, beginning in begun]

    def _answers(self, rows: Rows, tokens: int) -> Answered:
        begun = greedy(self.loaded, rows, tokens, self.watch, "answering harmless prompts")
        # Teacher forcing: the position before each token of the answer predicts it.
        whole = [row + answer[:-1] for row, answer in zip(rows, begun, strict=True)]
        lengths = tuple(max(1, len(answer)) for answer in begun)
        asked = Pass(whole, tail=max(lengths))
        kept: list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for part in run_pass(self.loaded, asked, self.watch, "reading harmless answers"):
            assert part.logits is not None
            found = torch.log_softmax(part.logits, dim=-1)
            best = found.topk(min(LIKELIEST, found.shape[-1] - 1), dim=-1)
            values = best.values.double()
            others = torch.log((1.0 - values.exp().sum(-1)).clamp(min=1e-9))
            kept.append((part.rows, best.indices, values, others))
        order = torch.tensor([row for numbers, *_ in kept for row in numbers]).argsort().to(kept[0][1].device)

        def all_of(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts)[order]

        indices, values, others = (all_of(list(parts)) for parts in zip(*(one[1:] for one in kept), strict=True))
        return Answered(whole, lengths, indices, values, others)


class ChangedModel:
    """While open, each row of the batch runs under its own change."""

    def __init__(self, trials: Trials, changes: Sequence[Change]) -> None:
        self.trials, self.changes = trials, changes
        self._hooks: list[Any] = []

    def __enter__(self) -> ChangedModel:
        for layer, parts in enumerate(self.trials.contributions.layers):
            for part, path in zip(parts, self.trials.paths[layer], strict=True):
                strengths = [float(change.strengths[layer, path]) for change in self.changes]
                if not any(strengths):
                    continue
                gain = part.gain if self.trials.gains else None
                vectors = self.vectors_at(layer, gain)
                scaled = vectors * torch.tensor(strengths, device=vectors.device)[:, None, None]
                if part.gain is None:
                    self._hooks.append(part.module.register_forward_hook(from_output(vectors, scaled)))
                else:
                    self._hooks.append(part.module.register_forward_pre_hook(from_input(vectors, scaled)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def vectors_at(self, layer: int, gain: torch.Tensor | None) -> torch.Tensor:
        """Each row's directions at this layer, (rows, rank, hidden); lower ranks are filled up with zeros."""
        gains = () if gain is None else (gain.cpu().numpy().astype(np.float32),)
        known: dict[int, Float32] = {}
        for change in self.changes:
            if id(change) not in known:
                vectors = change.vectors[layer if len(change.vectors) > 1 else 0]
                known[id(change)] = seen_through_norms(vectors, gains)
        rank = max(len(vectors) for vectors in known.values())
        found: NDArray[np.float32] = np.zeros((len(self.changes), rank, self.changes[0].vectors.shape[-1]), np.float32)
        for row, change in enumerate(self.changes):
            vectors = known[id(change)]
            found[row, : len(vectors)] = vectors
        return torch.from_numpy(found).to(self.trials.loaded.device)


def path_numbers(loaded: Loaded, contributions: Contributions) -> list[list[int]]:
    """For each contribution whether it is attention-like (0) or MLP-like (1), by what its module is called."""
    found = []
    for layer, parts in zip(decoder_layers(loaded.model), contributions.layers, strict=True):
        names = {module: name for name, module in layer.named_modules()}
        found.append([int(_MLP.search(names[part.module]) is not None) for part in parts])
    return found


def from_output(vectors: torch.Tensor, scaled: torch.Tensor) -> Any:
    """A hook behind a module: what it gives out loses its share along `vectors`, `scaled` times."""

    def hook(_: torch.nn.Module, __: Any, output: Any) -> Any:
        changed = _without(stream_of(output), vectors, scaled)
        return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

    return hook


def from_input(vectors: torch.Tensor, scaled: torch.Tensor) -> Any:
    """A hook before a norm: what it is given loses it."""

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        return (_without(args[0], vectors, scaled), *args[1:])

    return hook


def _without(stream: torch.Tensor, vectors: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """The stream less λ times its share along each row's directions, worked out in float32."""
    vectors, scaled = vectors.to(stream.device), scaled.to(stream.device)  # a layer's own, where there are several
    wide = stream.float().reshape(len(vectors), -1, stream.shape[-1])
    share = torch.einsum("bth,bkh->btk", wide, vectors)
    return (wide - torch.einsum("btk,bkh->bth", share, scaled)).reshape(stream.shape).to(stream.dtype)
