"""The service files are well-formed and name what the code serves."""

from __future__ import annotations

import os
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
    # What launchd.plist(5) knows, and of which type; a key it doesn't know is passed over in silence.
    known: dict[str, type | tuple[type, ...]] = {
        "Label": str,
        "ProgramArguments": list,
        "RunAtLoad": bool,
        "KeepAlive": (bool, dict),
        "ThrottleInterval": int,
        "ExitTimeOut": int,
        "Umask": int,
        "StandardOutPath": str,
        "StandardErrorPath": str,
        "EnvironmentVariables": dict,
        "WorkingDirectory": str,
    }
    assert {key: type(value) for key, value in agent.items() if not isinstance(value, known.get(key, ()))} == {}
    assert agent["KeepAlive"] == {"SuccessfulExit": False}, "a stop is a stop, a crash is not"
    assert agent["ExitTimeOut"] >= 60, "the proxy's streams end first"
    assert "ProcessType" not in agent, "launchd would slow the proxy down"


def test_the_user_s_unit_has_nothing_a_user_s_manager_can_t_do() -> None:
    service = settings(ROOT / "systemd" / "user" / "abliterated.service")
    assert not {key for key in service if key.startswith(("Protect", "Private", "Device", "Capability"))} | (
        {"User", "Group", "SupplementaryGroups"} & set(service)
    )
    for key in ("Type", "OOMPolicy", "StartLimitIntervalSec", "KillMode", "WatchdogSec"):
        assert service[key] == settings(ROOT / "systemd" / "abliterated.service")[key]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize(("unit", "most"), [("abliterated.service", 1.6), ("user/abliterated.service", 6.5)])
def test_the_sandbox_is_as_tight_as_it_was_measured(unit: str, most: float) -> None:
    argv = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(ROOT / "systemd" / unit)]
    told = subprocess.run(argv, capture_output=True, text=True)
    last = told.stdout.strip().splitlines()[-1]
    assert float(last.split(":")[1].split()[0]) <= most, last


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_user_s_unit(tmp_path: Path) -> None:
    text = (ROOT / "systemd" / "user" / "abliterated.service").read_text()
    (tmp_path / "abliterated.service").write_text(text.replace("/usr/bin/abliterated serve", "/usr/bin/true"))
    argv = ["systemd-analyze", "--user", "verify", "--man=no", str(tmp_path / "abliterated.service")]
    told = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})
    assert told.returncode == 0, told.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/abliterated serve", "/usr/bin/true")
        (tmp_path / unit.name).write_text(text)
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
