"""From an edited folder of safetensors to a GGUF: the user's own llama.cpp converter does it, as a process of its own,
or, where the task names an Ollama's address in its place, that engine's importer, behind a program of ours; then our
provenance goes into the file's header, and the types the recipe asks for into its tensors.

Does not know the edit. The converter is started as `PROGRAM FOLDER --outfile FILE --outtype TYPE`.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterate.contract.errors import AbliteratedError, DiskError, EngineUnavailable, ModelError, RecipeError
from abliterated.pipeline import gguf_header
from abliterated.pipeline.gguf_file import Tensor, padded, read_gguf, row_bytes
from abliterated.pipeline.mixes import MIXES, known_mix, wanted_type
from abliterated.pipeline.safe_write import CHUNK, Output, Source, need_space
from abliterated.pipeline.safetensors_file import read_shards
from abliterated.pipeline.tensor_edit import requantise
from abliterated.pipeline.watch import Watch

LOOK: Final = 0.1  # seconds between two looks at the converter
PATIENCE: Final = 5.0  # seconds it has to end when asked to
IMPORTER: Final = "abliterated.ollama.importer"  # called as a converter is, with the engine's address before the folder
OUTTYPES: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
NEXT: Final = "Set [tools] converter in config.toml to llama.cpp's convert_hf_to_gguf.py"
_SECRETS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Dies with us, however we die: asked of the kernel before it becomes the converter.
_LINUX_START: Final = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"  # PR_SET_PDEATHSIG
)


def check_converter(program: str) -> None:
    """RecipeError where the configured converter can't be started."""
    if is_engine(program):
        return
    path, remedy = Path(program), "Set [tools] converter to the path of llama.cpp's convert_hf_to_gguf.py"
    if not path.is_absolute():
        raise RecipeError(f"tools.converter: {program!r} is relative", remedy=remedy)
    if not path.is_file():
        raise RecipeError(f"tools.converter: there is no {program}", remedy=remedy)
    if path.suffix != ".py" and not os.access(path, os.X_OK):
        raise RecipeError(f"tools.converter: {program} is not executable", remedy="chmod +x it")


def is_engine(program: str) -> bool:
    """Whether an Ollama converts, and not a program of the user's."""
    return program.startswith(("http://", "https://"))


def convert(program: str, folder: Path, target: Path, watch: Watch) -> None:
    """Let the converter write `target`. ModelError with its last words where it fails; EngineUnavailable where it is
    an Ollama that is away; Cancelled; then no target."""
    shards = read_shards(folder)
    weights = sum(shard.size for shard in shards)
    need_space(target, weights)
    partial, log = target.with_name(f".{target.name}.partial"), target.with_name(f"{target.name}.log")
    partial.unlink(missing_ok=True)
    bound = [sys.executable, "-c", _LINUX_START] if sys.platform.startswith("linux") else []
    argv = [*bound, *_start(program), str(folder), "--outfile", str(partial), "--outtype", _outtype(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        words = log.open("wb")
    except OSError as error:
        raise DiskError(f"can't write {log.name}: {error.strerror}", remedy="Check its folder") from error
    try:
        with words:
            process = subprocess.Popen(
                argv, cwd=target.parent, env=environment, stdin=subprocess.DEVNULL, stdout=words, stderr=words
            )
    except OSError as error:
        raise ModelError(f"{program} can't be started: {error.strerror}", remedy="Check [tools] converter") from error
    try:
        while process.poll() is None:
            watch.step(min(_size(partial), weights), weights, "bytes", "converting to GGUF")
            time.sleep(LOOK)
        watch.check()  # a signal to our whole group ends both
        if process.returncode:
            raise _failed(program, process.returncode, log, partial)
        if not read_gguf(partial).tensors:
            raise ModelError(f"{_called(program)} wrote a GGUF without tensors", remedy=_next(program))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        _end(process)
        partial.unlink(missing_ok=True)


def stamp(
    source: Path,
    target: Path,
    metadata: Mapping[str, Any],
    *,
    quantize: str,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> int:
    """Write `target`: the GGUF `source` with `metadata` in its header, requantised where asked. Returns its bytes."""
    mix, structure = known_mix(quantize), read_gguf(source)
    keys = dict(metadata)
    if mix:
        keys["general.file_type"] = int(MIXES[mix][2])
    layers = structure.number("block_count")
    types = {tensor.name: wanted_type(mix, tensor, layers) for tensor in structure.tensors}
    done, total = 0, sum(tensor.size for tensor in structure.tensors)
    placed: list[tuple[Tensor, Type, int]] = []
    with Source(source, cancelled) as stored:
        raw = stored.array(0, structure.data_start).tobytes()
        start = gguf_header.header_size(structure, keys, raw)
        sizes = (row_bytes(types[tensor.name], math.prod(tensor.shape)) for tensor in structure.tensors)
        need_space(target, start + sum(padded(size, structure.alignment) for size in sizes))
        with Output(target) as output:
            output.seek(start)
            for tensor in structure.tensors:
                kind = types[tensor.name]
                placed.append((tensor, kind, output.at - start))
                for rows in _rows(stored, tensor):
                    changed = rows if kind is tensor.type else requantise(tensor.name, rows, tensor.type, kind)
                    output.write(changed)
                    done += rows.size
                    progress(done, total)
                output.write(bytes(padded(output.at - start, structure.alignment) - (output.at - start)))
            size = output.at
            front = gguf_header.header(structure, keys, raw, placed)
            assert len(front) == start, "the header's length may not depend on where the tensors lie"
            output.seek(0)
            output.write(front)
    return size


def _start(program: str) -> list[str]:
    if is_engine(program):
        return [sys.executable, "-m", IMPORTER, program]
    return [sys.executable, program] if Path(program).suffix == ".py" else [program]


def _called(program: str) -> str:
    return "Ollama's importer" if is_engine(program) else Path(program).name


def _rows(stored: Source, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """A tensor some rows at a time."""
    size = max(1, CHUNK // tensor.row_size) * tensor.row_size
    for first in range(tensor.start, tensor.start + tensor.size, size):
        count = min(size, tensor.start + tensor.size - first)
        yield stored.array(first, count).reshape(-1, tensor.row_size)


def _outtype(folder: Path) -> str:
    """The type most of the weights have: nothing is rounded that need not be."""
    sizes: dict[str, int] = {}
    for shard in read_shards(folder):
        for tensor in shard.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return OUTTYPES.get(max(sizes, key=lambda dtype: sizes[dtype]), "auto")


def _failed(program: str, status: int, log: Path, partial: Path) -> AbliteratedError:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
    name = _called(program)
    if "no space left on device" in last.lower():
        return DiskError(f"{name} found the disk of {partial.parent.name}/ full", remedy="Make room, and run it again")
    if is_engine(program) and status == EngineUnavailable.exit_code:
        return EngineUnavailable(f"converting to GGUF: {last}", remedy="Start Ollama, or wait for it")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
    return ModelError(
        f"{name} could not convert the folder ({how}){': ' + last if last else ''}",
        remedy=_next(program),
    )


def _next(program: str) -> str:
    return NEXT if is_engine(program) else "Update llama.cpp, or convert the folder by hand"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
