"""Which points to try next: first evenly spread ones, then ever closer to the best.

A cross-entropy search in generations, because a generation runs as one batch: the weights of a model that is streamed
are read once for all of it, where a sampler that wants each score before its next point would read them every time.
That, and bit-identical reruns without a database, is why this is not Optuna. Pure and seeded; does not know what a
point means.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from abliterated.pipeline.kernels import DIMENSIONS, Point

_PRIMES: Final = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
FIRST: Final = 16  # evenly spread ones
GENERATION: Final = 11
ELITE: Final = 5
WIDEST: Final = 0.18
NARROWEST_STEP: Final = 0.03
LEAP: Final = 0.08  # how often a coordinate is drawn anew


def spread(count: int, seed: int) -> list[Point]:
    """Evenly spread points: Halton's sequence, shifted by the seed."""
    source = random.Random(f"spread {seed}")  # noqa: S311 - reproducible, not secret
    shifts = [source.random() for _ in range(DIMENSIONS)]
    return [
        tuple((_radical(number + 20, base) + shift) % 1.0 for base, shift in zip(_PRIMES, shifts, strict=True))
        for number in range(count)
    ]


def near(best: Sequence[Point], count: int, seed: int, generation: int, left: float) -> list[Point]:
    """Points near the best ones, which come first; `left` (1 … 0) is how much of the search lies ahead."""
    source = random.Random(f"near {seed} {generation}")  # noqa: S311
    elite = list(best[:ELITE])
    least = NARROWEST_STEP + (WIDEST - NARROWEST_STEP) * left
    steps = [max(least, _deviation([point[axis] for point in elite])) for axis in range(DIMENSIONS)]
    found = []
    for number in range(count):
        # The best is the middle of half of them.
        middle = elite[0] if number % 2 == 0 else source.choice(elite)
        found.append(
            tuple(
                source.random() if source.random() < LEAP else _folded(source.gauss(value, step))
                for value, step in zip(middle, steps, strict=True)
            )
        )
    return found


def _radical(number: int, base: int) -> float:
    """The digits of `number` in `base`, mirrored behind the point."""
    found, share = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        found += digit * share
    return found


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)


def _folded(value: float) -> float:
    """Back into 0 … 1, as if its ends were mirrors."""
    value = abs(value) % 2.0
    return 2.0 - value if value > 1.0 else value
