"""The model in memory, for measuring: weights and tokenizer through transformers, from GGUF or safetensors.

Never runs code that came with a model, never unpickles. A model that fits into memory is loaded whole, on one device
or spread over several; a larger one is streamed layer by layer (`streamed.py`), which needs one device with room for
one layer; one that can't be streamed is loaded with a part of it left on disk. `room` decides, accelerate spreads.
Does not know prompts, layers or directions.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from abliterate.contract.errors import AbliteratedError, ModelError, OutOfHostMemory, OutOfMemory
from abliterate.contract.recipe import Run
from abliterated.pipeline.gguf_corrections import correct, correct_config
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.room import How, Placement, free_memory, place, place_offloaded
from abliterated.pipeline.skeleton import build, class_for
from abliterated.pipeline.source import Source
from abliterated.pipeline.split_gguf import merge, outline, read_model
from abliterated.pipeline.streamed import Engine
from abliterated.pipeline.watch import Watch
from abliterated.pipeline.weights import Unstreamable

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Below so many parameters a second thread costs more than it brings, much more on a busy machine.
WORTH_THREADS: Final = 20_000_000
THREADS: Final = torch.get_num_threads()


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked. `model` is a transformers causal language model, `tokenizer` its fast tokenizer.

    With an `engine`, `model` is a skeleton without weights, and the engine alone knows how to go through it.
    """

    source: Source
    model: Any
    tokenizer: Any
    device: torch.device
    engine: Engine | None = None
    notes: tuple[str, ...] = ()

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens an answer ends with."""
        found: set[Any] = set()
        config = self.model.config
        for holder in (self.tokenizer, config, config.get_text_config(), self.model.generation_config):
            ends = getattr(holder, "eos_token_id", None)
            found |= set(ends) if isinstance(ends, list) else {ends}
        usual = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|return|>")
        vocabulary = self.tokenizer.get_vocab()
        found |= {vocabulary[end] for end in usual if end in vocabulary}
        return frozenset(token for token in found if token is not None)


def choose_device(asked: str) -> torch.device:
    """The device to measure on: of several the emptiest. ModelError where the recipe asks for one that is not there."""
    return max(devices(asked), key=free_memory)


def devices(asked: str) -> list[torch.device]:
    """Every device the recipe allows. ModelError where the one it asks for is not there."""
    if asked == "auto":
        if torch.cuda.is_available():
            return devices("cuda")
        return [torch.device("mps" if torch.backends.mps.is_available() else "cpu")]
    kind, _, number = asked.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    there = {"cuda": int(number or 0) < count, "mps": torch.backends.mps.is_available()}.get(kind, True)
    if not there:
        raise ModelError(f"there is no {asked} device here", remedy='Set run.device = "auto"')
    if kind == "cuda" and not number:
        return [torch.device("cuda", one) for one in range(count)]
    return [torch.device(asked)]


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """float32 on a CPU, which computes in nothing else as fast; else bfloat16, which no residual stream overflows."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load(source: Source, run: Run, watch: Watch, how: How | Placement | None = None) -> Loaded:
    """Load tokenizer and weights, or make ready to stream them (`how`; None: as the free memory has it).

    ModelError where transformers can't; OutOfMemory, OutOfHostMemory where they don't fit.
    """
    tokenizer = load_tokenizer(source)
    allowed = devices(run.device)
    free = [free_memory(device) for device in allowed]
    host = 0 if allowed[0].type in ("cpu", "mps") else free_memory(torch.device("cpu"))
    weights = _parameters(source) * choose_dtype(run.dtype, allowed[0]).itemsize
    # A split GGUF is read layer by layer as it lies; to be loaded whole it would have to be merged first.
    split = source.kind == "gguf" and len(source.parts) > 1
    emptiest = free.index(max(free))
    wanted = place(weights, free, host, from_host=source.kind == "gguf")
    if isinstance(how, Placement):
        wanted = how
    elif how or split:
        wanted = Placement(how or "streamed", emptiest)
    device = allowed[wanted.device]
    notes: tuple[str, ...] = ()
    if wanted.how == "streamed":
        try:
            engine = open_engine(source, run, device)
            return Loaded(source, engine.skeleton.model, tokenizer, device, engine)
        except Unstreamable as error:
            notes = (f"this model can't be measured layer by layer ({error}), so it was loaded whole",)
            fits = source.kind == "gguf" or place(weights, free, host).how != "streamed"
            wanted = Placement("whole", emptiest) if fits else place_offloaded(free, host)
    if wanted.how != "whole":
        device = allowed[0]
        notes = (*notes, f"it does not fit on one device: accelerate placed it ({wanted.how})")
    return Loaded(source, load_model(source, run, watch, wanted), tokenizer, device, None, notes)


