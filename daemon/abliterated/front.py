"""The proxy as the daemon keeps it: its settings, what the queue's state means for it, what a missing model leads to.

Part of the wiring: joins `proxy` with the queue without their knowing each other. Does not know HTTP.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import tomli_w

from abliterate.contract.config import Config
from abliterate.contract.errors import AbliteratedError, RecipeError
from abliterate.contract.messages import JobView, Submit, Submitted
from abliterate.contract.names import parse_name
from abliterated.assisting import Assisting
from abliterated.proxy.missing import Missed, remark_command
from abliterated.proxy.server import Proxy, Steering

log = logging.getLogger(__name__)

AT_WORK: Final = frozenset({"starting", "running"})
WAITING: Final = frozenset({"queued", "held", "registering", *AT_WORK})
SUBMITS_AN_HOUR: Final = 4
RETRY_SECONDS: Final = (10, 3600)


class Queue(Protocol):
    """What is asked of the desk."""

    async def jobs(self) -> list[JobView]: ...

    async def submit(self, wanted: Submit, actor: str) -> Submitted: ...


class Front:
    """Makes the proxy, and tells it what the queue does."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._upstream = config.proxy.upstream
        self._at_work: dict[str, JobView] = {}
        self._submitted: deque[float] = deque(maxlen=SUBMITS_AN_HOUR)
        self._idle_since = time.monotonic()
        self.proxy: Proxy | None = None
        self.assisting: Assisting | None = None
        self.queue: Queue | None = None

    def make(self, sockets: Sequence[socket.socket]) -> Proxy | None:
        """The proxy these settings ask for, not yet started; None where it is turned off."""
        settings = self._config.proxy
        if not settings.listen and not sockets:
            return None
        if settings.allow_remote and not sockets:
            log.warning(
                "the proxy may be reached from other machines at %s: whoever reaches it can use, change and delete "
                "Ollama's models, which ask for no password",
                settings.listen,
                extra={"action": "proxy_remote"},
            )
        self.proxy = Proxy(
            "" if sockets else settings.listen,
            self._upstream,
            allow_remote=settings.allow_remote,
            allowed_hosts=settings.allowed_hosts,
            sockets=sockets,
            steering=Steering(
                patterns=tuple(settings.patterns),
                aliases=tuple(settings.aliases.items()),
                others=tuple((other.pattern, other.url) for other in self._config.upstream),
                hold_seconds=settings.hold_seconds,
                observe=True,
                access_log=settings.access_log,
            ),
            remark=self.remark,
        )
        self.assisting = Assisting(self.proxy, self._upstream, settings.assist, settings.assist_more)
        return self.proxy

    def beside(self, publish: Callable[[JobView, int], None]) -> Callable[[JobView, int], None]:
        """`publish`, with us told first."""

        def both(view: JobView, number: int) -> None:
            self.job_changed(view)
            publish(view, number)

        return both

    def job_changed(self, view: JobView) -> None:
        """A job's state, as published: while one is at work, the policy of `during_jobs` is in force."""
        if view.state == "succeeded" and self.assisting is not None and view.result is not None:
            self.assisting.made(view.target, view.result.certification)
        policy = self._config.proxy.during_jobs
        was = bool(self._at_work)
        if view.state in AT_WORK:
            self._at_work[view.id] = view
        else:
            self._at_work.pop(view.id, None)
        if self.proxy is None or policy == "share":
            return
        low, high = RETRY_SECONDS
        left = max((job.remaining or 60.0 for job in self._at_work.values()), default=0.0)
        if bool(self._at_work) != was:
            busy = policy if self._at_work else "share"
            log.info("inference: %s", busy, extra={"action": "during_jobs"})
            self.proxy.change(busy=busy, retry_after=int(min(max(left, low), high)))
        elif self._at_work and self.proxy.view.retry_after != (after := int(min(max(left, low), high))):
            self.proxy.change(retry_after=after)

    async def remark(self, missed: Missed) -> str:
        """What to say of an abliterated model that is not there: who makes it, or how it would be made."""
        if self.queue is not None and (job := await self._maker(self.queue, missed)) is not None:
            return f"job {job.id} is making it ({job.state}): abliterate wait {job.id}"
        if not (self._config.proxy.auto_submit and missed.loopback and missed.base and self.queue is not None):
            return await remark_command(missed)
        try:
            job_id = await self._submit(self.queue, missed)
        except AbliteratedError as error:
            log.warning("%s was not queued: %s", missed.model, error, extra={"action": "auto_submit"})
            return await remark_command(missed)
        if not job_id:
            return await remark_command(missed)
        log.info("%s: queued as %s", missed.model, job_id, extra={"action": "auto_submit", "job": job_id})
        return f"job {job_id} will make it: abliterate wait {job_id}"

    async def _maker(self, queue: Queue, missed: Missed) -> JobView | None:
        wanted = parse_name(missed.model).key()
        for job in await queue.jobs():
            try:
                if job.state in WAITING and parse_name(job.target).key() == wanted:
                    return job
            except RecipeError:
                continue
        return None

    async def _submit(self, queue: Queue, missed: Missed) -> str:
        """Queue the job that makes it; the job's id, or nothing where it may not be."""
        now = time.monotonic()
        if len(self._submitted) == SUBMITS_AN_HOUR and now - self._submitted[0] < 3600:
            return ""
        if not await self._has(missed.base):
            return ""
        self._submitted.append(now)
        recipe = tomli_w.dumps({"model": f"ollama:{missed.base}", "name": missed.model})
        done = await queue.submit(Submit(recipe=recipe, label=missed.model), "proxy")
        return done.id

    async def _has(self, base: str) -> bool:
        from abliterated.ollama.client import OllamaClient

        wanted = parse_name(base).key()
        async with OllamaClient(self._upstream) as client:
            return any(parse_name(str(model.get("name", ""))).key() == wanted for model in await client.tags())

    def busy(self) -> bool:
        """Is a request being answered?"""
        return self.proxy is not None and self.proxy.stats.in_flight > 0

    def idle_seconds(self) -> float:
        """How long none was."""
        if self.proxy is None:
            return float("inf")
        if self.busy():
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since

    @property
    def sockets(self) -> list[socket.socket]:
        return self.proxy.sockets if self.proxy else []

    def address(self) -> str:
        return ", ".join(self.proxy.addresses) if self.proxy else ""

    def numbers(self) -> Mapping[str, float]:
        """The proxy's counters by name."""
        from abliterated.desk import stats_numbers

        return stats_numbers(self.proxy.stats) if self.proxy else {}

    def text(self) -> str:
        """The proxy's figures by route and model, as Prometheus text."""
        return self.proxy.tally.text() if self.proxy else ""
