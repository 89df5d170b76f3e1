"""Ablation while the model runs: what is added to the residual stream, with a direction taken out of it.

Which modules those are is found by looking: on a probe, a layer's output must be its input plus what some of its
parts gave out (each times a constant). Equal to the plain edit of every writer; where a norm stands between writer and
stream, the norm's input loses what would come out along the direction, as the edit has it. Nothing is changed in the
weights. Does not know which direction is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.taps import decoder_layers, stream_of
from abliterated.pipeline.watch import Watch

# How much of a layer's change may stay unexplained: rounding of the sums in the model's own precision.
UNEXPLAINED: Final = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
MOST_PARTS: Final = 5


@dataclass(frozen=True)
class Contribution:
    """A module whose output is added to the stream; `gain` (hidden,) where it is a norm, and its input is meant."""

    module: torch.nn.Module
    gain: torch.Tensor | None = None


@dataclass(frozen=True)
class Contributions:
    """All of them, layer by layer."""

    layers: tuple[tuple[Contribution, ...], ...]


def find_contributions(loaded: Loaded, probe: tuple[int, ...], watch: Watch | None = None) -> Contributions:
    """Find them, by one pass of `probe`. ModelError where a layer's output can't be explained."""
    layers = decoder_layers(loaded.model)
    found = []
    seen_layers, gains = _observe(loaded, layers, probe, watch)
    for number, seen in enumerate(seen_layers):
        limit = UNEXPLAINED.get(loaded.model.dtype, 4e-2)
        parts = _explain(*seen, limit)
        if parts is None:
            raise ModelError(
                f"can't tell what layer {number} of a {loaded.source.architecture} model adds to the residual stream",
                remedy='Set direction.method = "layer", or give a direction file',
            )
        found.append(tuple(Contribution(part, gains.get(part)) for part in parts))
    return Contributions(tuple(found))


class Ablation:
    """While open, what is added to the stream loses its share along the directions.

    `vectors`: float32 with orthonormal rows, (rank, hidden) for all rows of the batch, or (rows, rank, hidden).
    """

    def __init__(self, contributions: Contributions, vectors: torch.Tensor) -> None:
        self.contributions, self.vectors = contributions, vectors
        self._hooks: list[Any] = []

    def __enter__(self) -> Ablation:
        for contribution in (part for layer in self.contributions.layers for part in layer):
            module, vectors = contribution.module, self.vectors
            if contribution.gain is None:
                self._hooks.append(module.register_forward_hook(_removing_from_output(vectors)))
            else:
                self._hooks.append(module.register_forward_pre_hook(_removing_from_input(vectors, contribution.gain)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _removing_from_output(vectors: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, __: Any, output: Any) -> Any:
        changed = _without(stream_of(output), vectors)
        return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

    return hook


def _removing_from_input(vectors: torch.Tensor, gain: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        return (_without(args[0], _through(vectors, gain.to(vectors.device))), *args[1:])

    return hook


def _without(stream: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The stream less its share along the directions, worked out in float32."""
    vectors, wide = vectors.to(stream.device), stream.float()
    if vectors.dim() == 3:
        wide = wide.reshape(vectors.shape[0], -1, stream.shape[-1])
        share = torch.einsum("bth,bkh->btk", wide, vectors)
        wide = wide - torch.einsum("btk,bkh->bth", share, vectors)
    else:
        wide = wide - (wide @ vectors.T) @ vectors
    return wide.reshape(stream.shape).to(stream.dtype)


