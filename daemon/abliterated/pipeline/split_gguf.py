"""A GGUF in several files, NAME-00001-of-0000N.gguf, as if it were one: the parts' bytes counted through from the first
part's to the last part's.

The first part holds the model's key-values; every part has its own tensors and three `split.*` keys. Does not know
what is done with the tensors.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Final, Self

from gguf import GGMLQuantizationType as Type

from abliterated.pipeline import gguf_header
from abliterated.pipeline.gguf_file import GgufFile, Tensor, padded, read_gguf, split_parts
from abliterated.pipeline.safe_write import Bytes, Output, Room, Source, need_space

SPLIT_KEYS: Final = frozenset({"split.no", "split.count", "split.tensors.count"})


@dataclass(frozen=True)
class Model:
    """A model's files: `whole` has the tensors of all `parts`; every tensor's `start` is counted through from the first
    part's first byte, and `starts` says where each part begins. Key-values stand at their places in their own part."""

    whole: GgufFile
    parts: tuple[GgufFile, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def is_split(self) -> bool:
        return len(self.parts) > 1


def read_model(path: Path) -> Model:
    """The model that `path` is, or is the first part of. ModelError where a part is missing or another model's."""
    first = read_gguf(path)
    paths = split_parts(path, first)
    if len(paths) == 1:
        return Model(first, (first,))
    parts = (first, *map(read_gguf, paths[1:]))
    for number, part in enumerate(parts):
        if part.values.get("split.no") != number or part.values.get("split.count") != len(parts):
            raise part.broken(f"is not part {number + 1} of {len(parts)}", "Put the parts of one model into one folder")
    starts = tuple(accumulate((part.size for part in parts[:-1]), initial=0))
    parts = tuple(
        replace(part, tensors=tuple(replace(tensor, start=start + tensor.start) for tensor in part.tensors))
        for start, part in zip(starts, parts, strict=True)
    )
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise first.broken("and its other parts hold two tensors of one name")
    promised = first.values.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise first.broken(f"promises {promised} tensors, and its parts hold {len(tensors)}")
    keys = tuple(entry for entry in first.key_values if entry.key not in SPLIT_KEYS)
    whole = replace(first, key_values=keys, tensors=tensors, size=sum(part.size for part in parts))
    return Model(whole, parts, starts)


def part_paths(target: Path, count: int) -> tuple[Path, ...]:
    """The names a model of `count` parts gets that would be called `target` in one."""
    return tuple(target.with_name(f"{target.stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1))


class SplitSource(Source):
    """All parts to read from, by positions counted through."""

    def __init__(self, model: Model, cancelled: Callable[[], bool]) -> None:
        self._sources = [Source(part.path, cancelled) for part in model.parts]
        self._starts = model.starts

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for source in self._sources:
                stack.enter_context(source)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def array(self, start: int, size: int, room: Room | None = None) -> Bytes:
        """Bytes from `start`, all of them in one part, as an array of one's own."""
        part = bisect.bisect_right(self._starts, start) - 1
        return self._sources[part].array(start - self._starts[part], size, room)

    def copy(self, start: int, size: int, output: Output, at: int) -> Iterator[int]:
        """The same, copied to a place in `output`; yields how many bytes, in pieces."""
        part = bisect.bisect_right(self._starts, start) - 1
        yield from self._sources[part].copy(start - self._starts[part], size, output, at)


@contextmanager
def all_outputs(targets: Sequence[Path]) -> Iterator[list[Output]]:
    """Files being written that appear together, the first part last, or none of them."""
    written: list[Output] = []
    fresh = [target for target in targets if not target.exists()]
    try:
        with ExitStack() as stack:
            written += [stack.enter_context(Output(target)) for target in targets]
            yield written
    except BaseException:
        for target in fresh:
            target.unlink(missing_ok=True)
        raise


def merge(model: Model, target: Path, *, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> None:
    """Write the parts as one file, every tensor byte for byte. Raises ModelError, DiskError, Cancelled."""
    total, done = sum(tensor.size for tensor in model.whole.tensors), 0
    with SplitSource(model, cancelled) as stored:
        front, placed, size = _front(model, stored)
        need_space(target, size)
        with Output(target) as output:
            output.write(front)
            for tensor, _, place in placed:
                for count in stored.copy(tensor.start, tensor.size, output, len(front) + place):
                    done += count
                    progress(done, total)
            output.seek(size)
            output.truncate()


def outline(model: Model, target: Path) -> None:
    """The merged file without its numbers: a header like `merge`'s, and holes that take no room on the disk."""
    with SplitSource(model, lambda: False) as stored, Output(target) as output:
        front, _, size = _front(model, stored)
        output.write(front)
        output.seek(size)
        output.truncate()


def _front(model: Model, stored: Source) -> tuple[bytes, list[tuple[Tensor, Type, int]], int]:
    """Header, places behind it and size of the merged file."""
    whole, offset = model.whole, 0
    placed: list[tuple[Tensor, Type, int]] = []
    for tensor in whole.tensors:
        placed.append((tensor, tensor.type, offset))
        offset = padded(offset + tensor.size, whole.alignment)
    front = gguf_header.header(whole, {}, stored.array(0, whole.data_start).tobytes(), placed, edited=False)
    return front, placed, len(front) + offset
