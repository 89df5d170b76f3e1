"""Processes that have read torch already: each is forked from one that did, so that a test may kill many.

They are real processes, with a pid and an exit code of their own; only the import is not paid for again.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

READ = (
    "torch", "accelerate", "gguf", "safetensors.torch", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.llama.modeling_llama", "transformers.generation.utils", "transformers.core_model_loading",
    "abliterated.pipeline.run", "abliterated.pipeline.session", "abliterated.pipeline.choose",
    "abliterated.pipeline.search_stage", "abliterated.pipeline.evaluate",
)  # fmt: skip


def forked(function: Callable[..., None], *arguments: Any, errors: Path, patience: float = 400.0) -> int:
    """Run the module's function in a process of its own; its exit code (−9: killed), its stderr in `errors`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(READ))
    process = context.Process(target=_into, args=(errors, function, arguments))
    process.start()
    process.join(patience)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"it did not end in {patience:.0f} s:\n{errors.read_text()[-2000:]}")
    return process.exitcode


def _into(errors: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    gc.freeze()  # what was read before is no garbage of this run's
    function(*arguments)
