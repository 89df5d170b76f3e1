"""Host and Origin: Ollama's guard against rebinding, and the one case in which a header is rewritten.

Ollama checks Host only where it listens on loopback, and compares Origin with Host; so both go through verbatim and
its guards stay in force. Only where we listen beyond loopback and Ollama does not, would names that are rightly ours
be refused upstream: there the same guard stands here, and names the user allowed are rewritten to `localhost`.

Pure. Does not know: sockets, which machine it runs on (the guard's data says).
"""

from __future__ import annotations

import ipaddress
from typing import Literal

import msgspec

from abliterated.proxy.framing import Head

Verdict = Literal["verbatim", "rewrite", "refuse"]

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
# Go's notion of private, which is narrower than Python's.
_PRIVATE = tuple(ipaddress.ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))


class HostGuard(msgspec.Struct, frozen=True):
    """What a Host header may say. `allowed` are further names, `*` for any; `replacement` is what upstream hears."""

    hostname: str
    addresses: frozenset[str]
    allowed: frozenset[str]
    replacement: str


def split_host(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and ":" not in name and port.isdigit() else host


def passes_upstream(name: str, guard: HostGuard) -> bool:
    """Ollama's own rule for a loopback listener."""
    if name in ("", "localhost", guard.hostname.lower()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name.endswith(_LOCAL_SUFFIXES)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return (
        address.is_loopback
        or address.is_unspecified
        or str(address) in guard.addresses
        or any(address in net for net in _PRIVATE if net.version == address.version)
    )


def judge(head: Head, guard: HostGuard) -> Verdict:
    """May this request go on, and as it is?"""
    authority = named_authority(head)
    if authority is not None:
        # Go takes the host from an absolute target, and then Host counts for nothing; no client of Ollama sends one.
        return "verbatim" if passes_upstream(split_host(authority), guard) else "refuse"
    name = split_host(next((value for key, value in head.fields() if key == b"host"), b"").decode("latin-1"))
    if passes_upstream(name, guard):
        return "verbatim"
    return "rewrite" if "*" in guard.allowed or name in guard.allowed else "refuse"


def named_authority(head: Head) -> str | None:
    """The authority in an absolute (or CONNECT's) target."""
    target = head.target.decode("latin-1")
    if head.method == b"CONNECT":
        return target
    if target.startswith("/") and not target.startswith("//"):
        return None
    scheme, separator, rest = target.partition("//")
    if not separator:
        return None if target == "*" else target
    del scheme
    authority = rest.partition("/")[0].partition("?")[0]
    return authority.rpartition("@")[2]


def rewrite(head: Head, replacement: str) -> bytes:
    """The head with Host replaced, and Origin with it where it named the same host; every other byte as it was."""
    host = next((value for key, value in head.fields() if key == b"host"), b"")
    same = {b"http://" + host.lower(), b"https://" + host.lower()}
    new = replacement.encode()
    lines = head.raw.split(b"\r\n")
    for number, line in enumerate(lines):
        name, colon, value = line.partition(b":")
        if not colon or b" " in name:
            continue
        if name.lower() == b"host":
            lines[number] = name + b": " + new
        elif name.lower() == b"origin" and value.strip(b" \t").lower() in same:
            lines[number] = name + b": http://" + new
    return b"\r\n".join(lines)
