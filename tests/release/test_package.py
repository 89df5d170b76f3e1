"""What is released: a wheel and an sdist that hold what they must, install clean, and run with nothing else there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from abliterate import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
SHARED = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]


def build(what: str, source: Path, target: Path) -> Path:
    told = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(target)], cwd=source, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    return target / told.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the sdist, and so from nothing else."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_and_what_goes_with_it(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    data = f"abliterated-{__version__}.data/data/"
    for package, folder in (("abliterate", ROOT / "client"), ("abliterated", ROOT / "daemon")):
        files = (path for path in (folder / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        missing = {str(path.relative_to(folder)) for path in files} - inside
        assert not missing
        assert f"{package}/py.typed" in inside
    for source, target in SHARED.items():
        place = ROOT / source
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        assert files
        for path in files:
            tail = f"/{path.relative_to(place)}" if place.is_dir() else ""
            assert f"{data}{target}{tail}" in inside
    assert not [name for name in inside if name.startswith(("tests", "bench", "tools"))]


def test_the_version_stands_in_one_place_and_the_changelog_knows_it(wheel: Path) -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "client/abliterate/__init__.py"
    told = zipfile.ZipFile(wheel).read(f"abliterated-{__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in told
    assert "\nLicense-Expression: Apache-2.0\n" in told
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_in_an_empty_environment_both_programs_start_and_say_what_they_lack(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    binaries = tmp_path / "empty" / "bin"
    install(wheel, binaries / "python")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONWARNINGS": "error"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        program = str(binaries / command[0])
        return subprocess.run(
            [program, *command[1:]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150
        )

    for program in ("abliterate", "abliterated"):
        assert run(program, "--version").stdout == f"{program} {__version__}\n"
    (tmp_path / "recipe.toml").write_text(run("abliterate", "new", "qwen3:8b").stdout)
    assert run("abliterate", "check", "recipe.toml").returncode == 0
    # What measures and edits is an extra, and says so.
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file.toml").write_text('model = "model.gguf"\n')
    missing = run("abliterated", "work", "file.toml", "--out", "out")
    assert missing.returncode != 0
    assert "pip install 'abliterated[pipeline]'" in missing.stderr
    typed = run("python", "-c", "from abliterated import measure; print(measure.__annotations__['return'])")
    assert typed.stdout == "RefusalDirection\n", typed.stderr
    for name in ("man/man1/abliterate.1", "bash-completion/completions/abliterate", "abliterated/systemd"):
        assert (tmp_path / "empty" / "share" / name).exists()


def install(wheel: Path, python: Path) -> None:
    """With what the wheel itself asks for, at the tested versions; skipped where no index and no cache has it."""
    uv = Path(sys.executable).with_name("uv")
    more = {"SSL_CERT_FILE": os.environ["PIP_CERT"]} if "PIP_CERT" in os.environ else {}
    told = subprocess.CompletedProcess[str]([], 1, "", "there is no uv")
    for offline in (["--offline"], []) if uv.exists() else ():
        told = subprocess.run(
            [str(uv), "pip", "install", *offline, "--python", str(python), "-c", "constraints.txt", str(wheel)],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | more, timeout=500,
        )  # fmt: skip
        if told.returncode == 0:
            return
    pytest.skip(f"its dependencies can't be had here: {told.stderr[-300:]}")


def test_the_lock_has_the_tested_versions_and_a_hash_for_each_file() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"(?m)^(?=[\w.-]+==)", lock)[1:]
    locked = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([^\s;\\]+)", entry).groups()  # type: ignore[union-attr]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
        locked[normal(name)] = version
    tested = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    for name, version in tested.items():
        # Those that others brought along before, and that nothing asks for now, may be missing.
        assert locked.get(normal(name), version) == version, name
    asked = [*PROJECT["project"]["dependencies"]]
    for extra in ("pipeline", "demo", "dev"):
        asked += PROJECT["project"]["optional-dependencies"][extra]
    assert {normal(re.match(r"[\w.-]+", one)[0]) for one in asked} <= set(locked)  # type: ignore[index]
    assert "://" not in lock, "an index's address"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_bill_of_materials_lists_all_that_is_locked(tmp_path: Path) -> None:
    import json

    target = tmp_path / "sbom.json"
    subprocess.run([sys.executable, str(ROOT / "tools" / "sbom.py"), str(target)], check=True, capture_output=True)
    told = json.loads(target.read_text())
    assert (told["bomFormat"], told["metadata"]["component"]["version"]) == ("CycloneDX", __version__)
    names = {component["name"] for component in told["components"]}
    assert {"torch", "aiohttp", "msgspec"} <= names
    locked = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "requirements.lock").read_text())
    assert names == set(locked)
    assert all(component["purl"].startswith("pkg:pypi/") for component in told["components"])


def test_the_man_pages_are_found_by_man(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("no man here")
    with zipfile.ZipFile(wheel) as archive:
        pages = [name for name in archive.namelist() if "/share/man/man1/" in name]
        (tmp_path / "man1").mkdir()
        for name in pages:
            (tmp_path / "man1" / Path(name).name).write_bytes(archive.read(name))
    told = subprocess.run(
        ["man", "-M", str(tmp_path), "abliterate-submit"],
        capture_output=True, text=True, env=os.environ | {"MANPAGER": "cat", "MANWIDTH": "100"},
    )  # fmt: skip
    if told.returncode == 0 and "minimized" in told.stdout + told.stderr:
        pytest.skip("man is a stub here")
    assert "--set KEY=VALUE" in told.stdout or told.returncode == 16
