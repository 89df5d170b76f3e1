"""The service manager's protocol: what is said, and the sockets that are handed over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from abliterated.service import Supervisor, inherited_sockets


def test_readiness_is_told_to_whoever_listens() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        path = str(Path(folder) / "notify")
        hears.bind(path)
        hears.settimeout(60)
        environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
        supervisor = Supervisor(environ)
        supervisor.tell(READY=1, STATUS="serving")
        assert hears.recv(1000) == b"READY=1\nSTATUS=serving"
        assert supervisor.watchdog_seconds == 3.0
        assert environ == {}, "a worker must not speak for the daemon"


def test_an_abstract_socket_is_understood_and_silence_is_no_error() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        name = f"abliterated-test-{os.getpid()}"
        hears.bind("\0" + name)
        hears.settimeout(60)
        Supervisor({"NOTIFY_SOCKET": "@" + name}).tell(STOPPING=1)
        assert hears.recv(1000) == b"STOPPING=1"
    Supervisor({"NOTIFY_SOCKET": "/nowhere/socket"}).tell(READY=1)
    Supervisor({}).tell(READY=1)


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    assert Supervisor({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_seconds == 0.0


def test_listening_sockets_are_taken_over_by_name() -> None:
    code = (
        "import os; os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from abliterated.service import inherited_sockets\n"
        "found = inherited_sockets(); print({k: [s.getsockname()[1] for s in v] for k, v in found.items()})\n"
        "print('LISTEN_FDS' in os.environ)"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shell = f'exec 3<&{listener.fileno()}; exec "{sys.executable}" -c "$0"'
        told = subprocess.run(
            ["/bin/bash", "-c", shell, code],
            pass_fds=(listener.fileno(),),
            env=os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "proxy"},
            capture_output=True,
            text=True,
        )
        assert told.stdout.splitlines() == [str({"proxy": [listener.getsockname()[1]]}), "False"], told.stderr


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    assert inherited_sockets({"LISTEN_FDS": "1", "LISTEN_PID": "1"}) == {}
    assert inherited_sockets({}) == {}
