"""Who may ask over TCP: loopback alone, with the token, from no web page. Pure but for the token's file.

A unix socket needs none of it: browsers can't reach one, and its mode says who may. Does not know the routes.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.contract.errors import DiskError, RecipeError

TOKEN_BYTES = 32
NEVER = frozenset({11434})  # Ollama's port is open to whatever OLLAMA_HOST opens it to


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    error: str
    remedy: str


def listen_address(text: str) -> tuple[str, int]:
    """Host and port of `[control] tcp`. Raises RecipeError for anything but a loopback address of its own."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback or not port.isdigit() or not 0 < int(port) < 65536:
        raise RecipeError(f"control.tcp: {text!r} is no loopback address", remedy='As in "127.0.0.1:11480"')
    if int(port) in NEVER:
        raise RecipeError(f"control.tcp: {port} is Ollama's port", remedy="Give the control API one of its own")
    return host, int(port)


def token(path: Path) -> str:
    """The token in `path`, made there if there is none: 256 bits, readable by us alone from the first moment on."""
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor) as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise RecipeError(f"{path}: others may read it", remedy="Remove it; a new one is made") from None
                return file.read().strip()
        made = secrets.token_urlsafe(TOKEN_BYTES)
        with os.fdopen(descriptor, "w") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        return made
    except OSError as error:
        raise DiskError(f"{path}: no token can be kept there ({error.strerror})", remedy="Check its owner") from error


def refusal(method: str, headers: Mapping[str, str], token: str, port: int) -> Refusal | None:
    """Why a request over TCP is refused, or None. Headers by their lower-case names."""
    host = headers.get("host", "")
    name, _, given = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if name.strip("[]") not in ("127.0.0.1", "::1", "localhost") or given != str(port):
        return Refusal(403, "not under that name", f"Ask 127.0.0.1:{port} itself")
    if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return Refusal(403, "not for web pages", "Ask from a program")
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), token.encode()):
        return Refusal(401, "no token, or not the right one", "Send Authorization: Bearer, from control.token")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method not in ("GET", "HEAD") and kind != "application/json":
        return Refusal(415, "not JSON", "Send Content-Type: application/json")
    return None
