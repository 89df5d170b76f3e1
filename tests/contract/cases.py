"""What the contract tests create and ask: plain data.

Does not know: engines, how anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: One thread: two spinning ones on a busy machine of two cores cost a thousand times the work.
PARAMETERS = {"num_thread": 1, "num_ctx": 512, "temperature": 0, "stop": ["<|end|>", "two words"]}
SYSTEM = "You are a lamp."
LICENSE = "Apache License\nVersion 2.0"
HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a thing.",
        "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
    },
}

#: The fixture `create`: a model's name and the fields of /api/create; its progress lines.
Create = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True)
class Blob:
    path: Path
    digest: str
