"""A trial's parameters: which direction, and how strongly it is removed from each layer's attention and MLP.

A kernel is a peak, where it stands, how far it reaches and what is left beyond. A trial may lean on what single writers
were found to be worth: refusal lost for harm done. Points of the unit cube are what the
sampler knows; here they get their meaning. Pure numpy. Does not know models or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from abliterated.pipeline.directions import Float64, between_layers

Point = tuple[float, ...]

STRONGEST: Final = 1.5
# A kernel reaches so far at least, as a share of the depth: less would be no kernel but one layer.
NARROWEST: Final = 0.15
# Below this strength a writer is left alone altogether.
NEGLIGIBLE: Final = 0.02
# No writer is leant on more than this, whatever it is worth.
STRONGEST_LEANT: Final = 1.1
DIMENSIONS: Final = 12


@dataclass(frozen=True)
class Kernel:
    """λ over the depth (0 … 1): `peak` at `center`, falling to `peak · floor` at `width` away and beyond."""

    peak: float
    center: float
    width: float
    floor: float

    def over(self, layers: int) -> Float64:
        """λ by layer."""
        depth = np.linspace(0.0, 1.0, layers) if layers > 1 else np.array([self.center])
        shape = np.maximum(0.0, 1.0 - np.abs(depth - self.center) / self.width)
        found: Float64 = self.peak * (self.floor + (1.0 - self.floor) * shape)
        return found


@dataclass(frozen=True)
class Parameters:
    """What a trial tries. `index`: between two layers' directions; `position`: where they were read; `own`: each layer
    loses its own direction instead."""

    index: float
    position: int
    own: bool
    attention: Kernel
    mlp: Kernel
    lean: float = 0.0

    def strengths(self, worth: Float64, selected: frozenset[int]) -> Float64:
        """(layers, 2): λ for attention-like and MLP-like writers, by the kernels and, as far as it leans on it, by each
        writer's `worth` (about 1); nil in layers the recipe leaves out."""
        layers = len(worth)
        found = np.stack([self.attention.over(layers), self.mlp.over(layers)], axis=1)
        found = np.minimum(found * worth**self.lean, np.maximum(found, STRONGEST_LEANT)) if self.lean else found
        found = np.where(found < NEGLIGIBLE, 0.0, found).round(6)
        found[[layer for layer in range(layers) if layer not in selected]] = 0.0
        return found


@dataclass(frozen=True)
class Space:
    """What can be tried: `positions` with directions, in `depth` layers; a `given` subspace instead has no index."""

    positions: tuple[int, ...]
    depth: int
    given: bool = False

    def parameters(self, point: Point) -> Parameters:
        """The meaning of a point of the unit cube; rounded, so that it is the same everywhere."""
        index, position, own, lean, *rest = (round(value, 6) for value in point)
        return Parameters(
            index=0.0 if self.given else round(index * (self.depth - 1), 4),
            position=self.positions[min(int(position * len(self.positions)), len(self.positions) - 1)],
            own=not self.given and own > 0.75,
            attention=_kernel(rest[:4]),
            mlp=_kernel(rest[4:]),
            lean=lean,
        )

    def point(self, index: float, position: int, attention: Kernel, mlp: Kernel, lean: float = 0.0) -> Point:
        """The point that means this, of one direction for all layers."""
        first = index / max(1, self.depth - 1)
        second = (self.positions.index(position) + 0.5) / len(self.positions)
        return (first, second, 0.3, lean, *_coordinates(attention), *_coordinates(mlp))

    def weaker(self, point: Point, attention: float, mlp: float) -> Point:
        """The point that means the same, but for kernels so much lower."""
        return (*point[:4], point[4] * attention, *point[5:8], point[8] * mlp, *point[9:])

    def vectors(self, parameters: Parameters, directions: Float64, layers: int) -> Float64:
        """The directions to remove, (1 or layers, 1, hidden), of all read (depth, positions, hidden)."""
        by_layer = directions[:, self.positions.index(parameters.position)]
        if not parameters.own:
            return between_layers(by_layer, parameters.index)[None, None, :]
        rows = [between_layers(by_layer, float(min(layer, self.depth - 1))) for layer in range(layers)]
        return np.stack(rows)[:, None, :]


def constant(strength: float) -> Kernel:
    """The same λ in every layer."""
    return Kernel(peak=strength, center=0.5, width=1.0, floor=1.0)


def _kernel(values: Sequence[float]) -> Kernel:
    peak, center, width, floor = values
    return Kernel(
        peak=round(peak * STRONGEST, 6),
        center=center,
        width=round(NARROWEST + width * (1.0 - NARROWEST), 6),
        floor=floor,
    )


def _coordinates(kernel: Kernel) -> tuple[float, float, float, float]:
    width = (kernel.width - NARROWEST) / (1.0 - NARROWEST)
    return min(1.0, kernel.peak / STRONGEST), kernel.center, width, kernel.floor
