"""Looks at the machine for what an installation must know. Reads only."""

from __future__ import annotations

import grp
import os
import plistlib
import shutil
import sys
from pathlib import Path
from typing import Literal

from abliterate.contract.config import default_config_file, load_config
from abliterate.contract.errors import NotFound
from abliterated.install.machine import Machine
from abliterated.install.plan import CONTROL, LABEL, OLLAMA_PORT, SERVICE, SOCKET, Facts

STORES = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models", "/var/lib/ollama/.ollama/models")
UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system", "/usr/local/lib/systemd/system")
APP = "/Applications/Ollama.app"


def find(kind: Literal["system", "user", "mac"], machine: Machine, program: str = "") -> Facts:
    """Everything a plan asks for. Raises NotFound where our own files are missing."""
    home = Path.home()
    units = UNITS if kind == "system" else (str(home / ".config/systemd/user"), "/usr/lib/systemd/user")
    names = {entry.gr_name for entry in grp.getgrall()}
    store = next((store for store in STORES if Path(store).is_dir()), "")
    program = program or _program()
    texts = _texts(kind, program, home)
    return Facts(
        kind=kind,
        program=program,
        home=home,
        uid=os.getuid(),
        ollama_unit=any((Path(folder) / "ollama.service").exists() for folder in units),
        ollama_app=Path(APP).exists(),
        store=store,
        groups=frozenset(names),
        port_taken=machine.answers(OLLAMA_PORT),
        installed=any(path.exists() for path in _ours(kind, home)),
        listen=0 if kind == "system" else _listens(),
        texts=texts,
    )


def _ours(kind: str, home: Path) -> list[Path]:
    if kind == "mac":
        return [home / "Library" / "LaunchAgents" / f"{LABEL}.plist"]
    folder = Path("/etc/systemd/system") if kind == "system" else home / ".config" / "systemd" / "user"
    return [folder / SERVICE]


def _listens() -> int:
    """The proxy's port in this user's configuration; 0 where there is none. Raises RecipeError for a wrong one."""
    if not default_config_file().exists():
        return 0
    port = load_config().proxy.listen.rpartition(":")[2]
    return int(port) if port.isdigit() else OLLAMA_PORT


def shared(part: str) -> Path:
    """A folder we ship: of the installed distribution, or of the clone. Raises NotFound."""
    clone = Path(__file__).resolve().parents[3]
    places = (Path(sys.prefix) / "share" / "abliterated" / part, clone / part)
    for place in reversed(places) if (clone / "pyproject.toml").exists() else places:
        if place.is_dir():
            return place
    raise NotFound(f"{places[0]}: no such folder", remedy="Install abliterated anew")


def _texts(kind: str, program: str, home: Path) -> dict[str, str]:
    if kind == "mac":
        return {"agent": agent(program, home)}
    folder = shared("systemd")
    service = folder / "user" / SERVICE if kind == "user" else folder / SERVICE
    return {
        SERVICE: service.read_text(),
        SOCKET: (folder / SOCKET).read_text(),
        CONTROL: (folder / CONTROL).read_text(),
        "drop-in": (folder / "ollama-drop-in.conf").read_text(),
    }


def agent(program: str, home: Path) -> str:
    """The launchd agent, with this program and this user's log."""
    (source,) = shared("launchd").glob("*.plist")
    told = plistlib.loads(source.read_bytes())
    log = str(home / "Library" / "Logs" / "abliterated.log")
    told |= {"ProgramArguments": [program, "serve"], "StandardOutPath": log, "StandardErrorPath": log}
    return plistlib.dumps(told).decode()


def _program() -> str:
    beside = Path(sys.executable).parent / "abliterated"
    return str(beside) if beside.exists() else shutil.which("abliterated") or "/usr/bin/abliterated"
