"""A `llama-server` for a real Ollama (≥ 0.30) in tests: its options on the outside, xllamacpp's server within.

Such an Ollama has no engine of its own: it starts `<exe>/../lib/ollama/llama-server` for each model and talks to it
over HTTP. xllamacpp carries llama.cpp's whole HTTP server, so what is left to do is to translate the command line,
to answer the two discovery calls (a start without a model, `--list-devices`), and to end with its parent.
CPU only. An option it does not know ends it with a clear line, so that a newer Ollama's new option is seen.

Does not know: Ollama's API, templates, models. Copied beside the engine; imports nothing of ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
LOAD_MODES = {"none": "NONE", "mmap": "MMAP", "mlock": "MLOCK", "mmap+mlock": "MMAP_MLOCK", "dio": "DIRECT_IO"}
FLASH_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def build_parser() -> argparse.ArgumentParser:
    """The options Ollama's `llm/llama_server.go` and `discover/llama_server.go` pass, and no other."""
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False, add_help=False)
    parser.add_argument("--model", "-m", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-c", dest="context", type=int, default=0)
    parser.add_argument("-np", dest="parallel", type=int, default=1)
    parser.add_argument("-b", dest="batch", type=int)
    parser.add_argument("-ub", dest="micro_batch", type=int)
    parser.add_argument("-t", dest="threads", type=int)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--context-shift", action="store_true")
    parser.add_argument("--no-jinja", action="store_true")
    parser.add_argument("--chat-template", default="")
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--mmproj", default="")
    parser.add_argument("--image-min-tokens", type=int)
    parser.add_argument("--load-mode", choices=sorted(LOAD_MODES))
    parser.add_argument("--flash-attn", choices=sorted(FLASH_ATTENTION), default="auto")
    parser.add_argument("--cache-type-k", choices=CACHE_TYPES)
    parser.add_argument("--cache-type-v", choices=CACHE_TYPES)
    parser.add_argument("--log-verbosity", type=int, default=3)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    # Taken and without meaning here: no page, no network, no accelerator, a log without ornaments already.
    for flag in ("--no-webui", "--offline", "--no-log-prefix", "--no-log-timestamps", "--no-mmproj-offload"):
        parser.add_argument(flag, action="store_true")
    for ignored in ("-ngl", "--split-mode", "--main-gpu"):
        parser.add_argument(ignored)
    return parser


def common_params(options: argparse.Namespace) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.context, options.parallel
    params.n_gpu_layers, params.fit_params = 0, False
    params.n_batch = options.batch or params.n_batch
    params.n_ubatch = options.micro_batch or params.n_ubatch
    # Half the cores: ggml's threads spin, and on a busy machine spinning against the tests costs 100 times the work.
    params.cpuparams.n_threads = options.threads or max(1, (os.cpu_count() or 1) // 2)
    params.ctx_shift, params.n_keep = options.context_shift, options.keep or 0
    params.use_jinja, params.chat_template = not options.no_jinja, options.chat_template
    params.embedding = options.embedding
    params.verbosity = options.log_verbosity
    params.offline, params.ui, params.endpoint_props = True, False, False
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{FLASH_ATTENTION[options.flash_attn]}"
    )
    if options.load_mode:
        params.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{LOAD_MODES[options.load_mode]}")
    for side in ("k", "v"):
        if kind := getattr(options, f"cache_type_{side}"):
            setattr(params, f"cache_type_{side}", getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}"))
    if options.mmproj:
        params.mmproj.path, params.mmproj_use_gpu = options.mmproj, False
    if options.image_min_tokens:
        params.image_min_tokens = options.image_min_tokens
    adapters = []
    for path in options.lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        adapters.append(adapter)
    if adapters:
        params.lora_adapters = adapters
    return params


def outlive_nobody(parent: int) -> None:
    """Return when the Ollama that started us is gone (it kills us where it can; a kill -9 of it can't tell us)."""
    while os.getppid() == parent:
        time.sleep(0.5)


def main(arguments: list[str]) -> int:
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit:
        print(f"error: the llama-server shim does not know one of: {' '.join(arguments)}", file=sys.stderr)
        return 1
    if options.list_devices:
        print("Available devices:")
        return 0
    if not options.model:  # discovery: print what there is, wait for the kill
        print("system_info: CPU only (llama-server shim over xllamacpp)", file=sys.stderr, flush=True)
        outlive_nobody(parent)
        return 0
    if not Path(options.model).is_file():
        print(f"error: failed to open GGUF file '{options.model}'", file=sys.stderr)
        return 1
    import xllamacpp

    try:
        server = xllamacpp.Server(common_params(options))  # binds, loads, serves; returns when the model is ready
    except Exception as error:
        print(f"error: failed to load model '{options.model}': {error}", file=sys.stderr, flush=True)
        os._exit(1)
    print(f"llama-server shim: serving on {server.listening_address}", file=sys.stderr, flush=True)
    outlive_nobody(parent)
    os._exit(0)  # a C++ server with threads has nothing to tidy for us


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
