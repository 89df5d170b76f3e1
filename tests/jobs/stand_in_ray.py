"""What answers Ray's job submission API as Ray 2.60 does, and runs entrypoints in a shell of this machine."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Submitted:
    asked: dict[str, Any]
    process: asyncio.subprocess.Process | None = None
    status: str = "PENDING"
    code: int | None = None
    stopped: bool = False


@dataclass
class StandInRay:
    """`jobs` by submission id. `full`: nothing starts. `lose()`: a node is gone, with what ran there."""

    port: int
    token: str = ""
    full: bool = False
    jobs: dict[str, Submitted] = field(default_factory=dict)
    _runner: web.AppRunner | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_get("/api/jobs/{id}", self._look)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def close(self) -> None:
        for job in self.jobs.values():
            if job.process is not None and job.process.returncode is None:
                job.process.kill()
        await asyncio.gather(*self._tasks)
        if self._runner is not None:
            await self._runner.cleanup()

    def lose(self, submission: str) -> None:
        job = self.jobs[submission]
        job.status = "FAILED"
        assert job.process is not None
        job.process.kill()

    async def _run(self, job: Submitted) -> None:
        while self.full and not job.stopped:
            await asyncio.sleep(0.02)
        if job.stopped:
            job.status = "STOPPED"
            return
        job.process = await asyncio.create_subprocess_shell(
            job.asked["entrypoint"], env={**os.environ, **job.asked["runtime_env"]["env_vars"]}, start_new_session=True
        )
        job.status = "RUNNING"
        code = await job.process.wait()
        if job.status == "RUNNING":
            job.code = code
            job.status = "STOPPED" if job.stopped else "SUCCEEDED" if code == 0 else "FAILED"

    async def _submit(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        asked = await request.json()
        if asked["submission_id"] in self.jobs:
            return web.Response(status=500, text=f"Traceback\nValueError: {asked['submission_id']} already exists.")
        job = self.jobs[asked["submission_id"]] = Submitted(asked)
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        return web.json_response({"submission_id": asked["submission_id"]})

    def _told(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        message = {"PENDING": "Job has not started yet.", "FAILED": "the entrypoint failed"}.get(job.status)
        return {"submission_id": name, "status": job.status, "message": message, "driver_exit_code": job.code}

    async def _list(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        return web.json_response([self._told(name) for name in self.jobs])

    async def _look(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        return web.json_response(self._told(name)) if name in self.jobs else web.Response(status=404)

    async def _stop(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.Response(status=404)
        job.stopped = True
        if job.process is not None and job.process.returncode is None:
            os.killpg(job.process.pid, signal.SIGTERM)
        return web.json_response({"stopped": True})
