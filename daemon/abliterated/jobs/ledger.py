"""The journal's one thread: async callers await it, other threads wait for it. Knows no SQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from abliterated.jobs.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")


class Ledger:
    """Every use of the journal goes through here, in the order it was asked."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._journal = self._thread.submit(Journal, path).result()

    async def do(self, function: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `function(journal, …)`, e.g. `await ledger.do(Journal.get, job_id)`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(self._journal, *args, **kwargs))

    def do_blocking(self, function: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same from another thread."""
        return self._thread.submit(lambda: function(self._journal, *args, **kwargs)).result()

    def close(self) -> None:
        self._thread.submit(self._journal.close).result()
        self._thread.shutdown()
