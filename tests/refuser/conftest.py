"""A real llama.cpp with the shipped refuser, in a process of its own; and the training script's package on the path."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterated.refuser import files

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

SERVE = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 8192
params.n_parallel = 4
params.cpuparams.n_threads = 2
params.use_jinja = True
params.warmup = False
params.port = 0
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """What the tests ask of it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def chat(self, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        body = {"messages": messages, "temperature": 0, "max_tokens": 120, **more}
        message: dict[str, Any] = self.post("/v1/chat/completions", body)["choices"][0]["message"]
        return message


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[LlamaCpp]:
    command = [sys.executable, "-c", SERVE, str(files().model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        try:
            for line in process.stdout:
                if line.startswith("listening "):
                    yield LlamaCpp(line.split()[1])
                    break
            else:
                pytest.fail("llama.cpp did not start")
        finally:
            process.stdin.close()  # it ends when its stdin does
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
