"""Where held-out prompts of both classes lie along the direction, behind every layer: for the report's pictures.

One pass, prefill only. Does not know how the direction was found, nor how it is drawn.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from abliterate.contract.report import LayerSeparation
from abliterated.pipeline.activations import streams_alone
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.watch import Watch

# Of each class; more would not be seen in a picture.
MOST: Final = 48


def separation(
    loaded: Loaded, renderer: Renderer, prompts: PromptSets, found: RefusalDirection, watch: Watch
) -> tuple[LayerSeparation, ...]:
    """The projections of prompts that were not measured, layer by layer."""
    harmful = (*prompts.harmful.held_out, *prompts.harmful.validation)[:MOST]
    harmless = (*prompts.harmless.held_out, *prompts.harmless.validation)[:MOST]
    rows = renderer.all_tokens([*harmful, *harmless])
    layers, position = loaded.source.layers, found.origin.get("position", -1)
    place = position if isinstance(position, int) and position < 0 else -1
    place = max(place, -min(len(row) for row in rows))
    vectors = np.stack([found.for_layer(layer)[0] for layer in range(layers)]).astype(np.float64)
    seen = np.empty((len(rows), layers))
    convention = str(found.origin.get("convention", "output"))
    for numbers, streams in streams_alone(loaded, rows, (place,), (convention, layers), watch, "drawing the classes"):
        seen[numbers] = np.einsum("rlh,lh->rl", streams[:, :, 0].double().cpu().numpy(), vectors)
    layer = found.origin.get("layer")
    chosen = round(layer) if isinstance(layer, int | float) and math.isfinite(layer) else -1
    cut = len(harmful)
    return tuple(
        LayerSeparation(
            layer=number,
            harmful=_short(seen[:cut, number]),
            harmless=_short(seen[cut:, number]),
            apart=_apart(seen[:cut, number], seen[cut:, number]),
            chosen=number == chosen,
        )
        for number in range(layers)
    )


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """The means' distance in pooled standard deviations; at most 1000, which nobody tells from more."""
    spread = math.sqrt((float(one.var()) + float(other.var())) / 2)
    distance = float(one.mean() - other.mean())
    if spread * 1000 <= abs(distance):
        return math.copysign(1000.0, distance) if distance else 0.0
    return round(distance / spread, 3)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
