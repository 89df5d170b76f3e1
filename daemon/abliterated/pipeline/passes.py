"""A pass: rows of tokens go through the model once, and what is asked for is read on the way. Prefill only.

Rows run in batches of like length, padded on the right, where a causal model never looks. The tokens all rows begin
with run once, and their keys and values serve every row. A row may run under a change of the model (a direction
ablated, or added); then each change has its own beginning. The plan is pure; the model is either whole, and batches
follow one another, or streamed (`streamed.py`), and layers do. Does not know what rows say or what is measured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.taps import Tap, decoder_layers
from abliterated.pipeline.watch import PREFILLED, Watch

if TYPE_CHECKING:
    from abliterated.pipeline.loading import Loaded

Rows = Sequence[tuple[int, ...]]
Changing = Callable[[list[int]], AbstractContextManager[Any]]

# Tokens that go through the model at once: enough to keep the cores or a GPU busy; more only takes memory.
TOKENS_AT_ONCE: Final = {"cpu": 512, "cuda": 16384, "mps": 4096}
# A shorter common beginning is not worth a cache.
SHORTEST_PREFIX: Final = 4
SHARED_KINDS: Final = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Pass:
    """What goes through, and what is read.

    `tail`: logits at so many last positions of every row (0: none, and the pass ends behind layer `depth`).
    `positions`: streams at these (-1: the last token) of the first `depth` layers (0: all), on the side `convention`
    names. `variants`: the number of the change each row runs under; `changing` makes the model run under the changes
    of the rows of a batch.
    """

    rows: Rows
    tail: int = 1
    positions: tuple[int, ...] = ()
    convention: str = "output"
    depth: int = 0
    variants: tuple[int, ...] = ()
    changing: Changing | None = None

    @property
    def reach(self) -> int:
        """How far from a row's end anything is read."""
        return max(1, self.tail, -min(self.positions, default=-1))

    def variant(self, row: int) -> int:
        """The change a row runs under; 0 where there are none."""
        return self.variants[row] if self.variants else 0

    def under(self, variants: list[int]) -> AbstractContextManager[Any]:
        """The model as changed for rows of these variants, while open."""
        return self.changing(variants) if self.changing else contextlib.nullcontext()


@dataclass(frozen=True)
class Part:
    """One batch: which rows, their streams (rows, layers, positions, hidden) float32, their logits (rows, tail,
    vocabulary) float32; None where not asked for."""

    rows: list[int]
    streams: torch.Tensor | None
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """`shared`: how many tokens run once for all rows of a variant; `beginnings`: variants by batch; `batches`: row
    numbers, the longest first."""

    shared: int
    beginnings: list[list[int]]
    batches: list[list[int]]


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


