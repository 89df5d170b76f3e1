"""What a service manager says and hears: readiness, watchdog, sockets it hands over. Does not know what is served."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

FIRST_SOCKET = 3


class Supervisor:
    """systemd's notify protocol; everything is a no-op where nobody listens."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        self._address = env.pop("NOTIFY_SOCKET", "")
        microseconds = env.pop("WATCHDOG_USEC", "")
        pid = env.pop("WATCHDOG_PID", "")
        mine = not pid or pid == str(os.getpid())
        self.watchdog_seconds = int(microseconds) / 1e6 if microseconds.isdigit() and mine else 0.0

    def tell(self, **fields: str | int) -> None:
        """Send e.g. READY=1, STATUS=…; silently without a supervisor."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out,
        ):
            out.connect(address)
            out.sendall(message)


def inherited_sockets(environ: MutableMapping[str, str] | None = None) -> dict[str, list[socket.socket]]:
    """The listening sockets the service manager opened for us, by name (LISTEN_FDS)."""
    env = os.environ if environ is None else environ
    count = env.pop("LISTEN_FDS", "0")
    pid = env.pop("LISTEN_PID", "")
    names = env.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    if pid != str(os.getpid()) or not count.isdigit():
        return found
    for offset in range(int(count)):
        descriptor = FIRST_SOCKET + offset
        os.set_inheritable(descriptor, False)
        name = names[offset] if offset < len(names) and names[offset] else "unknown"
        found.setdefault(name, []).append(socket.socket(fileno=descriptor))
    return found
