"""The only wiring: makes the rooms, joins them, starts them in order, stops them in order. Decides nothing.

Order up: lock, journal, engine, proxy, queue, spool, control. Down: the other way round, so that the proxy drains while
the engine still answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web
from filelock import FileLock, Timeout

from abliterate.contract.config import Config, local_path
from abliterate.contract.errors import AbliteratedError, DiskError, NotFound, RecipeError
from abliterate.contract.messages import EngineView, JobView, Task
from abliterate.contract.paths import Home
from abliterate.contract.recipe import Recipe
from abliterated import __version__, refuser, succession
from abliterated.care import Care
from abliterated.config import EngineKind, engine_kind, prepare_home, surroundings, until_listening
from abliterated.control.care import routes as care_routes
from abliterated.control.events import Events
from abliterated.control.server import Control
from abliterated.control.tcp import serve_tcp
from abliterated.daemon_lock import taken
from abliterated.desk import QueueDesk, certificates
from abliterated.engine_process import EngineProcess
from abliterated.front import Front
from abliterated.handover import Handover
from abliterated.jobs import gpu
from abliterated.jobs.awake import Awake
from abliterated.jobs.cluster import Cluster, token
from abliterated.jobs.dispatcher import Dispatcher, product_is_there
from abliterated.jobs.journal import Job
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.on_finish import OnFinish
from abliterated.jobs.remote import RayExecutor
from abliterated.jobs.runner import LocalExecutor
from abliterated.service import Supervisor, inherited_sockets
from abliterated.spool import watch
from abliterated.spool.tray import Tray

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
ENGINE_VIEW_SECONDS = 2.0


class App:
    """One daemon. `run()` serves until SIGTERM or SIGINT; returns the exit code."""

    def __init__(self, config: Config, home: Home, control_socket: Path, parent_fd: int | None = None) -> None:
        self.config = config
        self._parent_fd = parent_fd
        self.home = home
        self._control_socket = control_socket
        self._upstream = config.proxy.upstream
        self._kind: EngineKind = "ollama"
        self._engine_view: tuple[float, EngineView] | None = None
        self._front = Front(config)
        self._executor = executor(config)
        self._handover = Handover(self._upstream, self._front.busy, home.state / "left.json")
        self._fallen: BaseException | None = None
        self._kept: dict[str, list[int]] | None = None  # listeners for this process's next life

    async def run(self) -> int:
        prepare_home(self.home)
        if watch.filesystem(self.home.state) in watch.NETWORK_FILESYSTEMS:
            log.warning("%s: on a network; a journal wants a local disk", self.home.state, extra={"action": "config"})
        lock = take_daemon_lock(self.home.daemon_lock)
        environ = dict(os.environ)
        supervisor = Supervisor()
        inherited = inherited_sockets()
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._serve(stack, supervisor, inherited)
        finally:
            lock.release()
        if isinstance(self._fallen, AbliteratedError):
            raise self._fallen
        if self._kept is not None and not self._fallen:
            succession.replace_process(self._kept, environ)
        # Not 0: a service manager must know that this was no stop.
        return 1 if self._fallen else 0

    async def _serve(
        self, stack: contextlib.AsyncExitStack, supervisor: Supervisor, inherited: dict[str, list[socket.socket]]
    ) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        restarting = asyncio.Event()
        if self._parent_fd is None and not succession.in_a_terminal():  # whoever holds that would not know us again
            loop.add_signal_handler(signal.SIGHUP, restarting.set)
        if self._parent_fd is not None:
            # Whoever started us holds the other end; when it is gone, so are we.
            loop.add_reader(self._parent_fd, stopping.set)
            stack.callback(loop.remove_reader, self._parent_fd)
        ledger = await asyncio.to_thread(Ledger, self.home.journal)
        stack.callback(ledger.close)
        self._kind = engine_kind(self.config, await asyncio.to_thread(surroundings, self._upstream))
        events = Events()
        finished = OnFinish(self.config.jobs.on_finish)
        stack.push_async_callback(finished.close)

        def publish(view: JobView, number: int) -> None:
            finished(view, number)
            events.publish(view, number)

        dispatcher = Dispatcher(
            ledger,
            self.home.jobs,
            prepare=self.prepare,
            register=self._handover.register,
            release=self._handover.release,
            abandon=self._handover.abandon,
            publish=self._front.beside(publish),
            idle_seconds=self._front.idle_seconds,
            retries=self.config.jobs.retries,
            executor=self._executor,
            devices=gpu.devices if isinstance(self._executor, LocalExecutor) else self._executor.devices,
            locks=self.home.locks if self._executor.here else None,
            store=self._store,
            present=self._present,
            awake=Awake(),
        )
        if self._kind == "embedded":
            engine = EngineProcess(
                self._upstream, self.home.engine_models, self.home.state / "engine.log", dispatcher.engine_answers
            )
            self._keep(stack, engine.run(), engine.stop)
        await self._start_proxy(stack, inherited.get("proxy", []), ledger)
        desk = QueueDesk(
            ledger,
            dispatcher,
            self.home.jobs,
            # The demo's own prompts come with the program, and hold nothing of anybody's.
            roots=[*self.config.paths.models, str(refuser.files().model.parent)],
            engine=self.engine_view,
            proxy_address=self._front.address(),
            proxy_numbers=self._front.numbers,
            proxy_text=self._front.text,
            tell=lambda job: events.publish(dispatcher.view(job), 0),
            rejected=self.home.rejected,
            keep_days=self.config.jobs.keep_days,
        )
        self._front.queue = desk
        self._keep(stack, dispatcher.run(), dispatcher.stop)
        await desk.sweep()
        self._keep(stack, desk.keep_clean(), None)
        tray = Tray(self.home.incoming, self.home.rejected, desk.check, desk.accept, desk.gone)
        spool_ends = asyncio.Event()
        self._keep(stack, watch.keep(self.home.incoming, tray.scan, spool_ends), _setter(spool_ends))
        care = Care(self._upstream, self.config, self.home, named=desk.named, proxy=desk.proxy_address())
        control_kept = succession.keep(inherited.get("control", []))
        await self._start_control(stack, Control(desk, events, care_routes(care)), inherited.get("control", []))
        if supervisor.watchdog_seconds:
            self._keep(stack, _feed(supervisor), None)
        supervisor.tell(READY=1, STATUS=f"serving {self._kind} at {self._upstream}")
        log.info(
            "abliterated %s: spool %s, engine %s at %s",
            __version__,
            self.home.incoming,
            self._kind,
            self._upstream,
            extra={"action": "ready"},
        )
        await _either(stopping, restarting)
        if restarting.is_set() and not stopping.is_set():
            self._kept = {"proxy": succession.keep(self._front.sockets), "control": control_kept}
            supervisor.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000, STATUS="restarting")
            log.info("restarting: who knocks meanwhile waits", extra={"action": "restarting"})
            return
        supervisor.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=int((DRAIN_SECONDS + 15) * 1e6))
        log.info("stopping", extra={"action": "stopping"})

    # --- rooms --------------------------------------------------------------------------------------------------

    async def _start_proxy(
        self, stack: contextlib.AsyncExitStack, sockets: list[socket.socket], ledger: Ledger
    ) -> None:
        proxy = self._front.make(sockets)
        if proxy is not None:
            if sockets and self._kind == "embedded":
                await until_listening(self._upstream)  # who knocks now waits, rather than being told of no engine
            await proxy.start()
            if self._front.assisting is not None:
                stack.push_async_callback(self._front.assisting.close)
                self._front.assisting.begin(lambda: ledger.do(certificates))
            stack.push_async_callback(proxy.close, DRAIN_SECONDS)

    async def _start_control(
        self, stack: contextlib.AsyncExitStack, control: Control, sockets: list[socket.socket]
    ) -> None:
        runner = web.AppRunner(control.application(), access_log=None, handler_cancellation=True, shutdown_timeout=2)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        listener = sockets[0] if sockets else control_listener(self._control_socket)
        await web.SockSite(runner, listener).start()
        if not sockets:
            stack.callback(self._control_socket.unlink, missing_ok=True)
        if self.config.control.tcp:
            tcp = await serve_tcp(control, self.config.control.tcp, self.home.state / "control.token")
            stack.push_async_callback(tcp.cleanup)
        stack.callback(control.stop)

    def _keep(
        self, stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None], stop: Any | None
    ) -> asyncio.Task[None]:
        """Run `work` beside the rest; at the end ask it to stop and wait. Its failure is logged, never swallowed."""
        task = asyncio.get_running_loop().create_task(work)

        def report(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and (error := done.exception()):
                self._fallen = self._fallen or error
                trace = None if isinstance(error, AbliteratedError) else error
                log.critical("a room of the daemon fell: %s", error, exc_info=trace, extra={"action": "fallen"})
                os.kill(os.getpid(), signal.SIGTERM)

        task.add_done_callback(report)

        async def end() -> None:
            if stop is None:
                task.cancel()
            else:
                await stop()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)
        return task

    # --- what the queue asks of the engine ----------------------------------------------------------------------

    async def prepare(self, job: Job, folder: Path) -> Task:
        """Resolve the recipe's names to files and give the worker its task."""
        recipe = job.recipe
        source, digest = await self._handover.base(recipe, job.target, folder)
        lock = await asyncio.to_thread(gpu.lock_file, self.home.locks, recipe.run.device)
        shared = self._executor.here and lock.name != gpu.CPU_LOCK
        work, out = folder / "work", folder / "out"
        await asyncio.to_thread(_make_folders, work, out)
        if shared:
            await self._handover.make_room(job.id)
        return Task(
            recipe=recipe,
            base=recipe.model,
            source=source,
            work=str(work),
            output=str(out),
            base_digest=digest,
            job=job.id,
            remote_code=self.config.trust.remote_code,
            lock=str(lock) if self._executor.here else "",
            converter=await self._converter(recipe),
            engine=self._upstream,
        )

    def _store(self, task: Task) -> Path | None:
        """Where the engine will keep its copy: the embedded one in our home, Ollama beside the base's blob."""
        if self._kind == "embedded":
            return self.home.engine_models
        return Path(task.source).parent if task.base_digest.startswith("sha256:") and task.source else None

    async def _present(self, job: Job, out: Path) -> bool:
        """Whether what an ended job made is still there: in the engine, or in its folder."""
        if job.result is None or job.result.format != "gguf" or not job.recipe.export.register:
            return await product_is_there(job, out)
        from abliterated.ollama.client import OllamaClient

        async with OllamaClient(self._upstream) as client:
            try:
                await client.show(job.target)
            except NotFound:
                return False
        return True

    async def _converter(self, recipe: Recipe) -> str:
        """What makes a GGUF of a folder: the user's converter, else the engine's importer where it has one.

        Raises EngineUnavailable while that can't be told: the product is to be registered there.
        """
        if self.config.tools.converter:
            return str(local_path(self.config.tools.converter))
        local = recipe.model.startswith("ollama:") or recipe.model.endswith(".gguf")
        if self._kind != "ollama" or local or recipe.export.format != "gguf" or not recipe.export.register:
            return ""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.importer import converts

        async with OllamaClient(self._upstream) as client:
            return client.url if converts(await client.version()) else ""

    async def engine_view(self) -> EngineView:
        """Whether the engine answers; asked at most every ENGINE_VIEW_SECONDS."""
        from abliterated.ollama.client import OllamaClient

        now = time.monotonic()
        if self._engine_view and now - self._engine_view[0] < ENGINE_VIEW_SECONDS:
            return self._engine_view[1]
        view = EngineView(kind=self._kind, url=self._upstream)
        with contextlib.suppress(AbliteratedError, TimeoutError):
            async with OllamaClient(self._upstream) as client:
                version = await asyncio.wait_for(client.version(), 1.0)
            view = EngineView(kind=self._kind, url=self._upstream, version=version.text, answers=True)
        self._engine_view = (now, view)
        return view


