"""The installer under a real systemd, booted in namespaces of its own over this machine's root: nothing leaves them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = "/lib/systemd/systemd"
PROGRAM = "/usr/local/bin/abliterated-here"
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/up" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/root"
R="$1/root"
mount -t proc proc "$R/proc"
mount -t sysfs -o ro sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
for d in run tmp dev; do mount -t tmpfs tmpfs "$R/$d"; done
for n in null:3 zero:5 random:8 urandom:9; do mknod -m 666 "$R/dev/${n%:*}" c 1 "${n#*:}"; done
printf '[Unit]\\nDefaultDependencies=no\\n' > "$R/etc/systemd/system/t.target"
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$R" /lib/systemd/systemd --system --unit=t.target
"""
SITE = [part for part in sys.path if part.endswith("site-packages")]
HERE = ":".join([*SITE, f"{ROOT}/client", f"{ROOT}/daemon"])
PREPARE = f"""
set -e
ip link set lo up
printf '#!/bin/sh\\nexport PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={HERE}
exec /usr/bin/python3 -m abliterated.cli "$@"\\n' > {PROGRAM}
cat > /usr/local/bin/some-ollama <<'X'
#!/usr/bin/python3
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{{"version":"0.34.4"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
X
chmod 755 {PROGRAM} /usr/local/bin/some-ollama
groupadd -f ollama
mkdir -p /usr/share/ollama/.ollama/models
chgrp -R ollama /usr/share/ollama
chmod -R 750 /usr/share/ollama
printf '[Unit]\\nDefaultDependencies=no\\n[Service]\\nExecStart=/usr/local/bin/some-ollama\\n' \
    > /etc/systemd/system/ollama.service
systemctl daemon-reload
systemctl start ollama
"""


@dataclass
class Booted:
    """A systemd and its namespaces; `run` enters them."""

    pid: int

    def run(self, *argv: str, code: int | None = 0, seconds: float = 300) -> str:
        inside = [
            "nsenter",
            f"--target={self.pid}",
            *"--mount --uts --ipc --net --pid --cgroup --root".split(),
            "--wd=/",
        ]
        told = subprocess.run([*inside, *argv], capture_output=True, text=True, timeout=seconds, cwd="/")
        assert code is None or told.returncode == code, told.stdout + told.stderr
        return told.stdout + told.stderr

    def answers(self, port: int) -> bool:
        get = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/api/version', timeout=60).read())"
        return "0.34.4" in self.run("/usr/bin/python3", "-c", get, code=None)

    def show(self, unit: str, what: str) -> str:
        return self.run("systemctl", "show", "-P", what, unit).strip()

    def until(self, good: Callable[[], bool], what: str, seconds: float = 150) -> float:
        begun = time.monotonic()
        while not good():
            assert time.monotonic() - begun < seconds, f"waited in vain for {what}"
            time.sleep(0.1)
        return time.monotonic() - begun


