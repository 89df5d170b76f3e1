"""Greedy answers, many at once, with the model's cache; each ends where the model ends it.

Prompts are padded on the left. A streamed model answers through its engine, which reads the weights once for each
token of all answers. Does not know what an answer means.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch

from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.passes import Rows, batches, check_logits
from abliterated.pipeline.watch import DECODED, Watch

# Positions a batch may hold in its cache, prompts and answers together.
CACHED: Final = {"cpu": 16384, "cuda": 65536, "mps": 16384}


def greedy(loaded: Loaded, rows: Rows, tokens: int, watch: Watch, message: str) -> list[tuple[int, ...]]:
    """Each row's greedy continuation, at most `tokens` long, without the token that ends it."""
    if loaded.engine is not None:
        found = loaded.engine.decode(rows, tokens, loaded.stop_tokens, watch, message)
        watch.count(DECODED, sum(min(len(answer) + 1, tokens) for answer in found))
        return found
    answers: list[tuple[int, ...]] = [()] * len(rows)
    longest = max((len(row) for row in rows), default=0)
    together = max(1, CACHED[loaded.device.type] // (longest + tokens))
    done = 0
    for batch in batches(rows, loaded.device, tokens=together * longest):
        room = min(tokens, loaded.source.context - max(len(rows[row]) for row in batch))
        found = _continue(loaded, [rows[row] for row in batch], room, watch, (done, len(rows), message))
        for row, answer in zip(batch, found, strict=True):
            answers[row] = answer
        done += len(batch)
        watch.step(done, len(rows), "answers", message)
    watch.count(DECODED, sum(min(len(answer) + 1, tokens) for answer in answers))  # what ends an answer is decoded too
    return answers


@torch.inference_mode()
def _continue(
    loaded: Loaded, rows: Rows, tokens: int, watch: Watch, place: tuple[int, int, str]
) -> list[tuple[int, ...]]:
    device = loaded.device
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, longest - len(row) :] = torch.tensor(row)
        mask[line, longest - len(row) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(sorted(loaded.stop_tokens), device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    accepted = inspect.signature(loaded.model.forward).parameters
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    chosen: list[torch.Tensor] = []
    cache = None
    for step in range(tokens):
        where = {"position_ids": places} if "position_ids" in accepted else {}
        output = loaded.model(input_ids=ids, attention_mask=mask, past_key_values=cache, **where, **options)
        cache = output.past_key_values
        check_logits(loaded.source.name, output.logits[:, -1:])
        ids = output.logits[:, -1:].float().argmax(-1)
        ended |= torch.isin(ids[:, 0], stops)
        chosen.append(torch.where(ended, -1, ids[:, 0]))
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
        places = places[:, -1:] + 1
        share = len(rows) * (step + 1) / tokens
        watch.step(place[0] + share, place[1], "answers", place[2])
    columns = torch.stack(chosen, dim=1).tolist()
    return [tuple(token for token in line if token >= 0) for line in columns]
