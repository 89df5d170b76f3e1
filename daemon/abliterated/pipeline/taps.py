"""Looking into a running model: its layers, and what passes before or after each of them.

Does not know prompts, batches or how the model came into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.checkpoint_writers import depth_keys

# Parts of a model that read no text.
NO_TEXT: Final = ("vision", "visual", "audio", "multi_modal_projector", "mtp.")


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The model's layers, from the first to the last."""
    return list(layer_list(model)[1])


def layer_list(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The list the layers stand in, and its name."""
    config = model.config.get_text_config()
    depth = next((getattr(config, key) for key in depth_keys(config.model_type) if hasattr(config, key)), 0)
    for name, module in model.named_modules():
        beside = any(part in name for part in NO_TEXT)
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and not beside:
            return name, module
    raise ModelError(
        f"can't find the layers of a {model.config.model_type} model", remedy="Give a direction from a file"
    )


class Tap:
    """While open, keeps what passes before or after each layer, at each row's own places (rows, positions).

    May be closed and opened again in the middle: streams keep the order in which they came.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], places: torch.Tensor, convention: str) -> None:
        self.layers, self.places, self.convention = layers, places, convention
        self._kept: torch.Tensor | None = None  # all of it at once: pieces would lie scattered among what is let go
        self._taken = 0
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
        self._hooks.clear()

    def streams(self) -> torch.Tensor:
        """(rows, layers, positions, hidden) float32."""
        assert self._kept is not None and self._taken == len(self.layers)
        return self._kept

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self._keep(stream_of(output))

    def _keep(self, stream: torch.Tensor) -> None:
        places = self.places.to(stream.device)
        lines = torch.arange(stream.shape[0], device=stream.device)[:, None]
        found = stream[lines, places].float().to(self.places.device)
        if self._kept is None:
            shape = (len(found), len(self.layers), *found.shape[1:])
            self._kept = torch.empty(shape, dtype=torch.float32, device=found.device)
        self._kept[:, self._taken] = found
        self._taken += 1


def stream_of(output: Any) -> torch.Tensor:
    """The tensor a module gave out, be it alone or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return found
