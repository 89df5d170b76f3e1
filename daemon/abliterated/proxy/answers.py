"""The few answers that are our own, in the shape of the API that was asked, naming us as their source.

Does not know: when they are given.
"""

from __future__ import annotations

import http
import json
from typing import Final

from abliterated.proxy.framing import Head
from abliterated.proxy.policy import Answer

SOURCE: Final = "abliterated-proxy"

_OPENAI_TYPES = {400: "invalid_request_error", 403: "permission_error", 404: "not_found_error"}


def render(
    status: int, message: str, *, method: bytes = b"GET", target: bytes = b"", extra: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """A whole answer, after which the connection closes.

    `/api/*` and what is unknown get Ollama's shape, `/v1/*` OpenAI's, `/v1/messages` Anthropic's, `/` plain text;
    an empty message gives an empty body, as Ollama's own guards do.
    """
    path = target.partition(b"?")[0]
    kind = "application/json; charset=utf-8"
    if not message:
        body = ""
    elif path == b"/":
        kind, body = "text/plain; charset=utf-8", message
    else:
        body = json.dumps(_shape(status, message, path), ensure_ascii=False)
    encoded = body.encode()
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Server: {SOURCE}"]
    if encoded:
        lines.append(f"Content-Type: {kind}")
    lines += [f"{name}: {value}" for name, value in extra]
    lines += [f"Content-Length: {len(encoded)}", "Connection: close", "", ""]
    head = "\r\n".join(lines).encode()
    return head if method == b"HEAD" else head + encoded


def for_request(answer: Answer, head: Head | None) -> bytes:
    """A policy's answer to one request."""
    method, target = (head.method, head.target) if head is not None else (b"GET", b"")
    return render(answer.status, answer.message, method=method, target=target, extra=answer.extra)


def _shape(status: int, message: str, path: bytes) -> dict[str, object]:
    kind = _OPENAI_TYPES.get(status, "api_error")
    if path.startswith(b"/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": message}, "source": SOURCE}
    if path.startswith(b"/v1/"):
        return {"error": {"message": message, "type": kind, "param": None, "code": None}, "source": SOURCE}
    return {"error": message, "source": SOURCE}