def common_prefix(rows: Rows) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def plan(asked: Pass, device: torch.device, *, shareable: bool) -> Plan:
    """How the rows run."""
    kinds = sorted({asked.variant(row) for row in range(len(asked.rows))})
    shared = min(common_prefix(asked.rows), min(map(len, asked.rows)) - asked.reach)
    if not shareable or shared < SHORTEST_PREFIX or len(kinds) == len(asked.rows):
        shared = 0
    rest = [row[shared:] for row in asked.rows]
    together = max(1, TOKENS_AT_ONCE[device.type] // max(1, shared))
    beginnings = [kinds[at : at + together] for at in range(0, len(kinds), together)] if shared else []
    return Plan(shared, beginnings, batches(rest, device))


def shareable(model: Any, longest: int) -> bool:
    """Whether rows so long may share a beginning: nothing but attention looks back, and it looks all the way."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) or longest
    known = set(kinds) <= SHARED_KINDS and getattr(model, "_is_stateful", False) is False
    return known and window >= longest and config.model_type not in UNSHARED


# Families whose layers keep more than keys and values, or share them among each other.
UNSHARED: Final = frozenset(
    {"bamba", "bloom", "falcon_h1", "falcon_mamba", "gemma3n_text", "gemma4_text", "jamba", "longcat_flash", "mamba",
     "mamba2", "mpt", "nemotron_h", "recurrent_gemma", "rwkv", "zamba", "zamba2"}
)  # fmt: skip


def run_pass(
    loaded: Loaded, asked: Pass, watch: Watch, message: str = "", done: tuple[int, int] = (0, 0)
) -> Iterator[Part]:
    """Every batch, as it is ready. `done`: rows behind and altogether, where the pass is a part of the work."""
    if not asked.rows:
        return
    longest = max(map(len, asked.rows))
    planned = plan(asked, loaded.device, shareable=shareable(loaded.model, longest))
    begun = planned.shared * (sum(map(len, planned.beginnings)) - len(asked.rows))
    watch.count(PREFILLED, sum(map(len, asked.rows)) + begun)
    total = done[1] or len(asked.rows)
    if loaded.engine is not None:
        for part in loaded.engine.run(asked, planned, watch, (done[0], total, message)):
            _checked(loaded, part)
            yield part
        return
    finished = done[0]
    for part in _whole(loaded, asked, planned, watch):
        _checked(loaded, part)
        finished += len(part.rows)
        if message:
            watch.step(finished, total, "prompts", message)
        yield part


def _checked(loaded: Loaded, part: Part) -> None:
    # Whoever reads the streams sees in which layer it began.
    if part.streams is None:
        check_logits(loaded.source.name, part.logits)


def check_logits(name: str, logits: torch.Tensor | None) -> None:
    """ModelError where the model called `name` computes what is no number: its answers would look like answers."""
    if logits is not None and bool(torch.isnan(logits).any()):
        raise ModelError(
            f"{name} computes NaN",
            remedy='Set run.dtype = "float32"; if it stays, the weights are broken: download or pull the model again',
        )


def padded(rows: Rows, device: torch.device) -> torch.Tensor:
    """Token ids (rows, longest), zeros behind a row's end."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
    return ids.to(device)


def places(lengths: Sequence[int], positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the positions (-1: the last) lie in rows so long: (rows, positions)."""
    ends = torch.tensor(lengths, device=device)[:, None]
    return (ends + torch.tensor(positions, device=device)[None, :]).clamp(min=0)


def tap(asked: Pass, layers: Sequence[torch.nn.Module], lengths: Sequence[int], device: torch.device) -> Tap | None:
    """What reads the streams the pass asks for."""
    if not asked.positions:
        return None
    depth = asked.depth or len(layers)
    return Tap(layers[:depth], places(lengths, asked.positions, device), asked.convention)


def cache_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache of transformers that holds these keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


class _Stop(Exception):
    """What was asked for is read."""


def _whole(loaded: Loaded, asked: Pass, planned: Plan, watch: Watch) -> Iterator[Part]:
    """The batches one after another, each through the whole model."""
    model, device, layers = loaded.model, loaded.device, decoder_layers(loaded.model)
    line: dict[int, int] = {}
    begun: list[Any] = []
    for kinds in planned.beginnings:
        watch.check()
        line |= {kind: len(line) + number for number, kind in enumerate(kinds)}
        ids = padded([asked.rows[0][: planned.shared]] * len(kinds), device)
        with asked.under(kinds):
            _, cache = _read(model, layers, ids, asked, caching=True)
        begun.append([(layer.keys, layer.values) for layer in cache.layers])
    together = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in zip(*begun, strict=True)]
    for batch in planned.batches:
        watch.check()
        rows = [asked.rows[row][planned.shared :] for row in batch]
        lengths = [len(row) for row in rows]
        kinds = [asked.variant(row) for row in batch]
        cache = None
        if together:
            lines = torch.tensor([line[kind] for kind in kinds])
            # A model spread over several devices has each layer's keys where the layer is.
            cache = cache_of([(keys[at], values[at]) for keys, values in together for at in (lines.to(keys.device),)])
        listening = tap(asked, layers, lengths, device)
        with asked.under(kinds), listening or contextlib.nullcontext():
            logits, _ = _read(model, layers, padded(rows, device), asked, cache=cache, lengths=lengths)
        yield Part(batch, listening.streams() if listening else None, logits)


def forward(
    model: Any,
    layers: Sequence[torch.nn.Module],
    ids: torch.Tensor,
    asked: Pass,
    *,
    caching: bool = False,
    cache: Any = None,
    lengths: Sequence[int] = (),
) -> tuple[torch.Tensor | None, Any]:
    """Logits at the tails (rows, tail, vocabulary) float32, and the cache; with gradients where they are on."""
    options: dict[str, Any] = {"use_cache": caching or cache is not None}
    if caching:
        cache = cache_of([])
    if cache is not None:
        options["past_key_values"] = cache
    if caching or not asked.tail:
        depth = asked.depth if asked.depth and not asked.tail else len(layers)
        hook = layers[depth - 1].register_forward_hook(_stop)
        try:
            model(input_ids=ids, **options)
        except _Stop:
            return None, cache
        finally:
            hook.remove()
    wanted, inverse = torch.unique(places(lengths, range(-asked.tail, 0), ids.device), return_inverse=True)
    sparse = "logits_to_keep" in inspect.signature(model.forward).parameters
    if sparse:
        options["logits_to_keep"] = wanted
    logits: torch.Tensor = model(input_ids=ids, **options).logits
    column = inverse if sparse else wanted[inverse]
    return logits[torch.arange(len(ids), device=ids.device)[:, None], column].float(), cache


def _stop(*_: Any) -> None:
    raise _Stop


_read = torch.inference_mode()(forward)
