"""A pass layer by layer: all batches go through layer 0, then through layer 1, …; every weight is read once.

One device holds one layer at a time, beside the streams, and so a model of any size is measured wherever its largest
layer fits. Decoding works the same way, one trip through the layers for each token of all answers together. Does not
know where weights come from, or what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from abliterated.pipeline.passes import Part, Pass, Plan, cache_of, check_logits, padded, places, tap
from abliterated.pipeline.room import free_memory, give_back, keep_what_is_let_go, state_limit
from abliterated.pipeline.skeleton import Call, Skeleton
from abliterated.pipeline.taps import Tap, stream_of
from abliterated.pipeline.watch import Watch

# Positions that go through the head at once.
HEAD_AT_ONCE: Final = 256

Rows = Sequence[tuple[int, ...]]


@dataclass
class _Batch:
    """Rows on their way through the layers. `kinds`: the variant of each; `lengths`: without the shared beginning."""

    rows: list[int]
    kinds: list[int]
    lengths: list[int]
    stream: torch.Tensor
    calls: list[Call]
    cache: Any = None
    listening: Tap | None = None
    lines: torch.Tensor | None = None  # of each row's beginning, where there is one


@dataclass
class Engine:
    """The skeleton, and how much may go through it together (bytes; 0: as the free memory has it)."""

    skeleton: Skeleton
    limit: int = 0
    layers_read: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        keep_what_is_let_go()

    def run(self, asked: Pass, planned: Plan, watch: Watch, place: tuple[int, int, str]) -> Iterator[Part]:
        """Every batch, once all that go together have gone through."""
        done, total, message = place
        width, item = self.skeleton.source.hidden_size, self.skeleton.dtype.itemsize
        kept = len(asked.positions) * (asked.depth or len(self.skeleton.layers)) * width * 4
        sizes = [
            len(batch) * ((max(len(asked.rows[row]) for row in batch) - planned.shared) * width * item + kept)
            for batch in planned.batches
        ]
        for wave in waves(sizes, self.limit or state_limit(free_memory(self.skeleton.device))):
            going = [planned.batches[number] for number in wave]
            count = sum(len(batch) for batch in going)
            yield from self._wave(asked, planned, going, watch, (done, count, total, message))
            done += count

    @torch.inference_mode()
    def _wave(
        self,
        asked: Pass,
        planned: Plan,
        wave: list[list[int]],
        watch: Watch,
        place: tuple[int, int, int, str],
    ) -> Iterator[Part]:
        skeleton = self.skeleton
        depth = len(skeleton.layers) if asked.tail or not asked.depth else asked.depth
        skeleton.fill_outside([token for row in asked.rows for token in row])
        beginnings = [self._beginning(asked, planned.shared, kinds, depth) for kinds in planned.beginnings]
        line = {kind: number for number, kind in enumerate(kind for batch in beginnings for kind in batch.kinds)}
        going = [self._batch(asked, planned.shared, rows, line, depth) for rows in wave]
        steps, taken = depth * (len(beginnings) + len(going)), 0
        done, count, total, message = place
        for number in range(depth):
            with self._filled(number, watch):
                for batch in (*beginnings, *going):
                    watch.check()
                    if batch.lines is not None:
                        self._lend(batch, beginnings, number)
                    self._through(asked, batch, number)
                    if batch.lines is not None:
                        _forget(batch.cache, number, planned.shared)
                    give_back()  # what is let go lies scattered, and adds up batch by batch
                    taken += 1
                    if message:
                        watch.step(done + count * taken / steps, total, "prompts", message)
                for batch in beginnings:
                    _forget(batch.cache, number, 0)
        yield from self._parts(asked, going, watch)

    @contextlib.contextmanager
    def _filled(self, number: int, watch: Watch) -> Iterator[None]:
        """While open, the layer has its weights."""
        watch.check()
        try:
            self.skeleton.fill(number)
            self.layers_read += 1
            yield
        finally:
            self.skeleton.empty(number)
            give_back()

    def _through(self, asked: Pass, batch: _Batch, number: int) -> None:
        layer, call = self.skeleton.layers[number], batch.calls[number]
        with asked.under(batch.kinds), batch.listening or contextlib.nullcontext():
            # In its old place: what stays would otherwise lie scattered among what goes, and hold it there.
            batch.stream.copy_(stream_of(layer(batch.stream, *call.args, **call.options)))
        # What it was called with is not needed again, and masks are large.
        batch.calls[number] = Call((), {})

    def _beginning(self, asked: Pass, shared: int, kinds: list[int], depth: int) -> _Batch:
        ids = padded([asked.rows[0][:shared]] * len(kinds), self.skeleton.device)
        cache = cache_of([])
        stream, calls = self.skeleton.unroll(ids, depth, past_key_values=cache, use_cache=True)
        return _Batch([], kinds, [shared] * len(kinds), stream.clone(), calls, cache)

    def _batch(self, asked: Pass, shared: int, rows: list[int], line: dict[int, int], depth: int) -> _Batch:
        skeleton = self.skeleton
        tokens = [asked.rows[row][shared:] for row in rows]
        lengths, kinds = [len(row) for row in tokens], [asked.variant(row) for row in rows]
        ids = padded(tokens, skeleton.device)
        cache, lines = None, None
        options: dict[str, Any] = {"use_cache": False}
        if line:
            cache = cache_of([_nothing(shared, skeleton) for _ in skeleton.layers])
            lines = torch.tensor([line[kind] for kind in kinds], device=skeleton.device)
            options = {"past_key_values": cache, "use_cache": True}
        stream, calls = skeleton.unroll(ids, depth, **options)
        listening = tap(asked, skeleton.layers, lengths, skeleton.device)
        return _Batch(rows, kinds, lengths, stream.clone(), calls, cache, listening, lines)

    def _lend(self, batch: _Batch, beginnings: Sequence[_Batch], number: int) -> None:
        """Give a batch its beginnings' keys and values in this layer."""
        for name in ("keys", "values"):
            every = torch.cat([getattr(one.cache.layers[number], name) for one in beginnings])
            setattr(batch.cache.layers[number], name, every[batch.lines])

    def _parts(self, asked: Pass, going: list[_Batch], watch: Watch) -> Iterator[Part]:
        """What is read at the end, batch by batch: logits are large."""
        tails = range(-asked.tail, 0)
        with self._headed() if asked.tail else contextlib.nullcontext():
            for batch in going:
                watch.check()
                logits = None
                if asked.tail:
                    at = places(batch.lengths, tails, self.skeleton.device)
                    lines = torch.arange(len(batch.rows), device=self.skeleton.device)[:, None]
                    logits = self._head(batch.stream[lines, at])
                yield Part(batch.rows, batch.listening.streams() if batch.listening else None, logits)

    @contextlib.contextmanager
    def _headed(self) -> Iterator[None]:
        """While open, the head has its weights."""
        try:
            self.skeleton.fill_head()
            yield
        finally:
            self.skeleton.empty_head()

    def _head(self, streams: torch.Tensor) -> torch.Tensor:
        """Logits (rows, tail, vocabulary) float32 of streams (rows, tail, hidden)."""
        flat = streams.reshape(-1, streams.shape[-1])
        parts = [self.skeleton.finish(flat[at : at + HEAD_AT_ONCE]) for at in range(0, len(flat), HEAD_AT_ONCE)]
        return torch.cat(parts).reshape(*streams.shape[:2], -1).float()

    @torch.inference_mode()
    def decode(
        self, rows: Rows, tokens: int, stops: frozenset[int], watch: Watch, message: str
    ) -> list[tuple[int, ...]]:
        """Each row's greedy continuation, at most `tokens` long and within the context, without what ends it."""
        skeleton, context = self.skeleton, self.skeleton.source.context
        groups = [_Answers(batch, [rows[row] for row in batch], skeleton) for batch in _alike(rows)]
        steps = tokens * len(skeleton.layers)
        for step in range(tokens):
            going = [group for group in groups if not group.ended and group.length + step < context]
            if not going:
                break
            skeleton.fill_outside([token for group in going for token in group.ids.flatten().tolist()])
            for group in going:
                group.stream, group.calls = skeleton.unroll(
                    group.ids, len(skeleton.layers), past_key_values=group.cache, use_cache=True
                )
            for number, layer in enumerate(skeleton.layers):
                with self._filled(number, watch):
                    for group in going:
                        call = group.calls[number]
                        group.stream = stream_of(layer(group.stream, *call.args, **call.options))
                share = (step * len(skeleton.layers) + number + 1) / steps
                watch.step(len(rows) * share, len(rows), "answers", message)
            with self._headed():
                for group in going:
                    logits = self._head(group.stream[:, -1:])[:, 0]
                    check_logits(skeleton.source.name, logits)
                    group.take(logits.argmax(-1), stops)
        answers: list[tuple[int, ...]] = [()] * len(rows)
        for group in groups:
            for row, answer in zip(group.rows, group.answers, strict=True):
                answers[row] = tuple(answer)
        return answers


