"""Help in the proxy as a program keeps it: made from the settings, armed once an abliterated model is known to exist.

Until then no request is held for its name. Armed by what the engine lists at the start, by a finished job, and by the
first request that names such a model. What earlier jobs proved of their models is recalled at the start. Part of the
wiring; does not know HTTP, nor how help works.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from abliterate.contract.errors import AbliteratedError, RecipeError
from abliterate.contract.names import parse_name
from abliterated.proxy.routing import place_of
from abliterated.proxy.server import Proxy
from abliterated.proxy.tools.assistant import Assist, Help, More

Certificates = Mapping[str, Mapping[str, Any]]  # by the model's name
PAUSES: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # while the engine does not answer yet


class Assisting:
    """One proxy's. `begin` inside the running loop, once the proxy serves; `close` at the end."""

    def __init__(self, proxy: Proxy, upstream: str, help: Help, more: Sequence[More] = ()) -> None:
        self._proxy = proxy
        self._upstream = upstream
        self._looking: asyncio.Task[None] | None = None
        self._made: set[str] = set()  # by jobs of ours
        self.assist = Assist(help=help, more=frozenset(more)) if help != "off" else None
        if self.assist is not None:
            proxy.assistant, proxy.wanted = self.assist, self.assist.wanted

    def begin(self, recall: Callable[[], Awaitable[Certificates]] | None = None) -> None:
        """`recall`: the certificates of what jobs have made before."""
        if self.assist is not None:
            self._looking = asyncio.get_running_loop().create_task(self._look(self.assist, recall))

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        if self.assist is not None:
            await self.assist.close()

    def made(self, model: str, certification: Mapping[str, Any]) -> None:
        """A job has made `model`; its certificate says whether tools survived."""
        if self.assist is not None:
            self._made.add(_key(model))
            self.assist.knowledge.forget()
            self.assist.trust(model, tools=not _loses_tools(certification))
            self._proxy.arm()

    async def _look(self, assist: Assist, recall: Callable[[], Awaitable[Certificates]] | None) -> None:
        """Arm, if the engine has such a model; it may not be up yet."""
        for model, certification in (await recall()).items() if recall is not None else ():
            if _key(model) not in self._made:  # else a job has told something newer meanwhile
                self._made.add(_key(model))
                assist.trust(model, tools=not _loses_tools(certification))
        from abliterated.ollama.client import OllamaClient

        rules = self._proxy.view.rules
        for pause in PAUSES:
            try:
                async with OllamaClient(self._upstream) as client:
                    names = [str(model.get("name", "")) for model in await client.tags()]
            except AbliteratedError:
                await asyncio.sleep(pause)
                continue
            if any(_key(name) in self._made for name in names) or (
                rules is not None and any(place_of(name, rules).abliterated for name in names)
            ):
                self._proxy.arm()
            return


def _key(model: str) -> str:
    try:
        return parse_name(model).key()
    except RecipeError:  # an engine may list what we would not name
        return model


def _loses_tools(certification: Mapping[str, Any]) -> bool:
    """Its certificate found that tools don't reach the prompt as they do with the base."""
    return any(
        isinstance(found, Mapping) and found.get("failure") and "tool" in str(found.get("what", ""))
        for found in certification.get("differences") or ()
    )
