"""The house's walls: who may import whom, and what the daemon's process never loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DAEMON = ROOT / "daemon" / "abliterated"
CLIENT = ROOT / "client" / "abliterate"
MODULES = sorted([*DAEMON.rglob("*.py"), *CLIENT.rglob("*.py")])
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "xllamacpp",
    "safetensors",
    "numpy",
    "matplotlib",
    "huggingface_hub",
    "httpx2",
}

# What a room may import of the daemon's package beside itself; `files` and the package itself are everybody's.
ROOMS: dict[str, set[str]] = {
    "failpoints": set(),
    "files": {"failpoints"},
    "config": {"files"},
    "logs": set(),
    "service": set(),
    "daemon_lock": set(),
    "install": {"files"},
    "templates": set(),
    "shapes": set(),
    "refuser": {"files"},
    "spool": {"files", "failpoints", "config"},
    "jobs": {"files", "failpoints", "config"},
    "ollama": {"files", "failpoints", "config", "templates"},
    "proxy": {"files", "failpoints", "config", "shapes", "templates"},
    "control": {"files", "failpoints", "config"},
    "engine": {"files", "failpoints", "config", "shapes"},
    "report": {"files"},
    "pipeline": {"files", "report", "templates"},
}
LAZY_PIPELINE = {DAEMON / "jobs" / "worker.py"}


def imported(path: Path, *, lazy: bool = True) -> set[str]:
    """Dotted names a module imports; without `lazy` only those at its top level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    relative = path.relative_to(DAEMON)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in MODULES if DAEMON in p.parents and room_of(p) in ROOMS], ids=str)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    seen = {name.split(".")[1] for name in imported(path) if name.startswith("abliterated.")}
    allowed = ROOMS[room] | {room, "__version__"}
    if path in LAZY_PIPELINE:
        allowed = allowed | {"pipeline"}
    assert seen <= allowed, f"{room} imports {seen - allowed}"


@pytest.mark.parametrize("path", [p for p in MODULES if DAEMON in p.parents and room_of(p) != "pipeline"], ids=str)
def test_heavy_libraries_are_the_pipelines_and_the_engines_alone(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
    if room_of(path) == "engine":
        heavy -= {"xllamacpp"}
    assert not heavy


@pytest.mark.parametrize("path", [p for p in MODULES if CLIENT in p.parents], ids=str)
def test_the_client_never_imports_the_daemon_nor_anything_heavy(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path)}
    assert "abliterated" not in names
    assert not names & (HEAVY | {"aiohttp"})
    top = {name.split(".")[0] for name in imported(path, lazy=False)}
    assert "rich" not in top, "rich is loaded where it draws"


def test_the_contract_needs_the_standard_library_and_msgspec_alone() -> None:
    for path in (CLIENT / "contract").glob("*.py"):
        top = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert top <= {"abliterate", "msgspec", "platformdirs", "__future__"}, path


def test_the_daemons_process_loads_nothing_heavy() -> None:
    code = (
        "import sys, abliterated.app, abliterated.commands.serve, abliterated.ollama.register;"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_the_client_starts_without_rich_aiohttp_or_asyncio() -> None:
    slow = {"rich", "aiohttp", "asyncio", "tomllib", "abliterated"}
    code = f"import sys, abliterate.cli; print(sorted(set(sys.modules) & {slow!r}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_says_what_it_does_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 400, "too long for one room's file"
