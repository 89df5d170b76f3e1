"""The residual stream, read while the prompts go through: at the last positions, on either side of every layer.

What is read is kept as float32 for one batch, and summed in float64. Does not know what the prompts say, or how a
pass goes through the model (`passes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.passes import Pass, Rows, batches, check_logits, run_pass
from abliterated.pipeline.watch import Watch

__all__ = [
    "Means",
    "Reading",
    "Rows",
    "batches",
    "check_finite",
    "next_logits",
    "read_streams",
    "streams_alone",
    "sum_streams",
    "tail_logits",
]


@dataclass(frozen=True)
class Reading:
    """One batch: which rows, their residual streams (rows, layers, positions, hidden), their next-token log
    probabilities (rows, vocabulary)."""

    rows: list[int]
    streams: torch.Tensor
    next_token: torch.Tensor


@dataclass(frozen=True)
class Means:
    """Mean residual streams, float64 of (layers, positions, hidden), over `count` prompts."""

    mean: NDArray[np.float64]
    count: int


def read_streams(
    loaded: Loaded,
    rows: Rows,
    positions: Sequence[int],
    convention: str,
    watch: Watch,
    message: str,
    *,
    depth: int = 0,
) -> Iterator[Reading]:
    """Every batch's residual streams at these positions (-1: the last token), in the first `depth` layers (0: all).

    NaN or Inf: ModelError.
    """
    asked = Pass(rows, tail=1, positions=tuple(positions), convention=convention, depth=depth)
    for part in run_pass(loaded, asked, watch, message):
        assert part.streams is not None and part.logits is not None
        check_finite(loaded, part.streams)
        check_logits(loaded.source.name, part.logits)
        yield Reading(part.rows, part.streams, torch.log_softmax(part.logits[:, 0], dim=-1))


def streams_alone(
    loaded: Loaded, rows: Rows, positions: Sequence[int], place: tuple[str, int], watch: Watch, message: str
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows and their streams in the first layers, `place` = (convention, depth); what lies behind is not computed."""
    asked = Pass(rows, tail=0, positions=tuple(positions), convention=place[0], depth=place[1])
    for part in run_pass(loaded, asked, watch, message):
        assert part.streams is not None
        check_finite(loaded, part.streams)
        yield part.rows, part.streams


def sum_streams(total: NDArray[np.float64] | None, streams: torch.Tensor) -> NDArray[np.float64]:
    """Add the rows' streams (rows, layers, positions, hidden) to a float64 total."""
    added: NDArray[np.float64] = streams.cpu().double().sum(0).numpy()
    return added if total is None else total + added


def check_finite(loaded: Loaded, streams: torch.Tensor) -> None:
    """ModelError naming the first layer whose stream holds NaN or Inf."""
    finite = torch.isfinite(streams).all(dim=3).all(dim=2).all(dim=0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0])
        raise ModelError(
            f"{loaded.source.name} computes NaN or Inf in layer {layer}",
            remedy='Set run.dtype = "float32"; if it stays, the weights are broken',
        )


def next_logits(loaded: Loaded, rows: Rows) -> torch.Tensor:
    """Each row's logits for the token that would follow it, float32 (rows, vocabulary)."""
    return tail_logits(loaded, rows, 1)[:, 0]


def tail_logits(loaded: Loaded, rows: Rows, tail: int, watch: Watch | None = None) -> torch.Tensor:
    """Each row's logits at its last `tail` positions, float32 (rows, tail, vocabulary)."""
    found: list[tuple[list[int], torch.Tensor]] = []
    for part in run_pass(loaded, Pass(rows, tail=tail), watch or Watch()):
        assert part.logits is not None
        found.append((part.rows, part.logits))
    order = torch.tensor([row for numbers, _ in found for row in numbers]).argsort()
    return torch.cat([logits for _, logits in found])[order]
