"""The routes about models: `/v1/models`, `/v1/doctor`, `/v1/repair`, `/v1/undo`. Parses, calls, answers.

Does not know engines.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec
from aiohttp import web

from abliterate.contract.care import (
    Diagnosis,
    DoctorRequest,
    Models,
    Repaired,
    RepairRequest,
    Undone,
    UndoRequest,
)
from abliterate.contract.errors import RecipeError

T = TypeVar("T")


class CareDesk(Protocol):
    """What these routes may ask; `abliterated.care` answers."""

    async def doctor(self, wanted: DoctorRequest) -> Diagnosis: ...
    async def repair(self, wanted: RepairRequest) -> Repaired: ...
    async def undo(self, wanted: UndoRequest) -> Undone: ...
    async def models(self) -> Models: ...


def routes(care: CareDesk) -> list[web.RouteDef]:
    """To be added to the control application."""

    async def doctor(request: web.Request) -> web.Response:
        return _json(await care.doctor(await _body(request, DoctorRequest)))

    async def repair(request: web.Request) -> web.Response:
        return _json(await care.repair(await _body(request, RepairRequest)))

    async def undo(request: web.Request) -> web.Response:
        return _json(await care.undo(await _body(request, UndoRequest)))

    async def models(request: web.Request) -> web.Response:
        return _json(await care.models())

    return [
        web.get("/v1/models", models),
        web.post("/v1/doctor", doctor),
        web.post("/v1/repair", repair),
        web.post("/v1/undo", undo),
    ]


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise RecipeError(f"not understood: {error}", remedy='Send {"model": "NAME"}') from error


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
