"""The control API over TCP, where `[control] tcp` asks for it: same routes, behind the guard, never on Ollama's port.

Does not know what the routes do.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from aiohttp import web

from abliterate.contract.errors import AlreadyRunning
from abliterate.contract.messages import ErrorBody
from abliterated.control.guard import listen_address, refusal, token
from abliterated.control.server import Control, Handler, Middleware


def guard(token: str, port: int) -> Middleware:
    """Refuses before any route sees the request."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        twice = any(len(request.headers.getall(name, [])) > 1 for name in ("Host", "Authorization", "Origin"))
        refused = refusal(request.method, {} if twice else headers, token, port)
        if refused is None:
            return await handler(request)
        body = msgspec.json.encode(ErrorBody(error=refused.error, remedy=refused.remedy))
        return web.Response(body=body, status=refused.status, content_type="application/json")

    return check


async def serve_tcp(control: Control, listen: str, token_file: Path) -> web.AppRunner:
    """Listen at `listen`; the token is in `token_file`. Raises RecipeError, DiskError, AlreadyRunning."""
    host, port = listen_address(listen)
    app = control.application(guard(token(token_file), port))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise AlreadyRunning(
            f"control.tcp: {listen} can't be had ({error.strerror})", remedy="Give it another port"
        ) from error
    return runner
