"""Edits a folder of safetensors into another: shard by shard, tensor by tensor, everything else copied as it is.

Shapes and dtypes stay, so every shard's header and the index stay byte for byte. The folder appears under its name
when all of it is on the disk. Does not know how a direction was found, and writes no GGUF.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from abliterate.contract.errors import ConflictError, DiskError
from abliterate.contract.recipe import Edit
from abliterated.files import sync_folder
from abliterated.pipeline.checkpoint_writers import Checkpoint, checkpoint_census
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.edit import Float32
from abliterated.pipeline.edit_report import EditReport, TensorEdit
from abliterated.pipeline.quantize import dequantize
from abliterated.pipeline.safe_write import Output, Source, check, need_space
from abliterated.pipeline.safetensors_file import Shard, Stored, read_config, read_shards
from abliterated.pipeline.streamed_edit import StreamedEdit, check_direction, make_plan
from abliterated.pipeline.write_behind import Digest

# The same weights in other formats: unedited, they would contradict the edited ones.
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ggml")


def edit_checkpoint(
    folder: Path,
    target: Path,
    direction: RefusalDirection,
    edit: Edit,
    *,
    allow_partial: bool,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> EditReport:
    """Write the folder `target`, the model of `folder` with its writers edited. Progress is in bytes of the shards.

    Raises ModelError, DiskError, ConflictError (the target is there already), Cancelled; then nothing is left of it.
    """
    config, shards = read_config(folder), read_shards(folder)
    stored = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    homes = {tensor.name: shard.path for shard in shards for tensor in shard.tensors}
    found = checkpoint_census(
        config,
        {name: tensor.shape for name, tensor in stored.items()},
        embeddings=edit.embeddings,
        post_norm=edit.post_norm,
        allow_partial=allow_partial,
    )
    check_direction(folder.name, found.width, found.layers, direction)
    plan = make_plan(folder.name, found.width, found.layers, found.census, direction, edit)
    chosen = plan.chosen()
    for name in chosen:
        stored[name].tensor()  # a type that can't be edited is found before anything is written
    others = _others(folder)
    need_space(target, sum(shard.size for shard in shards) + sum(path.stat().st_size for path in others))
    done, total = 0, sum(shard.size for shard in shards)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    def gain(name: str) -> Float32:
        return _gain(stored[name], homes[name], found, cancelled)

    edits: list[TensorEdit] = []
    content, written = hashlib.sha256(), 0
    with _new_folder(target) as partial:
        for path in others:
            check(cancelled)
            _copy(path, partial / path.name)
        for shard in shards:
            with ExitStack() as open_files:
                source = open_files.enter_context(Source(shard.path, cancelled))
                output = open_files.enter_context(Output(partial / shard.path.name))
                output.reserve(shard.size)
                editor = open_files.enter_context(StreamedEdit(plan, output, gain, advance))
                made: list[tuple[TensorEdit, Digest]] = []
                for tensor, start, size in _pieces(shard):
                    if tensor is not None and tensor.name in chosen:
                        output.seek(start)
                        made.append(editor.edit(source, tensor.tensor(), chosen[tensor.name]))
                    else:
                        editor.behind.copy(source, start, size, start)
                    advance(editor.behind.copied())
                editor.behind.wait(advance)
                for edited, digest in made:
                    edits.append(edited)
                    content.update(f"{edited.name} {edited.type} {digest.hexdigest()}\n".encode())
                written += shard.size
    unknown = found.census.unknown
    return EditReport(tuple(edits), len(chosen) + len(unknown), written, content.hexdigest(), unknown)


def _pieces(shard: Shard) -> Iterator[tuple[Stored | None, int, int]]:
    """The shard from its first byte to its last: tensors, and what lies before and between them."""
    at = 0
    for tensor in shard.tensors:
        if tensor.start > at:
            yield None, at, tensor.start - at
        yield tensor, tensor.start, tensor.size
        at = tensor.start + tensor.size
    if at < shard.size:
        yield None, at, shard.size - at


def _gain(stored: Stored, home: Path, found: Checkpoint, cancelled: Callable[[], bool]) -> Float32:
    tensor = stored.tensor()
    with Source(home, cancelled) as source:
        values = dequantize(source.array(tensor.start, tensor.size).reshape(1, -1), tensor.type)
    return values.reshape(-1) + np.float32(found.gain_offset)


def _others(folder: Path) -> list[Path]:
    """Configuration, tokenizer, licence and the like: plain files that are no weights."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.startswith(".")
    )


def _copy(source: Path, target: Path) -> None:
    with Source(source, lambda: False) as stored, Output(target) as output:
        for _ in stored.copy(0, source.stat().st_size, output, 0):
            pass


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name; renamed to `target` if all goes well, removed if not."""
    partial = target.with_name(f".{target.name}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(f"{target.name} is there already", remedy="Remove it, or choose another name")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise DiskError(f"can't write {target.name}: {error.strerror}", remedy="Check the path") from error
    try:
        yield partial
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise DiskError(
            f"can't write {target.name}: {error.strerror}",
            remedy="Check the folder it is to stand in, and that disk's room",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
