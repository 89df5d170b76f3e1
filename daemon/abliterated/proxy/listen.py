"""Addresses: what `--listen` and `--upstream` may say, and the sockets bound to them.

Does not know: what is spoken on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

from abliterate.contract.errors import AlreadyRunning, RecipeError

_HOST_PORT = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\[\]:/?#@\s]*)):(?P<port>[0-9]{1,5})")


class Address(msgspec.Struct, frozen=True):
    """A TCP address (`host` may be empty: every interface) or, with `path`, a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def literal(self) -> bool:
        """No name has to be looked up for it."""
        try:
            return bool(self.path) or bool(ipaddress.ip_address(self.host.partition("%")[0]))
        except ValueError:
            return False

    @property
    def loopback(self) -> bool:
        """Only this machine reaches it."""
        return bool(self.path) or _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def parse_listen(text: str) -> Address:
    """`127.0.0.1:11434`, `[::1]:11434`, `:11434` (every interface, as in OLLAMA_HOST) or `unix:/path`."""
    if text.startswith("unix:"):
        return _unix(text, "listen address")
    match = _HOST_PORT.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise RecipeError(
            f"the listen address {text!r} is not one",
            remedy="write 127.0.0.1:11434, [::1]:11434, :11434 (every interface) or unix:/path/to/socket",
        )
    return Address(match["six"] or match["host"] or "", int(match["port"]))


def parse_upstream(text: str) -> Address:
    """`http://host:port` or `unix:/path`."""
    if text.startswith("unix:"):
        return _unix(text, "upstream")
    rest = text[7:].removesuffix("/") if text.lower().startswith("http://") else ""
    match = _HOST_PORT.fullmatch(rest) or _HOST_PORT.fullmatch(f"{rest}:80")
    host = (match["six"] or match["host"]) if match else ""
    if match is None or not 0 < int(match["port"]) <= 65535 or not _may_be_name(host):
        raise RecipeError(
            f"the upstream {text!r} is not an address the proxy can speak to",
            remedy="write http://127.0.0.1:11435 (no https, no path) or unix:/path/to/socket",
        )
    return Address(host, int(match["port"]))


def _may_be_name(host: str) -> bool:
    try:
        return bool(host.encode("idna"))
    except UnicodeError:  # an empty label, or one too long: looking it up would fail in no ordinary way
        return False


def _unix(text: str, what: str) -> Address:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or len(os.fsencode(path)) > 100:
        raise RecipeError(
            f"the {what} {text!r} is not a socket's path", remedy="write unix:/absolute/path, under 100 bytes"
        )
    return Address(path=path)


def bind(address: Address) -> list[socket.socket]:
    """Sockets bound to the address, not yet listening; all or none."""
    if address.path:
        return [_bind_unix(address)]
    if address.host:
        hosts = _resolve(address)
    else:
        hosts = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]  # noqa: S104 (the caller has asked, and was warned)
    bound: list[socket.socket] = []
    port = address.port
    try:
        for family, host in hosts:
            try:
                listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            except OSError:
                continue  # no IPv6 here
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((host, port))
                listener.listen(1024)  # here already: a second proxy must fail now, not later
            except OSError as error:
                listener.close()
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                raise
            listener.setblocking(False)
            bound.append(listener)
            port = listener.getsockname()[1]
    except OSError as error:
        for listener in bound:
            listener.close()
        raise _bind_error(address, error) from error
    if not bound:
        raise RecipeError(
            f"no interface of this machine has the address {address}", remedy="choose another to listen on"
        )
    return bound


def _resolve(address: Address) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter of what no name may look like
        raise RecipeError(
            f"the name {address.host!r} can't be resolved ({error})", remedy="listen on an IP address"
        ) from error
    return list(dict.fromkeys((int(family), str(where[0])) for family, _, _, _, where in found))


def _bind_error(address: Address, error: OSError) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return AlreadyRunning(
            f"{address} is taken: another program listens there",
            remedy="move Ollama with OLLAMA_HOST=127.0.0.1:11435, stop the other proxy, or listen elsewhere",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return RecipeError(
            f"this user may not listen on {address}", remedy="choose a port above 1023, or a folder you own"
        )
    return RecipeError(f"can't listen on {address}: {error.strerror or error}", remedy="choose another address")


def _bind_unix(address: Address) -> socket.socket:
    path = Path(address.path)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RecipeError(
                f"can't listen on {address}: what lies there is no socket",
                remedy="move it away, or choose another",
            )
        _clear_stale(address)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _bind_error(address, error) from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise _bind_error(address, error) from error
    listener.setblocking(False)
    return listener


def _clear_stale(address: Address) -> None:
    """Unlink a socket nobody listens on any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            Path(address.path).unlink(missing_ok=True)
        except OSError as error:
            raise _bind_error(address, error) from error
        else:
            raise _bind_error(address, OSError(errno.EADDRINUSE, "in use"))


def inodes(bound: Iterable[Address]) -> dict[str, int]:
    """The unix sockets among these, by path."""
    return {address.path: Path(address.path).lstat().st_ino for address in bound if address.path}


def unlink(made: dict[str, int]) -> None:
    """Remove our unix sockets, unless a successor has already put its own there."""
    for path, inode in made.items():
        with contextlib.suppress(OSError):
            if Path(path).lstat().st_ino == inode:
                Path(path).unlink()


def keep_alive(listener: socket.socket) -> None:
    """Who is accepted here and vanishes without a word is noticed, as soon as Ollama would."""
    if listener.family == socket.AF_UNIX:
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 9)):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def bound_address(listener: socket.socket) -> Address:
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Address(path=os.fsdecode(name))
    return Address(str(name[0]), int(name[1]))


def machine_addresses() -> frozenset[str]:
    """The IP addresses of this machine's interfaces."""
    return frozenset(
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    )


def check_not_self(bound: Iterable[Address], upstream: Address) -> None:
    """A proxy whose upstream is itself would call itself until no socket is left."""
    mine = list(bound)
    for address in mine:
        if upstream.path:
            same = bool(address.path) and os.path.realpath(address.path) == os.path.realpath(upstream.path)
        else:
            same = not address.path and address.port == upstream.port and _meets(address.host, upstream.host)
        if same:
            raise RecipeError(
                f"the proxy at {address} would be its own upstream ({upstream})",
                remedy="give Ollama another address, for instance OLLAMA_HOST=127.0.0.1:11435",
            )


def _meets(listening: str, called: str) -> bool:
    """Would a call to the host `called` reach a listener on `listening`?"""
    try:
        found = {str(where[0]).partition("%")[0] for _, _, _, _, where in socket.getaddrinfo(called, None)}
    except OSError:
        return False  # a name that can't be resolved now is not us now; calls to it will be answered 502
    here = ipaddress.ip_address(listening.partition("%")[0])
    local = machine_addresses()
    for text in found:
        there = ipaddress.ip_address(text)
        if there == here or there.is_unspecified:
            return True
        if here.is_unspecified and (there.is_loopback or text in local):
            return True
    return False


def peer_of(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end, for people."""
    name = transport.get_extra_info("peername")
    return str(Address(str(name[0]), int(name[1]))) if isinstance(name, tuple) else "unix"


def is_local(transport: asyncio.BaseTransport) -> bool:
    """Is the other end on this machine?"""
    name = transport.get_extra_info("peername")
    return _is_loopback(str(name[0]).removeprefix("::ffff:")) if isinstance(name, tuple) else True
