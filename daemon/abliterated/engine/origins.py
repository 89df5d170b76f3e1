"""Who may talk to an engine on loopback: the guard against a web page that reaches for localhost. Pure.

A Host that is no address or name of this machine is refused (DNS rebinding), an Origin that is neither local nor an
application's too. Does not know: sockets, routes.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

_LOCAL_ENDINGS = (".localhost", ".local", ".internal")
_APPLICATIONS = (
    "app",
    "file",
    "tauri",
    "vscode-webview",
    "vscode-file",
    "chrome-extension",
    "moz-extension",
    "safari-web-extension",
)


def host_allowed(header: str | None) -> bool:
    """Whether the Host header names this machine."""
    host = _host(header or "")
    if host in ("", "localhost", socket.gethostname().lower()) or host.endswith(_LOCAL_ENDINGS):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


def origin_allowed(origin: str | None, host: str | None) -> bool:
    """Whether a page of that origin may use the engine."""
    if not origin:
        return True
    try:
        parts = urlsplit(origin)
        name = parts.hostname
    except ValueError:
        return False
    if parts.scheme in _APPLICATIONS:
        return True
    if parts.scheme not in ("http", "https"):
        return False
    return parts.netloc == host or name in ("localhost", "127.0.0.1", "0.0.0.0", "::1")  # noqa: S104


def _host(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()