def executor(config: Config) -> LocalExecutor | RayExecutor:
    """Where workers run."""
    if config.jobs.executor == "local":
        return LocalExecutor()
    ray = config.ray
    cluster = Cluster(ray.address, token(os.environ))
    return RayExecutor(cluster, python=ray.python, cpus=ray.cpus, gpus=ray.gpus, jobs=ray.jobs)


def take_daemon_lock(path: Path) -> FileLock:
    """One daemon a home. Raises AlreadyRunning that names the other."""
    lock = FileLock(path, mode=0o640, preserve_lock_file=True, fallback_to_soft=False)
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0.2)
    except OSError as error:
        if isinstance(error, Timeout):
            raise taken(path) from None
        raise DiskError(f"{path}: can't be locked ({error.strerror})", remedy="Check who owns paths.state") from error
    holder.write_text(f"pid {os.getpid()}\n")
    return lock


def control_listener(path: Path) -> socket.socket:
    """The control socket, 0660, in a folder only we can enter. A stale one is replaced: the home is ours by lock."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"{path}: no socket can be made there ({error.strerror or error})",
            remedy="Set [control] socket to a shorter path in a folder of yours",
        ) from error
    listener.listen(128)
    return listener


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)


def _setter(event: asyncio.Event) -> Any:
    async def set_it() -> None:
        event.set()

    return set_it


async def _either(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _feed(supervisor: Supervisor) -> None:
    """The watchdog is fed by the loop itself: a loop that hangs starves it."""
    while True:
        supervisor.tell(WATCHDOG=1)
        await asyncio.sleep(supervisor.watchdog_seconds / 2)


def run(config: Config, home: Home, control_socket: Path, parent_fd: int | None = None) -> int:
    """Serve in the foreground until told to stop."""
    from abliterated.proxy.server import new_event_loop

    app = App(config, home, control_socket, parent_fd)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(app.run())
