"""Strengths followed downhill: every writer's own, by the gradient of what a change costs over all of them at once.

A kernel gives neighbouring layers like strengths, and what writers are worth differs from one to the next. So a trial's
strengths are let go one by one, by Adam (Kingma and Ba 2014) through the hooks of `trials.py`:

    (KL + what goes astray) / scale + pressure · mean softplus(refusal score)

The pressure rises in stages, and the end of each is worth a trial: from little harm and some refusals to no refusals
and more harm. No weight moves, none gets a gradient. For a model that is whole in memory; does not know targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from abliterated.pipeline.candidates import harm
from abliterated.pipeline.directions import Float64
from abliterated.pipeline.passes import Pass, Rows, batches, forward, padded
from abliterated.pipeline.taps import decoder_layers
from abliterated.pipeline.trials import Change, ChangedModel, Trials, from_input, from_output
from abliterated.pipeline.watch import PREFILLED

STAGES: Final = (0.06, 0.15, 0.35, 0.8, 2.0, 5.0)
STEPS: Final = 16
STEP: Final = 0.1
# Each stage ends in smaller steps, so that its end is no swing of Adam's.
CALM: Final = (6, 0.4)
MEMORY: Final = (0.8, 0.95)
# A step goes by a sixth of the prompts, though by so many at least; the next one by those beside them.
FOLDS: Final = 6
FEWEST: Final = 8
# Tokens that go through at once: what lies on the way is kept for the way back.
TOKENS: Final = {"cpu": 512, "cuda": 4096, "mps": 1024}
LEAST_HARM: Final = 1e-6


class NoWayDown(Exception):
    """No gradient is to be had: the model is not whole in memory, or a part of it can't be followed back."""


def downhill(trials: Trials, start: Change, hurt: float, selected: frozenset[int], most: float) -> list[Float64]:
    """The strengths (layers, 2) at each stage's end, all between 0 and `most`, and nil outside the layers `selected`.
    `hurt`: what `start` costs, the scale. Raises NoWayDown."""
    if trials.loaded.engine is not None:
        raise NoWayDown("its weights are read layer by layer")
    device, total = trials.loaded.device, len(STAGES) * STEPS
    with torch.inference_mode(False), torch.enable_grad():
        free = torch.tensor([[float(layer in selected)] for layer in range(trials.layers)], device=device)
        strengths = torch.tensor(start.strengths, dtype=torch.float32, device=device).clamp(0.0, most)
        strengths.requires_grad_(True)
        adam = torch.optim.Adam([strengths], lr=STEP, betas=MEMORY)
        slope = _Slope(trials, start, 1.0 / max(hurt, LEAST_HARM))
        found = []
        for number in range(total):
            trials.watch.step(number, total, "steps", "going downhill")
            stage, step = divmod(number, STEPS)
            adam.param_groups[0]["lr"] = STEP * (CALM[1] if step >= STEPS - CALM[0] else 1.0)
            adam.zero_grad()
            slope.follow(strengths, STAGES[stage], number)
            if strengths.grad is None or not bool(torch.isfinite(strengths.grad).all()):
                raise NoWayDown("its gradient is no number")
            strengths.grad *= free
            adam.step()
            with torch.no_grad():
                strengths.clamp_(0.0, most)
            if step == STEPS - 1:
                found.append((strengths.detach() * free).double().cpu().numpy().round(4))
    return found


