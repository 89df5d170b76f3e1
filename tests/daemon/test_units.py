"""The service files are well-formed and name what the code serves."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "systemd").glob("*.s*"))


def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_sockets_have_the_names_the_daemon_looks_for() -> None:
    names = {settings(unit)["FileDescriptorName"][0] for unit in UNITS if unit.suffix == ".socket"}
    assert names == {"proxy", "control"}


def test_the_service_restarts_for_ever_and_outlives_a_killed_worker() -> None:
    service = settings(ROOT / "systemd" / "abliterated.service")
    assert service["StartLimitIntervalSec"] == ["0"]
    assert service["OOMPolicy"] == ["continue"]
    assert service["Type"] == ["notify"]
    assert service["ExecStart"][0].endswith("abliterated serve")
    assert "MemoryDenyWriteExecute" not in service, "it breaks torch"


def test_the_agent_is_a_property_list() -> None:
    agent = plistlib.loads((ROOT / "launchd" / "io.abliterated.daemon.plist").read_bytes())
    assert agent["ProgramArguments"][1:] == ["serve"]
    assert agent["Umask"] == 0o077


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/abliterated serve", "/usr/bin/true")
        (tmp_path / unit.name).write_text(text)
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
