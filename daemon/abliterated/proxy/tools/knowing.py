"""What is known of a model and of its engine: what the engine says it can do, and what its own GGUF says.

Ollama answers 400 for tools or thinking exactly where `/api/show` doesn't list them among the capabilities, and for
neither loads a model: so that is asked, and not the request tried. Kept a while for each name, for good for each file.

Does not know: requests, how a prompt is rendered.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from abliterated.proxy.tools import upstream as engine
from abliterated.proxy.tools.dialects import BARE_JSON, LISTED, MARKLESS, Dialect, dialect_of, thought_marks
from abliterated.proxy.tools.helper import Learnt
from abliterated.proxy.tools.renderer import CannotRender, Renderer

KEEP_SECONDS: Final = 60.0
_MOST: Final = 64
_FROM: Final = re.compile(r"^FROM\s+(/.+|[A-Za-z]:\\.+)$", re.MULTILINE)
_MARKS_SURVIVE: Final = (0, 30, 0)  # before it raw completions keep control tokens


class Known(msgspec.Struct, frozen=True):
    """`lost`: marks that an answer to a raw prompt would come without. `loses`: what the engine, which runs the model's
    own template, drops of tools though it says that it can do them."""

    capabilities: frozenset[str]
    system: str = ""
    before: tuple[dict[str, Any], ...] = ()
    learnt: Learnt | None = None
    lost: frozenset[str] = frozenset()
    loses: frozenset[str] = frozenset()

    @property
    def jinja(self) -> str:
        return self.learnt.jinja if self.learnt else ""

    @property
    def spoken(self) -> Dialect | None:
        """What it was trained to speak."""
        return dialect_of(self.jinja)

    @property
    def dialect(self) -> Dialect | None:
        """The same as an answer to a raw prompt comes; None where it comes without its marks and can't be told."""
        found = self.spoken
        if found is None or not self.lost & {*found.opens, found.close}:
            return found
        return MARKLESS if found in (LISTED, BARE_JSON) else None

    @property
    def thoughts(self) -> tuple[str, str] | None:
        found = thought_marks(self.jinja)
        return None if found is None or self.lost & {mark.strip() for mark in found} else found

    @property
    def trained(self) -> bool:
        """Its template knows tools, or our variant of it does: the model was taught to call."""
        return self.learnt is not None and self.learnt.tools


class Knowledge:
    """Asked for every request that might need help. `forget` when models have changed."""

    def __init__(self, renderer: Renderer, *, keep_seconds: float = KEEP_SECONDS) -> None:
        self._renderer = renderer
        self._keep = keep_seconds
        self._models: dict[tuple[str, str], tuple[float, Known]] = {}
        self._files: dict[str, Learnt | None] = {}
        self._versions: dict[str, tuple[float, tuple[int, ...]]] = {}

    def forget(self) -> None:
        self._models.clear()
        self._versions.clear()

    async def of(self, upstream: str, model: str, headers: Mapping[str, str]) -> Known | None:
        """None where the engine won't say. Raises upstream.Broken."""
        now = time.monotonic()
        kept = self._models.get((upstream, model))
        if kept is not None and now - kept[0] < self._keep:
            return kept[1]
        known = await self._ask(upstream, model, headers)
        if known is None:
            return None  # not kept: what one client is refused, another may be told
        if len(self._models) >= _MOST:
            self._models.clear()
        self._models[upstream, model] = (now, known)
        return known

    async def _ask(self, upstream: str, model: str, headers: Mapping[str, str]) -> Known | None:
        async with engine.post(upstream, "/api/show", {"model": model}, headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                return None
        try:
            show = msgspec.json.decode(body)
        except msgspec.DecodeError:
            return None
        if not isinstance(show, dict) or show.get("remote_model"):
            return None
        found = _FROM.search(str(show.get("modelfile") or ""))
        learnt = await self._learn(found[1].strip(), model) if found else None
        lost: frozenset[str] = frozenset()
        if learnt is not None and await self._version(upstream, headers) >= _MARKS_SURVIVE:
            lost = learnt.words.control
        capabilities = show.get("capabilities")
        before = show.get("messages")
        return Known(
            capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else frozenset(),
            system=str(show.get("system") or ""),
            before=tuple(one for one in before if isinstance(one, dict)) if isinstance(before, list) else (),
            learnt=learnt,
            lost=lost,
            loses=learnt.loses if learnt and _same(show.get("template"), learnt.words.jinja) else frozenset(),
        )

    async def _learn(self, path: str, model: str) -> Learnt | None:
        """What the file says. A blob's name is its digest, so what is learnt stays true."""
        if path not in self._files:
            try:
                learnt = await self._renderer.learn(path, model)
            except CannotRender:
                learnt = None  # on another machine, or not for us to read
            if learnt is None and "sha256" in path:
                return None
            if len(self._files) >= _MOST:
                self._files.clear()
            self._files[path] = learnt
        return self._files[path]

    async def _version(self, upstream: str, headers: Mapping[str, str]) -> tuple[int, ...]:
        now = time.monotonic()
        kept = self._versions.get(upstream)
        if kept is None or now - kept[0] > self._keep:
            async with engine.get(upstream, "/api/version", headers) as answer:
                body = await answer.read()
            found = re.search(rb'"version"\s*:\s*"v?(\d+)\.(\d+)\.(\d+)', body)
            version = tuple(map(int, found.groups())) if found else (999,)
            kept = self._versions[upstream] = (now, version)
        return kept[1]


def _same(template: Any, jinja: str) -> bool:
    return isinstance(template, str) and template.strip() == jinja.strip()
