"""The residual stream, read while the prompts go through: at the last positions, on either side of every layer.

Prompts run in batches of like length, padded on the right, where a causal model never looks; prefill only. What is
read is kept as float32 for one batch, and summed in float64. Does not know what the prompts say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from abliterate.contract.errors import ModelError
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.watch import Watch

Rows = Sequence[tuple[int, ...]]

# Tokens that go through the model at once: enough to keep two cores or a GPU busy, little enough to fit.
TOKENS_AT_ONCE: Final = {"cpu": 2048, "cuda": 16384, "mps": 4096}


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


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The model's layers, from the first to the last."""
    config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers:
            return list(module)
    raise ModelError(
        f"can't find the layers of a {model.config.model_type} model", remedy="Give a direction from a file"
    )


def batches(rows: Rows, device: torch.device, *, tokens: int = 0) -> list[list[int]]:
    """Row numbers in batches, the longest first: what fits at first fits to the end."""
    limit = tokens or TOKENS_AT_ONCE[device.type]
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    found: list[list[int]] = []
    for row in order:
        if found and (len(found[-1]) + 1) * len(rows[found[-1][0]]) <= limit:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def read_streams(
    loaded: Loaded, rows: Rows, positions: Sequence[int], convention: str, watch: Watch, message: str
) -> Iterator[Reading]:
    """Every batch's residual streams at these positions (-1: the last token), all layers. NaN or Inf: ModelError."""
    layers = decoder_layers(loaded.model)
    done = 0
    for batch in batches(rows, loaded.device):
        lengths = torch.tensor([len(rows[row]) for row in batch], device=loaded.device)
        places = (lengths[:, None] + torch.tensor(positions, device=loaded.device)[None, :]).clamp(min=0)
        with Tap(layers, places, convention) as tap:
            logits = next_logits(loaded, [rows[row] for row in batch])
        streams = tap.streams()
        check_finite(loaded, streams)
        yield Reading(batch, streams, torch.log_softmax(logits, dim=-1))
        done += len(batch)
        watch.step(done, len(rows), "prompts", message)


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


@torch.inference_mode()
def tail_logits(loaded: Loaded, rows: Rows, tail: int) -> torch.Tensor:
    """Each row's logits at its last `tail` positions, float32 (rows, tail, vocabulary); rows padded on the right."""
    device = loaded.device
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    places = lengths[:, None] + torch.arange(-tail, 0)[None, :]
    wanted, inverse = torch.unique(places, return_inverse=True)
    options: dict[str, Any] = {"use_cache": False}
    sparse = _takes(loaded.model, "logits_to_keep")
    if sparse:
        options["logits_to_keep"] = wanted.to(device)
    logits: torch.Tensor = loaded.model(input_ids=ids.to(device), **options).logits
    column = (inverse if sparse else places).to(device)
    return logits[torch.arange(len(rows), device=device)[:, None], column].float()


class Tap:
    """While open, keeps what passes before or after each layer, at each row's own places (rows, positions)."""

    def __init__(self, layers: Sequence[torch.nn.Module], places: torch.Tensor, convention: str) -> None:
        self.layers, self.places, self.convention = layers, places, convention
        self._kept: list[torch.Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Tap:
        for layer in self.layers:
            if self.convention == "input":
                self._hooks.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            else:
                self._hooks.append(layer.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def streams(self) -> torch.Tensor:
        """(rows, layers, positions, hidden) float32."""
        return torch.stack(self._kept, dim=1)

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self._keep(stream_of(output))

    def _keep(self, stream: torch.Tensor) -> None:
        places = self.places.to(stream.device)
        lines = torch.arange(stream.shape[0], device=stream.device)[:, None]
        self._kept.append(stream[lines, places].float().to(self.places.device))


def stream_of(output: Any) -> torch.Tensor:
    """The tensor a module gave out, be it alone or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
