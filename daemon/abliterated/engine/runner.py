"""A runner: one model in llama.cpp's server, on a private unix socket, in a process of its own.

Started by `pool` as `python -m abliterated.engine.runner <settings as JSON>`; says `ready` on stdout when the model
is loaded and ends when its stdin does. The only module that imports xllamacpp.
Does not know: Ollama's API, names, other runners.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from abliterated.engine.lifeline import die_with_parent, end_at_eof

# Below this many bytes a second thread costs more than it brings: threads wait for each other after every small
# product, and on a busy machine one that is not scheduled holds up all.
_TINY = 64 << 20


@dataclass(frozen=True)
class Settings:
    model: str
    socket: str
    parent: int
    context: int
    projector: str = ""
    batch: int = 512
    gpu_layers: int | None = None
    threads: int | None = None
    embedding: bool = False
    pooling: int | None = None  # what to pool by where the model does not say
    probe: bool = False  # only see whether llama.cpp opens the model: nothing on the GPU, nothing copied

    def encode(self) -> str:
        return json.dumps(asdict(self))


def main(arguments: list[str]) -> None:
    settings = Settings(**json.loads(arguments[0]))
    die_with_parent(settings.parent)
    end_at_eof(sys.stdin.fileno())
    # Nothing llama.cpp prints may be taken for our word, so stdout moves away and becomes stderr.
    voice = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a backtrace would attach a debugger and take seconds

    import xllamacpp

    devices = [device for device in xllamacpp.get_device_info() if "GPU" in str(device.get("type", "")).upper()]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings.model
    parameters.hostnames = [settings.socket]
    parameters.n_ctx = settings.context
    parameters.n_parallel = 1
    parameters.n_batch = max(settings.batch, 512)
    parameters.n_ubatch = settings.batch
    parameters.warmup = False
    parameters.ui = False
    parameters.endpoint_slots = False
    parameters.sse_ping_interval = -1
    parameters.cache_ram_mib = 0  # freed memory is freed: no second cache of old prompts
    parameters.cache_idle_slots = False
    parameters.verbosity = 1
    parameters.fit_params = bool(devices) and settings.gpu_layers is None and not settings.probe
    if settings.projector:
        parameters.mmproj.path = settings.projector
    if settings.gpu_layers is not None:
        parameters.n_gpu_layers = settings.gpu_layers
    threads = settings.threads or (1 if Path(settings.model).stat().st_size < _TINY else None)
    if threads:
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
    if settings.embedding:
        parameters.embedding = True
        # A model that is not causal must see its whole input in one batch.
        parameters.n_batch = parameters.n_ubatch = min(settings.context, 8192)
        if settings.pooling is not None:
            parameters.pooling_type = xllamacpp.llama_pooling_type(settings.pooling)
    if settings.probe:
        parameters.n_gpu_layers = 0
        parameters.no_extra_bufts = True
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        # An orderly exit: llama.cpp writes its log from a thread, and the reason is in there.
        sys.exit(str(error))
    voice.write(json.dumps({"ready": True, "gpu": bool(devices)}) + "\n")
    voice.close()
    if settings.probe:
        os._exit(0)
    _sleep_until_killed(server)


def _sleep_until_killed(server: object) -> None:
    """Keep `server` alive; the pool ends this process with SIGKILL, for nothing here needs saying goodbye to."""
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