class _Slope:
    """The prompts of both classes, and the way back from what they cost to the strengths. `weight`: of harm."""

    def __init__(self, trials: Trials, start: Change, weight: float) -> None:
        self.trials, self.start, self.weight = trials, start, weight
        self.tails = 1 + max(trials.beginnings, default=0), max(trials.answered.lengths, default=1)

    def follow(self, strengths: torch.Tensor, pressure: float, step: int) -> None:
        """Add the gradient of what these strengths cost on the step's prompts to theirs, batch by batch."""
        trials, (refusing, answering) = self.trials, self.tails
        harmful, harmless = _fold(len(trials.harmful), step), _fold(len(trials.answered.rows), step)
        for found, rows in self._logits(trials.harmful, harmful, refusing, strengths):
            self._back(self._refusals(found, rows, pressure) / len(harmful))
        for found, rows in self._logits(trials.answered.rows, harmless, answering, strengths):
            strayed = torch.stack([trials.strayed(one, row) for one, row in zip(found, rows, strict=True)])
            self._back(self.weight * strayed.sum() / len(harmless))

    def _refusals(self, found: torch.Tensor, rows: list[int], pressure: float) -> torch.Tensor:
        trials = self.trials
        scores = torch.stack([trials.refusing(one, row) for one, row in zip(found, rows, strict=True)])
        astray = torch.stack([trials.gone_astray(one, row) for one, row in zip(found, rows, strict=True)])
        return pressure * torch.nn.functional.softplus(scores).sum() + self.weight * harm(0.0, 1.0) * astray.sum()

    def _back(self, cost: torch.Tensor) -> None:
        try:
            cost.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError) as error:
            raise NoWayDown(f"{type(error).__name__} on the way back") from error

    def _logits(
        self, rows: Rows, chosen: list[int], tail: int, strengths: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Log probabilities (rows, tail, vocabulary) of the rows chosen, batch by batch, and which they are."""
        model, device, watch = self.trials.loaded.model, self.trials.loaded.device, self.trials.watch
        asked = Pass(rows, tail=tail)
        for batch in batches([rows[row] for row in chosen], device, tokens=TOKENS[device.type]):
            watch.check()
            numbers = [chosen[place] for place in batch]
            these = [rows[row] for row in numbers]
            watch.count(PREFILLED, sum(map(len, these)))
            with _loosened(self.trials, self.start, strengths):
                try:
                    lengths = [len(row) for row in these]
                    logits, _ = forward(model, decoder_layers(model), padded(these, device), asked, lengths=lengths)
                except (RuntimeError, NotImplementedError) as error:
                    raise NoWayDown(f"{type(error).__name__} on the way") from error
            assert logits is not None
            yield torch.log_softmax(logits, dim=-1), numbers


def _fold(count: int, step: int) -> list[int]:
    """The prompts of a step: of few, some in every step."""
    folds = max(1, min(FOLDS, count // FEWEST))
    return list(range(count))[step % folds :: folds]


@contextmanager
def _loosened(trials: Trials, start: Change, strengths: torch.Tensor) -> Iterator[None]:
    """While open, the model runs under `start` with other strengths, which a gradient goes back to."""
    at = ChangedModel(trials, [start])
    hooks: list[Any] = []
    try:
        for layer, parts in enumerate(trials.contributions.layers):
            for part, path in zip(parts, trials.paths[layer], strict=True):
                vectors = at.vectors_at(layer, part.gain if trials.gains else None)
                scaled = vectors * strengths[layer, path]
                if part.gain is None:
                    hooks.append(part.module.register_forward_hook(from_output(vectors, scaled)))
                else:
                    hooks.append(part.module.register_forward_pre_hook(from_input(vectors, scaled)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def between(stages: Sequence[Float64], reached: Callable[[int], bool], count: int) -> list[Float64]:
    """`count` strengths around the first stage that reaches the target: between the one before and it; weaker than
    the first, or stronger than the last, where that is where it lies."""
    first = next((stage for stage in range(len(stages)) if reached(stage)), len(stages))
    steps = [(number + 1) / (count + 1) for number in range(count)]
    if first == 0:
        return [(stages[0] * share).round(4) for share in (0.5 + 0.5 * np.array(steps))]
    if first == len(stages):
        return [(stages[-1] * share).round(4) for share in (1.0 + 0.2 * np.array(steps))]
    low, high = stages[first - 1], stages[first]
    return [(low + (high - low) * share).round(4) for share in steps]