class _Answers:
    """Rows of one length, answered together."""

    def __init__(self, rows: list[int], tokens: Rows, skeleton: Skeleton) -> None:
        from transformers import DynamicCache

        self.rows, self.length = rows, len(tokens[0])
        self.ids = padded(tokens, skeleton.device)
        self.cache = DynamicCache(config=skeleton.model.config)
        self.answers: list[list[int]] = [[] for _ in rows]
        self.stream = torch.empty(0)
        self.calls: list[Call] = []
        self._open = [True] * len(rows)

    @property
    def ended(self) -> bool:
        """Whether every answer has come to its end."""
        return not any(self._open)

    def take(self, chosen: torch.Tensor, stops: frozenset[int]) -> None:
        """Each row's next token."""
        for number, token in enumerate(chosen.tolist()):
            self._open[number] = self._open[number] and token not in stops
            if self._open[number]:
                self.answers[number].append(token)
        self.ids = chosen[:, None]


def _alike(rows: Rows) -> list[list[int]]:
    """Row numbers by length."""
    found: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(len(row), []).append(number)
    return list(found.values())


def waves(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of what may go together, in order: each group within `limit`, or alone."""
    found: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(number)
        room -= size
    return found


def _nothing(shared: int, skeleton: Skeleton) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a beginning so long, in a cache that is asked for nothing but its length."""
    empty = torch.zeros((1, 1, shared, 1), dtype=skeleton.dtype, device=skeleton.device)
    return empty, empty


def _forget(cache: Any, number: int, shared: int) -> None:
    """Let one layer's keys and values go; what stays is their length."""
    layer = cache.layers[number]
    for name in ("keys", "values"):
        setattr(layer, name, getattr(layer, name)[:1, :1, :shared, :1].clone())
