"""The refusal direction and the arithmetic that finds it: means, differences, protection, interpolation, rank k.

Pure numpy, float64 inside, one rounding to float32 at the end. Does not know models, prompts or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]

# Below this share of the classes' own size a difference is rounding noise, not a direction.
NOISE: Final = 1e-6


@dataclass(frozen=True, eq=False)
class RefusalDirection:
    """Unit directions of the residual stream along which the model refuses.

    `vectors`: float32, (layers or 1, rank, hidden size); the rows of each layer are orthonormal. `per_layer`: whether
    each layer has its own. `origin`: how they were found, as plain JSON values. `strengths`: how strongly a search
    would have them removed, (attention, MLP) by layer; empty where the recipe says it.
    """

    vectors: Float32
    per_layer: bool = False
    origin: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    strengths: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        vectors = self.vectors
        if vectors.dtype != np.float32 or vectors.ndim != 3 or 0 in vectors.shape:
            raise ValueError(f"a direction is float32 of (layers, rank, hidden), not {vectors.dtype} {vectors.shape}")
        if not self.per_layer and vectors.shape[0] != 1:
            raise ValueError(f"one direction for all layers, but {vectors.shape[0]} were given")
        gram = np.einsum("lkh,lmh->lkm", vectors, vectors, dtype=np.float64)
        if not np.allclose(gram, np.eye(vectors.shape[1]), atol=1e-4):  # also false for NaN
            raise ValueError("the rows of a direction must be orthonormal")
        vectors.flags.writeable = False

    @property
    def rank(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def hidden_size(self) -> int:
        return int(self.vectors.shape[2])

    def for_layer(self, layer: int) -> Float32:
        """The directions removed at this layer: (rank, hidden)."""
        chosen: Float32 = self.vectors[layer if self.per_layer else 0]
        return chosen

    def removed_by(self, strengths: tuple[tuple[float, float], ...]) -> RefusalDirection:
        """The same directions, to be removed this strongly, (attention, MLP) by layer."""
        return replace(self, strengths=strengths)

    def digest(self) -> str:
        """sha256 (hex) of the numbers, not of how they were found."""
        content = hashlib.sha256(f"{self.vectors.shape} {self.per_layer}\n".encode())
        content.update(np.ascontiguousarray(self.vectors, dtype="<f4").tobytes())
        return content.hexdigest()


def direction(vectors: Float64 | Float32, *, origin: Mapping[str, Any], per_layer: bool = False) -> RefusalDirection:
    """A direction from what was found: (hidden,), (rank, hidden), or per layer (layers, [rank,] hidden).

    Rows are made orthonormal, layer by layer. ModelError for zeros, NaN and dependent rows.
    """
    found = np.asarray(vectors, dtype=np.float64)
    if per_layer:
        found = found[:, None, :] if found.ndim == 2 else found
    else:
        found = np.atleast_2d(found)[None, ...]
    rows = found.astype(np.float32)
    gram = np.einsum("lkh,lmh->lkm", found, found)
    if not np.array_equal(rows, found) or not np.allclose(gram, np.eye(found.shape[1]), atol=1e-6):
        # What has been through here before is kept to the bit.
        rows = np.stack([orthonormal(layer) for layer in found]).astype(np.float32)
    return RefusalDirection(rows, per_layer, MappingProxyType(dict(origin)))


def difference_of_means(harmful: Float64, harmless: Float64, *, orthogonalize: bool) -> Float64:
    """The unit direction from the harmless mean to the harmful one, (…, hidden) each; zeros where there is none.

    `orthogonalize` removes the component along the harmless mean, which every answer needs.
    """
    found = _unit(harmful - harmless, np.linalg.norm(harmful, axis=-1, keepdims=True))
    if not orthogonalize:
        return found
    base = _unit(harmless, np.zeros(()))
    return _unit(found - (found * base).sum(-1, keepdims=True) * base, np.ones(()))


def protect(direction: Float64, atoms: Float64, *, ridge: float = 0.1) -> Float64:
    """Take the span of harmless concept atoms, (atoms, hidden), out of a unit direction (…, hidden), softly.

    `ridge` is relative to the atoms' mean squared length, so that it means the same in every model.
    """
    if not atoms.size:
        return direction
    alpha = ridge * float((atoms**2).sum(-1).mean())
    gram = atoms @ atoms.T + alpha * np.eye(len(atoms))
    weights = np.linalg.solve(gram, (direction @ atoms.T).reshape(-1, len(atoms)).T).T
    return _unit(direction - (weights @ atoms).reshape(direction.shape), np.ones(()))


def further_directions(first: Float64, harmful: Float64, harmless: Float64, rank: int) -> Float64:
    """`first` (hidden,) and rank − 1 more, along which the harmful prompts spread and the harmless ones do not.

    Contrastive principal components of the activations (prompts, hidden), without what is chosen already; worked out
    in the span of the prompts, so the cost is quadratic in prompts and linear in the hidden size.
    """
    if rank == 1:
        return first[None, :]
    inside = [_without(rows - rows.mean(0), first) for rows in (harmful, harmless)]
    span, triangle = np.linalg.qr(np.concatenate(inside).T)  # (hidden, n), (n, n)
    cut = len(inside[0])
    spread, common = triangle[:, :cut], triangle[:, cut:]
    contrast = spread @ spread.T / max(1, cut) - common @ common.T / max(1, len(inside[1]))
    values, vectors = np.linalg.eigh(contrast)
    order = np.argsort(values)[::-1][: rank - 1]
    if len(order) < rank - 1 or values[order[-1]] <= 0:
        raise ModelError(
            f"the prompts span fewer than the {rank} directions asked for",
            remedy="Lower direction.rank or give more prompts",
        )
    return orthonormal(np.concatenate([first[None, :], (span @ vectors[:, order]).T]))


def between_layers(by_layer: Float64, index: float) -> Float64:
    """The direction at a fractional layer, (hidden,): the two neighbours' unit directions, blended and made unit."""
    last = len(by_layer) - 1
    low = min(max(int(np.floor(index)), 0), last)
    high = min(low + 1, last)
    share = min(max(index - low, 0.0), 1.0)
    return _unit((1.0 - share) * by_layer[low] + share * by_layer[high], np.ones(()))