def _through(vectors: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The directions a norm's input must lose for its output to lose `vectors`: v·(γ ⊙ o) = (γ ⊙ v)·o."""
    if vectors.shape[-2] == 1:
        return torch.nn.functional.normalize(vectors * gain, dim=-1)
    basis: torch.Tensor = torch.linalg.qr((vectors * gain).double().transpose(-1, -2))[0]
    return basis.transpose(-1, -2).float()


def _gain(module: torch.nn.Module, loaded: Loaded) -> torch.Tensor | None:
    """A norm's gain: what it makes of a stream of ones. None for everything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != (loaded.source.hidden_size,):
        return None
    gain: torch.Tensor = weight
    if not isinstance(module, torch.nn.LayerNorm):
        # One whose weights are elsewhere until it is called (accelerate) fetches them then.
        device = loaded.device if weight.is_meta else weight.device
        gain = module(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=device))
    elif weight.is_meta:
        zero = torch.zeros(1, 1, len(weight), dtype=weight.dtype, device=loaded.device)
        # A LayerNorm of ±1 gives ±gain + bias; of zeros, its bias.
        signs = torch.ones_like(zero)
        signs[..., 1::2] = -1
        gain = (module(signs) - module(zero)) * signs
    return gain.detach().flatten().float()


class Addition:
    """While open, each row's vector, (rows, hidden), is added to the stream behind its layer, (rows,)."""

    def __init__(self, layers: Sequence[torch.nn.Module], vectors: torch.Tensor, behind: torch.Tensor) -> None:
        self.layers, self.vectors, self.behind = layers, vectors, behind
        self._hooks: list[Any] = []

    def __enter__(self) -> Addition:
        for number, layer in enumerate(self.layers):
            here = self.behind == number
            if bool(here.any()):
                added = here.float()[:, None, None] * self.vectors[:, None, :]
                self._hooks.append(layer.register_forward_hook(_adding(added)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _adding(vectors: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, __: Any, output: Any) -> Any:
        stream = stream_of(output)
        changed = (stream.float() + vectors.to(stream.device)).to(stream.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

    return hook


_Seen = tuple[torch.Tensor, torch.Tensor, list[tuple[torch.nn.Module, torch.Tensor]]]


def _observe(
    loaded: Loaded, layers: Sequence[torch.nn.Module], probe: tuple[int, ...], watcher: Watch | None
) -> tuple[list[_Seen], dict[torch.nn.Module, torch.Tensor]]:
    """For each layer: its input, its output, and what each of its parts gave out, as rows of float64; and the gains
    of those parts that are norms, read while they have their weights."""
    gains: dict[torch.nn.Module, torch.Tensor] = {}
    probing = [False]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    parts: list[list[tuple[torch.nn.Module, torch.Tensor]]] = [[] for _ in layers]
    hooks: list[Any] = []

    def flat(stream: torch.Tensor) -> torch.Tensor:
        # The first token's stream dwarfs the others in many models, and would hide what is added to them.
        return stream.detach().reshape(len(probe), -1)[1:].double().cpu()

    def watch(number: int, layer: torch.nn.Module) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[number] = flat(args[0] if args else kwargs["hidden_states"])

        def after(_: Any, __: Any, output: Any) -> None:
            outputs[number] = flat(stream_of(output))

        def part(module: torch.nn.Module, _: Any, output: Any) -> None:
            if probing[0]:
                return
            stream = stream_of(output)
            if isinstance(stream, torch.Tensor) and stream.numel() == inputs[number].numel() * len(probe) // (
                len(probe) - 1
            ):
                parts[number].append((module, flat(stream)))
                probing[0] = True
                gain = _gain(module, loaded)
                probing[0] = False
                if gain is not None:
                    gains[module] = gain

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
        hooks.extend(child.register_forward_hook(part) for child in _parts(layer))

    for number, layer in enumerate(layers):
        watch(number, layer)
    try:
        tail_logits(loaded, [probe], 1, watcher)
    finally:
        for hook in hooks:
            hook.remove()
    return [(inputs[number], outputs[number], parts[number]) for number in range(len(layers))], gains


def _parts(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """What a layer is made of; a list of modules is no part, what stands in it is."""
    found: list[torch.nn.Module] = []
    for child in layer.children():
        found += list(child) if isinstance(child, torch.nn.ModuleList) else [child]
    return found


def _explain(
    before: torch.Tensor,
    after: torch.Tensor,
    parts: list[tuple[torch.nn.Module, torch.Tensor]],
    limit: float,
) -> tuple[torch.nn.Module, ...] | None:
    """The fewest parts of which, with the input, the output is a combination, and of those that give out the same (a
    dropout at rest gives out what it is given, and may be called for attention and MLP both) the first to be called;
    None where there are none such."""
    columns = torch.stack([before.flatten(), *[part.flatten() for _, part in parts]], dim=1)
    target = after.flatten()
    change = float((target - before.flatten()).norm())
    for size in range(1, MOST_PARTS + 1):
        fits = []
        for chosen in combinations(range(len(parts)), size):
            matrix = columns[:, [0, *[1 + part for part in chosen]]]
            solution = torch.linalg.lstsq(matrix, target[:, None]).solution
            fits.append((float((matrix @ solution - target[:, None]).norm()) / max(change, 1e-30), chosen))
        best = min(fits)[0] if fits else limit + 1.0
        if best <= limit:
            # Equal but for rounding, which falls out otherwise each time.
            first = next(chosen for error, chosen in fits if error <= best * 1.000001 + 1e-9)
            return tuple(parts[part][0] for part in first)
    return None
