"""A conversation with a model in this process, with a direction taken out while it runs and no weight touched.

What is added to the residual stream loses its share along the direction, as the plain edit of every writer would have
it; with directions by layer, each layer its own. Greedy, a token at a time. Does not know terminals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Run
from abliterated.pipeline.contributions import Ablation, Contributions, find_contributions
from abliterated.pipeline.direction_files import read_direction
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.loading import Loaded, load
from abliterated.pipeline.passes import check_logits
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

_PROBE = "How far is the sea?"


class Talker:
    """One model in memory, and the direction it speaks without; `direction` None: as it is."""

    def __init__(self, source: Source, run: Run, direction: Path | None, watch: Watch) -> None:
        found = read_direction(direction, source.hidden_size, source.layers) if direction else None
        self._loaded: Loaded = load(source, run, watch)
        if self._loaded.engine is not None:
            raise ModelError(
                f"{source.name} is too large for this machine's memory to talk to it here",
                remedy="Edit it with `abliterated apply`, and let Ollama serve the result",
            )
        self._renderer = renderer(self._loaded.tokenizer, source.context)
        self._ablations: list[Ablation] = []
        if found is not None:
            contributions = find_contributions(self._loaded, self._renderer.tokens(_PROBE), watch)
            self._ablations = _ablations(contributions, found)

    def answer(self, messages: Sequence[Mapping[str, str]], tokens: int) -> Iterator[str]:
        """The answer to a conversation, piece by piece, at most `tokens` long. ModelError where it is too long."""
        prompt = self._renderer.conversation(messages)
        room = min(tokens, self._loaded.source.context - len(prompt))
        chosen: list[int] = []
        told = ""
        cache = None
        ids = list(prompt)
        with ExitStack() as stack:
            for ablation in self._ablations:
                stack.enter_context(ablation)
            for _ in range(room):
                token, cache = self._step(ids, cache)
                if token in self._loaded.stop_tokens:
                    break
                chosen.append(token)
                ids = [token]
                text: str = self._loaded.tokenizer.decode(chosen, skip_special_tokens=True)
                # Half a character is told with its other half.
                if not text.endswith("\ufffd") and len(text) > len(told):
                    yield text[len(told) :]
                    told = text

    @torch.inference_mode()
    def _step(self, ids: list[int], cache: object) -> tuple[int, object]:
        fresh = torch.tensor([ids], dtype=torch.long, device=self._loaded.device)
        output = self._loaded.model(input_ids=fresh, past_key_values=cache, use_cache=True)
        last = output.logits[:, -1:]
        check_logits(self._loaded.source.name, last)
        return int(last[0, 0].float().argmax()), output.past_key_values


def _ablations(contributions: Contributions, found: RefusalDirection) -> list[Ablation]:
    if not found.per_layer:
        return [Ablation(contributions, torch.from_numpy(found.for_layer(0).copy()))]
    return [
        Ablation(Contributions((parts,)), torch.from_numpy(found.for_layer(layer).copy()))
        for layer, parts in enumerate(contributions.layers)
    ]