def without_gaps(by_layer: Float64) -> Float64:
    """Per-layer directions (layers, hidden) where a layer that has none takes its nearest neighbour's."""
    present = np.flatnonzero(np.linalg.norm(by_layer, axis=-1) > 0.5)
    if not present.size:
        raise same_means()
    nearest = [int(present[np.argmin(np.abs(present - layer))]) for layer in range(len(by_layer))]
    filled: Float64 = by_layer[nearest]
    return filled


def winsorise(activations: Float64, quantile: float) -> Float64:
    """Clip each prompt's activations at that quantile of their magnitude: a few giants would own the mean (GeGLU)."""
    limit = np.quantile(np.abs(activations), quantile, axis=-1, keepdims=True)
    return np.clip(activations, -limit, limit)


def orthonormal(rows: Sequence[Float64] | Float64) -> Float64:
    """Gram–Schmidt over (rank, hidden), twice for float64's sake; the first row keeps its direction and sign."""
    basis: list[Float64] = []
    for row in np.asarray(rows, dtype=np.float64):
        length = float(np.linalg.norm(row))
        if not np.isfinite(length):
            raise ModelError("the direction holds NaN or Inf", remedy="Measure it again in float32")
        rest = row
        for _ in range(2):
            for other in basis:
                rest = rest - (rest @ other) * other
        if np.linalg.norm(rest) <= NOISE * length or length == 0.0:
            if basis:
                raise ModelError("the directions depend on one another", remedy="Lower direction.rank")
            raise same_means()
        basis.append(rest / np.linalg.norm(rest))
    return np.stack(basis)


def same_means() -> ModelError:
    """The error for two classes of prompts the model does not tell apart."""
    return ModelError(
        "harmful and harmless prompts leave the same activations: there is no direction between them",
        remedy="Give prompts of two different kinds, and a position after the instruction",
    )


def _unit(vectors: Float64, scale: Float64) -> Float64:
    """Each vector made unit; zero where it is noise against `scale`."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    real = length > np.maximum(NOISE * scale, np.finfo(np.float64).tiny)
    return np.where(real, vectors / np.where(real, length, 1.0), 0.0)


def _without(rows: Float64, unit: Float64) -> Float64:
    return rows - np.outer(rows @ unit, unit)
