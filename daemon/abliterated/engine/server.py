"""The engine's front: routes, errors in the shape of the API they were asked in, and who may ask.

Does not know: how the process began and ends, what the routes do.
"""

from __future__ import annotations

import logging
import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from abliterated.engine import messages_api, models_api, ollama_api, openai_api, responses_api
from abliterated.engine.errors import refusal
from abliterated.engine.origins import host_allowed, origin_allowed
from abliterated.engine.replies import answer
from abliterated.engine.service import Service
from abliterated.shapes.refusals import Refused, anthropic_shape, ollama_shape, openai_shape

log = logging.getLogger(__name__)

_LARGEST_BODY = 1 << 29  # a JSON body, images in it; blobs are streamed and know no limit
_ALLOW_HEADERS = "Authorization, Content-Type, User-Agent, Accept, X-Requested-With, x-stainless-*"


def build(service: Service, *, loopback: bool) -> web.Application:
    app = web.Application(middlewares=[_guard(loopback), _errors], client_max_size=_LARGEST_BODY)
    app[ollama_api.SERVICE] = service
    get, post = app.router.add_get, app.router.add_post
    for path, handler in (
        ("/", models_api.root),
        ("/api/version", models_api.version),
        ("/api/tags", models_api.tags),
    ):
        get(path, handler, allow_head=True)
    get("/api/status", models_api.status, allow_head=False)
    get("/api/ps", models_api.ps, allow_head=False)
    post("/api/show", models_api.show_route)
    post("/api/create", models_api.create)
    post("/api/copy", models_api.copy)
    app.router.add_delete("/api/delete", models_api.delete)
    app.router.add_head("/api/blobs/{digest}", models_api.has_blob)
    post("/api/blobs/{digest}", models_api.put_blob)
    post("/api/pull", models_api.no_registry)
    post("/api/push", models_api.no_registry)
    post("/api/generate", ollama_api.generate_route)
    post("/api/chat", ollama_api.chat_route)
    post("/api/embed", ollama_api.embed_route)
    post("/api/embeddings", ollama_api.embeddings_route)
    get("/v1/models", openai_api.models, allow_head=False)
    get("/v1/models/{model}", openai_api.model, allow_head=False)
    post("/v1/chat/completions", openai_api.chat_completions)
    post("/v1/completions", openai_api.completions)
    post("/v1/embeddings", openai_api.embeddings)
    post("/v1/responses", responses_api.responses)
    post("/v1/messages", messages_api.messages)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    shape = openai_shape if request.path.startswith("/v1/") else ollama_shape
    if request.path == "/v1/messages":
        shape = anthropic_shape
    began = time.monotonic()
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return web.Response(status=404, text="404 page not found")
    except web.HTTPMethodNotAllowed as error:
        headers = {"Allow": ", ".join(sorted(error.allowed_methods))}
        return web.Response(status=405, text="405 method not allowed", headers=headers)
    except web.HTTPRequestEntityTooLarge:
        most = f"{_LARGEST_BODY >> 20} MiB"
        refused = Refused(413, "http: request body too large", remedy=f"Send fewer images at once: {most} are read")
    except ConnectionError:
        raise  # the client went away: nobody to answer
    except Exception as error:
        refused = refusal(error)
    seconds = round(time.monotonic() - began, 3)
    log.info(
        str(refused), extra={"action": "refuse", "path": request.path, "status": refused.status, "seconds": seconds}
    )
    return answer(shape(refused), refused.status)


def _guard(loopback: bool) -> Middleware:
    """On loopback, keep out what a web page could send; tell pages that are welcome that they are."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        if (loopback and not host_allowed(host)) or not origin_allowed(origin, host):
            return web.Response(status=403)
        if request.method == "OPTIONS":
            response: web.StreamResponse = web.Response(
                status=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
                    "Access-Control-Allow-Headers": request.headers.get(
                        "Access-Control-Request-Headers", _ALLOW_HEADERS
                    ),
                    "Access-Control-Max-Age": "43200",
                },
            )
            if origin:
                response.headers["Access-Control-Allow-Origin"] = origin
            return response
        return await handler(request)

    return guard


async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    """Streams send their headers before the middleware sees them, so this is a signal."""
    if (origin := request.headers.get("Origin")) and response.status != 403:
        response.headers["Access-Control-Allow-Origin"] = origin
