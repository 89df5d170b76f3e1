"""The model in memory, for measuring: weights and tokenizer through transformers, from GGUF or safetensors.

Never runs code that came with a model, never unpickles. The whole model is loaded at once, on one device or, where it
is larger, spread by accelerate. Does not know prompts, layers or directions.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from abliterate.contract.errors import AbliteratedError, ModelError, OutOfMemory
from abliterate.contract.recipe import Run
from abliterated.pipeline.gguf_corrections import correct
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Below so many parameters a second thread costs more than it brings, much more on a busy machine.
WORTH_THREADS: Final = 20_000_000
THREADS: Final = torch.get_num_threads()


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked. `model` is a transformers causal language model, `tokenizer` its fast tokenizer."""

    source: Source
    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens an answer ends with."""
        found: set[int] = set()
        for holder in (
            self.tokenizer.eos_token_id,
            self.model.config.eos_token_id,
            self.model.generation_config.eos_token_id,
        ):
            found |= set(holder) if isinstance(holder, list) else {holder}
        ends = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|return|>")
        vocabulary = self.tokenizer.get_vocab()
        found |= {vocabulary[end] for end in ends if end in vocabulary}
        return frozenset(token for token in found if token is not None)


def choose_device(asked: str) -> torch.device:
    """The device to measure on. ModelError where the recipe asks for one that is not there."""
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = asked.partition(":")[0]
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(kind, True)
    if not there:
        raise ModelError(f"there is no {asked} device here", remedy='Set run.device = "auto"')
    return torch.device(asked)


def choose_dtype(asked: str, device: torch.device, source: Source) -> torch.dtype:
    """float32 on a CPU where the model fits twice over; else bfloat16, which no residual stream overflows."""
    if asked != "auto":
        return DTYPES[asked]
    if device.type == "cpu" and _parameters(source) * 4 * 1.5 < psutil.virtual_memory().available:
        return torch.float32
    return torch.bfloat16


def load(source: Source, run: Run, watch: Watch) -> Loaded:
    """Load tokenizer and weights. ModelError where transformers can't; OutOfMemory where they don't fit."""
    device = choose_device(run.device)
    tokenizer = load_tokenizer(source)
    return Loaded(source, load_model(source, run, watch), tokenizer, device)


def load_model(source: Source, run: Run, watch: Watch) -> Any:
    """The weights alone, as a transformers causal language model that only reads."""
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The reader's own bar would go to stderr; in its place ours, which also stops a cancelled run.
    modeling_gguf_pytorch_utils.tqdm = functools.partial(_counted, watch=watch)
    device = choose_device(run.device)
    torch.set_num_threads(THREADS if _parameters(source) > WORTH_THREADS else 1)
    with _as_folder(source) as (folder, file), _named(source, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=choose_dtype(run.dtype, device, source),
            device_map=None if device.type == "cpu" else {"": device},
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **({"gguf_file": file} if file else {}),
        )
        if source.kind == "gguf":
            correct(read_gguf(source.path), model)
    model.requires_grad_(False)
    model.eval()
    gc.collect()  # the reader's own copy goes now, not some time later
    return model


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


def _counted(tensors: Sequence[Any], *, watch: Watch, **_: Any) -> Iterator[Any]:
    for number, tensor in enumerate(tensors):
        watch.step(number, len(tensors), "tensors", "reading the weights")
        yield tensor


@contextlib.contextmanager
def _as_folder(source: Source) -> Iterator[tuple[Path, str]]:
    """A folder transformers reads, and a GGUF's name in it: alone there, whatever its own name and neighbours are."""
    if source.kind == "safetensors":
        yield source.path, ""
        return
    if len(source.parts) > 1:
        raise ModelError(
            f"{source.name} is split into {len(source.parts)} files, which can't be measured yet",
            remedy="Merge it with llama-gguf-split --merge",
        )
    with tempfile.TemporaryDirectory(prefix="abliterated-") as folder:
        (Path(folder) / "model.gguf").symlink_to(source.path.resolve())
        yield Path(folder), "model.gguf"


@contextlib.contextmanager
def _named(source: Source, what: str) -> Iterator[None]:
    """Whatever transformers raises, as an error of ours that names the model."""
    try:
        yield
    except AbliteratedError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{source.name} does not fit into the memory here",
            remedy='Set run.device = "cpu" or run.dtype = "bfloat16"',
        ) from error
    except Exception as error:
        line = str(error).strip().partition("\n")[0][:300]
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
