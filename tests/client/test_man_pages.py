"""The man pages: as the programs are now, and as man reads them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("man_pages", ROOT / "tools" / "man_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_programs_say(tool: ModuleType) -> None:
    """Regenerate with: make man"""
    made = tool.pages()
    assert {path.name for path in tool.FOLDER.glob("*.1")} == set(made), "make man"
    for name, text in made.items():
        # Spaces apart: versions of argparse wrap differently.
        assert (tool.FOLDER / name).read_text().split() == text.split(), f"{name}: make man"


def test_man_reads_them_without_a_warning(tool: ModuleType) -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff here")
    files = sorted(str(path) for path in tool.FOLDER.glob("*.1"))
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Kutf8", "-Tutf8", "-z", "-rLL=200n", *files],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_page_reads_as_the_program_s_help_does(tool: ModuleType) -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff here")
    page = tool.FOLDER / "abliterate-submit.1"
    done = subprocess.run(
        ["groff", "-man", "-Kutf8", "-Tutf8", "-P-cbou", str(page)],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert "--set KEY=VALUE" in done.stdout
    assert "abliterate new qwen3:8b | abliterate submit -" in done.stdout
    assert "‐‐" not in done.stdout, "hyphens that can't be pasted"


def test_nothing_a_line_begins_with_is_obeyed(tool: ModuleType) -> None:
    assert tool.roff(".so /etc/passwd\n'x -y \\fB") == "\\&.so /etc/passwd\n\\&'x \\-y \\efB"


def test_the_wheel_takes_them_where_man_looks() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "shared-data"
    ]
    assert data["docs/man"] == "share/man/man1"