def unfit() -> str:
    """Why this machine can't do it."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "needs root on Linux"
    missing = [name for name in ("unshare", "nsenter", "ip", "useradd", "runuser") if shutil.which(name) is None]
    if missing or not Path(SYSTEMD).exists():
        return f"not here: {missing or SYSTEMD}"
    if str(ROOT).startswith(("/root/", "/home/", "/tmp/", "/var/tmp/")):
        return "the sandbox hides this clone from the service"
    asked = ["/usr/bin/python3", "-c", "import sys; print(sys.version_info[:2])"]
    same = Path(asked[0]).exists() and subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return "" if same == str(sys.version_info[:2]) else "the machine's own Python is another"


@pytest.fixture(scope="module")
def booted() -> Iterator[Booted]:
    if why := unfit():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="abl-boot-") as place, tempfile.TemporaryFile() as log:
        namespaces = "--fork --kill-child --pid --mount --uts --ipc --cgroup --net".split()
        argv = ["unshare", *namespaces, "bash", "-c", BOOT, "boot", place]
        boot = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            made = None
            deadline = time.monotonic() + 120
            while made is None and boot.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split()
                if children and "systemd" in Path(f"/proc/{children[0]}/cmdline").read_text():
                    candidate = Booted(int(children[0]))
                    if "running" in candidate.run("systemctl", "is-system-running", code=None):
                        made = candidate
            if made is None:
                log.seek(0)
                pytest.skip(f"no systemd can be booted here: {log.read()[-300:].decode(errors='replace')}")
            made.run("bash", "-c", PREPARE)
            yield made
        finally:
            # Its first process takes the whole namespace along.
            boot.send_signal(signal.SIGKILL)
            boot.wait(timeout=60)


def test_it_is_installed_beside_ollama_restarts_and_goes_again(booted: Booted) -> None:
    booted.until(lambda: booted.answers(11434), "Ollama on its own port")
    install = ("/usr/bin/env", "PYTHONPATH=", PROGRAM, "install", "--system", "--program", PROGRAM)

    # A service that can't start: everything is taken back, Ollama answers where it did.
    told = booted.run(*install[:-1], "/usr/bin/false", code=1, seconds=500)
    assert "taking back what was done" in told
    booted.until(lambda: booted.answers(11434), "Ollama back on its port")
    assert not booted.answers(11435)
    booted.run("test", "!", "-e", "/etc/systemd/system/abliterated.service")
    booted.run("id", "-u", "abliterated", code=1)

    told = booted.run(*install, seconds=500)
    assert "\ndone\n" in told
    assert booted.answers(11434), "through the proxy"
    assert booted.answers(11435), "Ollama itself"
    assert booted.show("abliterated.service", "ActiveState") == "active"
    assert booted.show("abliterated.service", "User") == "abliterated"
    assert "serving ollama" in booted.show("abliterated.service", "StatusText")
    assert booted.run("stat", "-c", "%a %G", "/run/abliterated/control.sock").strip() == "660 abliterated"

    # Doing it again restarts nothing.
    before = [booted.show(unit, "MainPID") for unit in ("ollama.service", "abliterated.service")]
    told = booted.run(*install, seconds=500)
    assert "write" not in told
    assert [booted.show(unit, "MainPID") for unit in ("ollama.service", "abliterated.service")] == before

    # Killed, it is back, and more often than systemd's own limit (5 in 10 s) would let it.
    assert booted.show("abliterated.service", "WatchdogUSec") == "30s"
    quick = "/etc/systemd/system/abliterated.service.d/quick.conf"
    lines = "[Service]\\nWatchdogSec=6\\nRestartSec=100ms\\n"
    booted.run("bash", "-c", f"mkdir -p ${{0%/*}}; printf '{lines}' > $0", quick)
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "restart", "abliterated.service")
    assert booted.show("abliterated.service", "StartLimitIntervalUSec") == "0"
    for _ in range(6):
        pid = booted.show("abliterated.service", "MainPID")
        booted.run("systemctl", "kill", "--kill-who=main", "-s", "KILL", "abliterated.service")
        booted.until(lambda old=pid: booted.show("abliterated.service", "MainPID") not in ("0", old), "a new daemon")  # type: ignore[misc]
    booted.until(lambda: booted.answers(11434), "serving again")
    assert booted.show("abliterated.socket", "ActiveState") == "active"

    # A loop that hangs starves the watchdog: systemd ends the daemon and starts another.
    pid = booted.show("abliterated.service", "MainPID")
    time.sleep(7)
    assert booted.show("abliterated.service", "MainPID") == pid, "a loop that runs feeds it"
    booted.run("systemctl", "kill", "--kill-who=main", "-s", "STOP", "abliterated.service")
    booted.until(lambda: booted.show("abliterated.service", "MainPID") not in ("0", pid), "a daemon that runs")
    booted.until(lambda: booted.answers(11434), "serving again")
    booted.run("rm", "-r", quick.rpartition("/")[0])
    booted.run("systemctl", "daemon-reload")

    booted.run(PROGRAM, "uninstall", "--system", seconds=500)
    booted.until(lambda: booted.answers(11434), "Ollama back on its port")
    assert not booted.answers(11435)
    assert booted.run("systemctl", "list-unit-files", "abliterated*", "--no-legend", code=None).strip() == ""
