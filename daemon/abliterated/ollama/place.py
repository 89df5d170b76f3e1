"""Whether an engine's address is this machine: only then are its files ours to look at and its memory ours to ask for.

Does not know what runs there; a container behind a loopback port counts as here.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import psutil


def on_this_machine(url: str) -> bool:
    """Is the host of `url` loopback, this machine's name, or one of its addresses? Names are not looked up."""
    host = (urlsplit(url if "://" in url else f"http://{url}").hostname or "").lower().rstrip(".")
    if host in ("", "localhost", socket.gethostname().lower()) or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or str(address) in _addresses()


def _addresses() -> set[str]:
    return {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
