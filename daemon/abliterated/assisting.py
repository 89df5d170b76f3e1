"""Help in the proxy as a program keeps it: made from the settings, armed once an abliterated model is known to exist.

Until then no request is held for its name. Armed by what the engine lists at the start, by a finished job, and by the
first request that names such a model. Part of the wiring; does not know HTTP, nor how help works.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from abliterate.contract.errors import AbliteratedError
from abliterated.proxy.routing import place_of
from abliterated.proxy.server import Proxy
from abliterated.proxy.tools.assistant import Assist, Help, More

PAUSES: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # while the engine does not answer yet


class Assisting:
    """One proxy's. `begin` inside the running loop, once the proxy serves; `close` at the end."""

    def __init__(self, proxy: Proxy, upstream: str, help: Help, more: Sequence[More] = ()) -> None:
        self._proxy = proxy
        self._upstream = upstream
        self._looking: asyncio.Task[None] | None = None
        self.assist = Assist(help=help, more=frozenset(more)) if help != "off" else None
        if self.assist is not None:
            proxy.assistant, proxy.wanted = self.assist, self.assist.wanted

    def begin(self) -> None:
        if self.assist is not None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

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
            self.assist.knowledge.forget()
            self.assist.trust(model, tools=not _loses_tools(certification))
            self._proxy.arm()

    async def _look(self) -> None:
        """Arm, if the engine has such a model; it may not be up yet."""
        from abliterated.ollama.client import OllamaClient

        rules = self._proxy.view.rules
        for pause in PAUSES:
            try:
                async with OllamaClient(self._upstream) as client:
                    names = [str(model.get("name", "")) for model in await client.tags()]
            except AbliteratedError:
                await asyncio.sleep(pause)
                continue
            if rules is not None and any(place_of(name, rules).abliterated for name in names):
                self._proxy.arm()
            return


def _loses_tools(certification: Mapping[str, Any]) -> bool:
    """Its certificate found that tools don't reach the prompt as they do with the base."""
    return any(
        isinstance(found, Mapping) and found.get("failure") and "tool" in str(found.get("what", ""))
        for found in certification.get("differences") or ()
    )
