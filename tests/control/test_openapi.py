"""The OpenAPI document and the routes that are really served are the same set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from abliterated.control.care import routes as care_routes
from abliterated.control.events import Events
from abliterated.control.openapi import _expanded
from abliterated.control.server import Control

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = json.loads((ROOT / "docs" / "reference" / "openapi.json").read_text())


def served() -> set[tuple[str, str]]:
    nobody: Any = None
    found = set()
    for route in Control(nobody, Events(), care_routes(nobody)).application().router.routes():
        if route.resource is not None and route.method != "HEAD":
            pattern = route.resource.get_info().get("pattern")
            path = route.resource.canonical
            # aiohttp's canonical form leaves out which verbs a part may be.
            if pattern is not None and (verbs := re.search(r"\(\?P<(\w+)>((?:\w+\|)+\w+)\)", pattern.pattern)):
                path = path.replace(f"{{{verbs.group(1)}}}", f"{{{verbs.group(1)}:{verbs.group(2)}}}")
            found |= {(one, route.method.lower()) for one in _expanded(path)}
    return found


def test_every_route_is_described_and_nothing_else() -> None:
    described = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == served()
    assert len(described) > 12


def test_every_reference_within_it_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in DOCUMENT["components"]["schemas"], name
