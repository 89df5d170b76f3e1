"""A Ray cluster's job submission API, as much of it as a worker needs, over HTTP: submit, look, stop, find.

Ray itself is not imported: it need not be installed where the daemon runs. Does not know what is submitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from abliterate.contract.errors import EngineUnavailable

QUICK = aiohttp.ClientTimeout(total=30, connect=5)
T = TypeVar("T")
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class ClusterAway(EngineUnavailable):
    """The cluster can't be asked now, or does not take what it is asked: people mend that, and the job waits."""


class Submission(msgspec.Struct, frozen=True):
    """A submitted job as the cluster tells of it; `driver_exit_code` is None where its node was lost."""

    status: str
    submission_id: str | None = None
    message: str | None = None
    driver_exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Cluster:
    """The cluster at `address` (http://HEAD:8265). `token`: of a cluster that asks for one."""

    address: str
    token: str = ""

    async def submit(
        self, entrypoint: str, submission_id: str, environment: Mapping[str, str], cpus: float, gpus: float
    ) -> None:
        """Have a shell command run where so many processors and GPUs are free. Raises ClusterAway."""
        asked = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": dict(environment)},
            "entrypoint_num_cpus": cpus,
            "entrypoint_num_gpus": gpus,
        }
        await self._ask("POST", "/api/jobs/", asked)

    async def look(self, submission_id: str) -> Submission | None:
        """What became of it; None where the cluster has forgotten it. Raises ClusterAway."""
        told = await self._ask("GET", f"/api/jobs/{quote(submission_id)}", missing=True)
        return None if told is None else _read(told, Submission)

    async def stop(self, submission_id: str) -> None:
        """Ask it to end; Ray ends it after the seconds its environment allows. Raises ClusterAway."""
        await self._ask("POST", f"/api/jobs/{quote(submission_id)}/stop", missing=True)

    async def at_work(self, prefix: str) -> list[str]:
        """The submissions so called that have not ended. Raises ClusterAway."""
        told = await self._ask("GET", "/api/jobs/")
        found = [(one.submission_id or "", one.ended) for one in _read(told or b"[]", list[Submission])]
        return [name for name, ended in found if name.startswith(prefix) and not ended]

    async def _ask(self, method: str, path: str, body: Any = None, missing: bool = False) -> bytes | None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            async with (
                aiohttp.ClientSession(timeout=QUICK, headers=headers) as session,
                session.request(method, self.address.rstrip("/") + path, json=body) as answer,
            ):
                told = await answer.read()
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise ClusterAway(
                f"the Ray cluster at {self.address} does not answer ({str(error) or type(error).__name__})",
                remedy="Start it, or correct [ray] address",
            ) from error
        if answer.status == 404 and missing:
            return None
        if answer.status in (401, 403):
            raise ClusterAway(
                f"the Ray cluster at {self.address} asks for a token, or another one",
                remedy="Give the daemon RAY_AUTH_TOKEN or the credential ray_token",
            )
        if answer.status >= 400:
            lines = told.decode(errors="replace").strip().splitlines() or [str(answer.status)]
            raise ClusterAway(
                f"the Ray cluster at {self.address} refused: {lines[-1][:300]}", remedy="See its dashboard"
            )
        return told


def _read(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ClusterAway(f"that is no Ray cluster's answer ({error})", remedy="Correct [ray] address") from error


def token(environ: Mapping[str, str]) -> str:
    """The cluster's token: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, or the credential `ray_token`."""
    if told := environ.get("RAY_AUTH_TOKEN", ""):
        return told
    places = [environ.get("RAY_AUTH_TOKEN_PATH", "")]
    if credentials := environ.get("CREDENTIALS_DIRECTORY", ""):
        places.append(f"{credentials}/ray_token")
    for place in filter(None, places):
        try:
            return Path(place).read_text().strip()
        except OSError:
            continue
    return ""
