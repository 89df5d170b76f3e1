"""Which Ollama answers: its version, its generation, and what of that a user must hear. Pure.

Does not know the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

OLDEST = (0, 5, 0)  # before it, `/api/create` took a Modelfile's text instead of `files`
SAFE = (0, 17, 1)  # before it, a crafted GGUF can read memory of the server


class Generation(Enum):
    """What differs between them: who renders the chat, and what becomes of a GGUF at creation."""

    LEGACY = "before 0.30"  # Go templates only; a GGUF is kept as it is
    REWRITING = "0.30 to 0.34.0"  # the GGUF's Jinja counts; a GGUF is written anew at creation
    CURRENT = "0.34.1 or newer"  # the GGUF's Jinja counts; a GGUF is kept as it is
    EMBEDDED = "embedded"
    DEVELOPMENT = "a development build"  # built without a version number (0.0.0): nothing is assumed


@dataclass(frozen=True)
class Version:
    """A version as the engine said it."""

    text: str
    numbers: tuple[int, int, int]
    generation: Generation

    @property
    def too_old(self) -> bool:
        """Older than anything we can register with."""
        return self.generation is Generation.LEGACY and self.numbers < OLDEST

    @property
    def keeps_gguf(self) -> bool | None:
        """Is an imported GGUF kept byte for byte? None: not known."""
        if self.generation is Generation.DEVELOPMENT:
            return None
        return self.generation is not Generation.REWRITING

    def notes(self) -> list[str]:
        """What the user should know of this version."""
        if self.generation is Generation.DEVELOPMENT:
            return [f"Ollama says version {self.text}: a development build, so nothing is taken for granted"]
        if self.generation is Generation.LEGACY and self.numbers < SAFE:
            return [f"Ollama {self.text} has known vulnerabilities in reading models: update to 0.17.1 or newer"]
        return []


def read_version(text: str) -> Version:
    """`0.34.1-rc0` and the like; what can't be read counts as a development build."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
    numbers = (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)
    if "abliterated" in text:
        generation = Generation.EMBEDDED
    elif numbers == (0, 0, 0):
        generation = Generation.DEVELOPMENT
    elif numbers < (0, 30, 0):
        generation = Generation.LEGACY
    elif numbers <= (0, 34, 0):
        generation = Generation.REWRITING
    else:
        generation = Generation.CURRENT
    return Version(text, numbers, generation)
