"""The control API as an OpenAPI document, made from the routes themselves: what is served is what is described.

Served as `/v1/openapi.json`; docs/reference/openapi.json is what tools/reference.py wrote of it. Does not know what
routes do.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from aiohttp import web

from abliterate.contract.messages import Clean, Cleaned, ErrorBody, JobView, Status, Submit, Submitted
from abliterated import __version__

# By path and method: request, answer; what is not here is described by its handler's first line alone.
BODIES: dict[tuple[str, str], tuple[type | None, type | None]] = {
    ("/v1/status", "get"): (None, Status),
    ("/v1/jobs", "post"): (Submit, Submitted),
    ("/v1/jobs/{id}", "get"): (None, JobView),
    ("/v1/clean", "post"): (Clean, Cleaned),
}
ACTS = ("cancel", "hold", "release", "retry")
STREAMS = {"/v1/events": "text/event-stream", "/metrics": "text/plain", "/v1/jobs/{id}/log": "text/plain"}


def document(routes: list[web.RouteDef]) -> dict[str, Any]:
    """The whole document."""
    kinds = sorted({kind for pair in BODIES.values() for kind in pair if kind} | {ErrorBody}, key=lambda k: k.__name__)
    (_, schemas) = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for route in routes:
        for path in _expanded(route.path):
            paths.setdefault(path, {})[route.method.lower()] = _operation(path, route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "abliterated control API",
            "version": __version__,
            "description": "HTTP/1.1 and JSON on a unix socket; see control-api.md",
        },
        "paths": {path: paths[path] for path in sorted(paths)},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "over TCP alone"}},
        },
    }


def _expanded(path: str) -> list[str]:
    """A path with `{verb:a|b}` is one path for each verb."""
    found = re.search(r"\{\w+:([^}]*)\}", path)
    if not found:
        return [path]
    return [path.replace(found.group(0), one) for one in found.group(1).split("|")]


def _operation(path: str, route: web.RouteDef) -> dict[str, Any]:
    act = path.rpartition("/")[2]
    asked, answered = BODIES.get((path, route.method.lower()), (None, JobView if act in ACTS else None))
    content: dict[str, Any] = {}
    if path in STREAMS:
        content = {STREAMS[path]: {}}
    elif answered:
        content = {"application/json": {"schema": _ref(answered)}}
    told = (route.handler.__doc__ or "").strip().split("\n")[0]
    described: dict[str, Any] = {
        "summary": told or f"{route.method} {path}",
        "responses": {
            "200": {"description": "done", **({"content": content} if content else {})},
            "4XX": {"description": "refused", "content": {"application/json": {"schema": _ref(ErrorBody)}}},
        },
    }
    if names := re.findall(r"\{(\w+)\}", path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if asked:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(asked)}}}
    return described


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def text(routes: list[web.RouteDef]) -> str:
    return json.dumps(document(routes), indent=2, sort_keys=True) + "\n"
