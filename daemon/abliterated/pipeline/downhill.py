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

STAGES: Final = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0)
STEPS: Final = 10
STEP: Final = 0.1
# Each stage ends in smaller steps, so that its end is no swing of Adam's.
CALM: Final = (4, 0.4)
MEMORY: Final = (0.8, 0.95)
PROMPTS: Final = (48, 24)
# Tokens that go through at once: what lies on the way is kept for the way back.
TOKENS: Final = {"cpu": 512, "cuda": 4096, "mps": 1024}
LEAST_HARM: Final = 1e-6


class NoWayDown(Exception):
    """No gradient is to be had: the model is not whole in memory, or a part of it can't be followed back."""


def downhill(trials: Trials, start: Change, selected: frozenset[int], most: float, message: str) -> list[Float64]:
    """The strengths (layers, 2) at each stage's end, all between 0 and `most`, and nil outside the layers `selected`.
    Raises NoWayDown."""
    if trials.loaded.engine is not None:
        raise NoWayDown("its weights are read layer by layer")
    device = trials.loaded.device
    with torch.inference_mode(False), torch.enable_grad():
        strengths = torch.tensor(start.strengths, dtype=torch.float32, device=device).clamp(0.0, most)
        free = torch.tensor([[float(layer in selected)] for layer in range(len(strengths))], device=device)
        strengths.requires_grad_(True)
        adam = torch.optim.Adam([strengths], lr=STEP, betas=MEMORY)
        slope = _Slope(trials, start)
        found, scale, total = [], 0.0, len(STAGES) * STEPS
        for stage, pressure in enumerate(STAGES):
            for step in range(STEPS):
                trials.watch.step(stage * STEPS + step, total, "steps", message)
                adam.param_groups[0]["lr"] = STEP * (CALM[1] if step >= STEPS - CALM[0] else 1.0)
                adam.zero_grad()
                hurt = slope.follow(strengths, scale, pressure)
                scale = scale or max(hurt, LEAST_HARM)
                if strengths.grad is None or not bool(torch.isfinite(strengths.grad).all()):
                    raise NoWayDown("its gradient is no number")
                if step or stage:  # the first look only tells the scale
                    strengths.grad *= free
                    adam.step()
                    with torch.no_grad():
                        strengths.clamp_(0.0, most)
            found.append(strengths.detach().double().cpu().numpy().round(4))
    return found


class _Slope:
    """The prompts of both classes in batches, and the way back from what they cost to the strengths."""

    def __init__(self, trials: Trials, start: Change) -> None:
        self.trials, self.start = trials, start
        harmful, harmless = trials.harmful[: PROMPTS[0]], trials.answered.rows[: PROMPTS[1]]
        refusing = 1 + max(trials.beginnings[: len(harmful)], default=0)
        self.classes = ((harmful, refusing, self._refusals), (harmless, max(trials.answered.lengths), self._harm))
        self.counts = len(harmful), max(1, len(harmless))

    def follow(self, strengths: torch.Tensor, scale: float, pressure: float) -> float:
        """Add the gradient of what these strengths cost to theirs, batch by batch; the harm they do. `scale`: 0 where
        it is not known yet."""
        trials, total = self.trials, 0.0
        trials.watch.count(PREFILLED, sum(len(row) for rows, *_ in self.classes for row in rows))
        for rows, tail, cost in self.classes:
            for batch in batches(rows, trials.loaded.device, tokens=TOKENS[trials.loaded.device.type]):
                trials.watch.check()
                weighed, hurt = cost(
                    self._logits([rows[row] for row in batch], tail, strengths), batch, scale, pressure
                )
                total += hurt
                try:
                    weighed.backward()  # type: ignore[no-untyped-call]
                except (RuntimeError, NotImplementedError) as error:
                    raise NoWayDown(f"{type(error).__name__} on the way back") from error
        return total

    def _refusals(
        self, found: torch.Tensor, batch: list[int], scale: float, pressure: float
    ) -> tuple[torch.Tensor, float]:
        trials, share = self.trials, 1.0 / self.counts[0]
        scores = torch.stack([trials.refusing(one, row) for one, row in zip(found, batch, strict=True)])
        astray = (
            torch.stack([trials.gone_astray(one, row) for one, row in zip(found, batch, strict=True)]).sum() * share
        )
        lost = harm(0.0, 1.0) * astray
        return (
            lost / (scale or 1.0) + pressure * share * torch.nn.functional.softplus(scores).sum(),
            float(lost.detach()),
        )

    def _harm(self, found: torch.Tensor, batch: list[int], scale: float, _: float) -> tuple[torch.Tensor, float]:
        strayed = torch.stack([self.trials.strayed(one, row) for one, row in zip(found, batch, strict=True)]).sum()
        strayed = strayed / self.counts[1]
        return strayed / (scale or 1.0), float(strayed.detach())

    def _logits(self, rows: Rows, tail: int, strengths: torch.Tensor) -> torch.Tensor:
        """Log probabilities (rows, tail, vocabulary)."""
        model, device = self.trials.loaded.model, self.trials.loaded.device
        asked = Pass(rows, tail=tail)
        with _loosened(self.trials, self.start, strengths):
            try:
                logits, _ = forward(
                    model, decoder_layers(model), padded(rows, device), asked, lengths=[len(row) for row in rows]
                )
            except (RuntimeError, NotImplementedError) as error:
                raise NoWayDown(f"{type(error).__name__} on the way") from error
        assert logits is not None
        return torch.log_softmax(logits, dim=-1)


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