def open_engine(source: Source, run: Run, device: torch.device | None = None) -> Engine:
    """The model without its weights, ready to be streamed. Unstreamable where its layers can't stand alone."""
    _quiet()
    device = device or choose_device(run.device)
    _set_threads(source)
    with _as_folder(source) as (folder, file):
        try:
            skeleton = build(source, folder, file, device, choose_dtype(run.dtype, device))
            skeleton.tried()
        except (AbliteratedError, Unstreamable, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever transformers' inside raises; its own loader may yet read the model
            raise Unstreamable(str(error).strip().partition("\n")[0][:200] or type(error).__name__) from error
    return Engine(skeleton)


def load_model(source: Source, run: Run, watch: Watch, how: Placement | None = None) -> Any:
    """The weights alone, as a transformers causal language model that only reads. None: on the emptiest device."""
    from transformers import AutoConfig, modeling_gguf_pytorch_utils

    _quiet()
    # The reader's own bar would go to stderr; in its place ours, which also stops a cancelled run.
    modeling_gguf_pytorch_utils.tqdm = functools.partial(_counted, watch=watch)
    allowed = devices(run.device)
    device = allowed[how.device] if how else max(allowed, key=free_memory)
    _set_threads(source)
    with _as_folder(source, watch) as (folder, file), _named(source, "weights"):
        more: dict[str, Any] = {"gguf_file": file} if file else {}
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **more)
        if file:
            correct_config(read_gguf(source.path), config)
        model, found = class_for(config).from_pretrained(
            str(folder),
            output_loading_info=True,
            dtype=choose_dtype(run.dtype, device),
            **_placed(how, allowed, device),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            config=config,
            **more,
        )
        lacking = sorted(found["missing_keys"])
        if lacking:  # transformers would go on with random numbers
            raise ModelError(f"{source.name} lacks {lacking[0]}", remedy="Download it again, completely")
        if source.kind == "gguf":
            correct(read_gguf(source.path), model)
    model.requires_grad_(False)
    model.eval()
    gc.collect()  # the reader's own copy goes now, not some time later
    return model


def _placed(how: Placement | None, allowed: Sequence[torch.device], device: torch.device) -> dict[str, Any]:
    """What tells transformers, and through it accelerate, where the weights go."""
    if how is None or not how.shares:
        return {} if device.type == "cpu" else {"device_map": {"": device}}
    kind = allowed[0].type
    named: list[int | str] = [kind] if kind in ("cpu", "mps") else [one.index for one in allowed]
    limits: dict[int | str, int] = dict(zip(named, how.shares, strict=True))
    limits.setdefault("cpu", how.host)
    return {"device_map": "auto", "max_memory": limits, "offload_folder": _offload_folder()}


def _offload_folder() -> str:
    """Where what has to be written anew to be left on disk lies until this process ends."""
    folder = tempfile.mkdtemp(prefix="abliterated-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_tokenizer(source: Source) -> Any:
    """The tokenizer alone, with its chat template. ModelError where one of them is missing."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _as_folder(source) as (folder, file), _named(source, "tokenizer"):
        if file:
            keys = {entry.key for entry in read_gguf(source.path).key_values}
            if "tokenizer.ggml.tokens" not in keys:
                raise ModelError(f"{source.name} carries no tokenizer", remedy="Give a complete GGUF")
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source.name} has no chat template, so it can't be asked as it was trained to be",
            remedy="Take an instruction-tuned model, or a direction from a file with evaluate.prompts = 0",
        )
    return tokenizer


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # where it put what, our notes say


def _set_threads(source: Source) -> None:
    torch.set_num_threads(THREADS if _parameters(source) > WORTH_THREADS else 1)


def _counted(tensors: Sequence[Any], *, watch: Watch, **_: Any) -> Iterator[Any]:
    for number, tensor in enumerate(tensors):
        watch.step(number, len(tensors), "tensors", "reading the weights")
        yield tensor


@contextlib.contextmanager
def _as_folder(source: Source, numbers: Watch | None = None) -> Iterator[tuple[Path, str]]:
    """A folder transformers reads, and a GGUF's name in it: alone there, whatever its own name and neighbours are.

    A split one is merged there: with a watch for its `numbers` to be read, else as an outline without any.
    """
    if source.kind == "safetensors":
        yield source.path, ""
        return
    with tempfile.TemporaryDirectory(prefix="abliterated-") as folder:
        file = Path(folder) / "model.gguf"
        if len(source.parts) == 1:
            file.symlink_to(source.path.resolve())
        elif numbers is None:
            outline(read_model(source.path), file)
        else:
            progress = functools.partial(numbers.step, unit="bytes", message="putting the parts together")
            merge(read_model(source.path), file, progress=progress, cancelled=numbers.cancelled)
        yield Path(folder), file.name


@contextlib.contextmanager
def _named(source: Source, what: str) -> Iterator[None]:
    """Whatever transformers raises, as an error of ours that names the model."""
    try:
        yield
    except (AbliteratedError, Unstreamable):
        raise
    except Exception as error:
        line = str(error).strip().partition("\n")[0][:300]
        # Of the host's memory torch says so in words alone.
        if isinstance(error, MemoryError) or "allocate memory" in line:
            raise OutOfHostMemory(
                f"{source.name} does not fit into this machine's memory",
                remedy='Free some memory, set run.dtype = "bfloat16", or take a smaller model',
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory(
                f"{source.name} does not fit into the device's memory",
                remedy='Set run.device = "cpu" or run.dtype = "bfloat16"',
            ) from error
        raise ModelError(
            f"transformers can't read the {what} of {source.name} (architecture {source.architecture}): {line}",
            remedy="Measure on the Hugging Face folder, or give a direction file",
        ) from error


def _parameters(source: Source) -> int:
    if source.kind == "safetensors":
        return source.size // 2
    count = 0
    for part in source.parts:
        for tensor in read_gguf(part).tensors:
            product = 1
            for length in tensor.shape:
                product *= length
            count += product
    return count
