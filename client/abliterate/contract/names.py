"""Model names as Ollama reads them, and the name an abliterated model gets.

Rules: host/namespace/name:tag, each part at most 80 characters, beginning with a letter, digit or underscore,
going on with those, `-` and `.` (no `.` in a namespace); defaults `registry.ollama.ai`, `library`, `latest`;
compared without case.
Does not know which models exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from abliterate.contract.errors import RecipeError

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
SUFFIX = "-abliterated"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


@dataclass(frozen=True)
class ModelName:
    """A parsed model name; every part is filled."""

    host: str
    namespace: str
    model: str
    tag: str

    def short(self) -> str:
        """As Ollama prints it: defaults left out, the tag always there."""
        name = f"{self.model}:{self.tag}"
        if self.namespace != DEFAULT_NAMESPACE or self.host != DEFAULT_HOST:
            name = f"{self.namespace}/{name}"
        return f"{self.host}/{name}" if self.host != DEFAULT_HOST else name

    def full(self) -> str:
        """Every part, as in Ollama's error messages."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def key(self) -> str:
        """What two spellings of one model share."""
        return self.full().lower()


def parse_name(text: str) -> ModelName:
    """Parse `text` as Ollama does; raises RecipeError for a name Ollama would refuse."""
    rest = text.strip()
    for source in (":local", ":cloud"):
        if rest.endswith(source) and rest.count(":") > 1:
            rest = rest.removesuffix(source)
    rest = re.sub(r"^https?://", "", rest)
    head, _, last = rest.rpartition("/")
    model, _, tag = last.partition(":")
    host, _, namespace = head.rpartition("/")
    name = ModelName(host or DEFAULT_HOST, namespace or DEFAULT_NAMESPACE, model, tag or DEFAULT_TAG)
    good = (
        _PART.fullmatch(name.model)
        and _PART.fullmatch(name.tag)
        and _NAMESPACE.fullmatch(name.namespace)
        and _HOST.fullmatch(name.host)
        and not (":" in last and not tag)
    )
    if not good:
        raise RecipeError(
            f"{text!r} is no model name Ollama accepts",
            remedy="Use letters, digits, '-', '_' and '.', as in 'qwen3-abliterated:8b'",
        )
    return name


def abliterated_name(base: ModelName) -> ModelName:
    """`qwen3:8b` becomes `qwen3-abliterated:8b`: the suffix on the name part, the tag kept."""
    if base.model.endswith(SUFFIX):
        return base
    return ModelName(base.host, base.namespace, base.model[: 80 - len(SUFFIX)] + SUFFIX, base.tag)


def name_from_stem(stem: str) -> ModelName:
    """A name for a model that came as a folder, a file or a repository: its stem, made acceptable."""
    model = re.sub(r"[^a-z0-9_.-]+", "-", stem.lower()).strip("-.") or "model"
    return ModelName(DEFAULT_HOST, DEFAULT_NAMESPACE, model[:80], DEFAULT_TAG)
