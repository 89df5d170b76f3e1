"""Every error the product makes on purpose says what to do next; read from the source, so that none is forgotten.

That each was provoked by a test is asked of a whole run: `make errors`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from abliterate.contract import errors
from abliterate.contract.errors import AbliteratedError

ROOT = Path(__file__).resolve().parents[2]
# Without a remedy of their own: the embedded engine's answers, whose words are Ollama's; what llama.cpp said as it
# ended, word for word; and what a person has just asked for.
WORDS_OF_OTHERS = {"Refused", "ContextExceeded", "LoadFailed", "RunnerDied", "RunnerGone", "Cancelled"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("provoked", ROOT / "tools" / "provoked.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_error_names_the_next_step(tool: ModuleType) -> None:
    sites = tool.sites()
    assert len(sites) > 400
    without = [
        f"{site.path.relative_to(ROOT)}:{site.first} {site.text}"
        for site in sites
        if not site.remedy and site.kind not in WORDS_OF_OTHERS
    ]
    assert without == []


def test_every_kind_of_error_has_a_code_and_a_class_of_its_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AbliteratedError)]
    for kind in kinds:
        assert kind.__doc__
        assert kind is AbliteratedError or "exit_code" in vars(kind), kind


def test_what_a_run_provoked_is_seen_in_processes_it_starts_too(tool: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(tool.HOOK.replace("@LOG@", str(log)))
    here = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    program = Path(sys.executable).with_name("abliterate")
    told = subprocess.run([str(program), "check", "none.toml"], env=here, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 7, told.stderr
    every, left = tool.sites(), tool.silent(log)
    provoked = [site for site in every if site not in left]
    assert [(site.path.name, site.kind) for site in provoked] == [("wishes.py", "NotFound")]
