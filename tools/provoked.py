"""Which of the product's error messages a test run provoked, and which it never did: `make errors`.

python tools/provoked.py [PYTEST ARGUMENTS]      a run, then the list (the suite takes its usual time)
python tools/provoked.py --keep FILE [...]       the same, added to what earlier runs left in FILE

Every place where a typed error is made is found in the source; where one was made is noted as the tests run, in every
process of this environment's Python, by a .pth file that is there as long as the run. Does not know what a message
should say.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "client" / "abliterate", ROOT / "daemon" / "abliterated")
BASE = "AbliteratedError"
# Read by Python itself as it starts, before anything of ours.
HOOK = """\
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "abliterate.contract.errors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def execute(module):
            run(module)
            note(module.AbliteratedError)
        spec.loader.exec_module = execute
        return spec

def note(base):
    plain, seen, unwritten = base.__init__, set(), []
    def made(self, *arguments, **named):
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is self:
            frame = frame.f_back
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}\\n"
        if place not in seen:
            seen.add(place)
            unwritten.append(place)
        if unwritten:
            try:
                file = os.open("@LOG@", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.write(file, "".join(unwritten).encode())
                os.close(file)
                unwritten.clear()
            except OSError:  # a test is nobody just now, or out of descriptors: with the next one
                pass
        plain(self, *arguments, **named)
    base.__init__ = made

sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class Site:
    """A place where an error is made."""

    path: Path
    first: int
    last: int
    kind: str
    text: str
    remedy: bool


@cache
def sites() -> list[Site]:
    """Every one, by file and line."""
    trees = {path: ast.parse(path.read_text()) for folder in SOURCES for path in sorted(folder.rglob("*.py"))}
    kinds = typed(trees)
    return [site for path, tree in trees.items() for site in _made(path, tree, kinds)]


def typed(trees: dict[Path, ast.Module]) -> set[str]:
    """The names of the typed errors."""
    classes = [
        (node.name, {_name(base) for base in node.bases})
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    known = {BASE}
    while more := {name for name, bases in classes if bases & known} - known:
        known |= more
    return known


def _made(path: Path, tree: ast.Module, kinds: set[str]) -> Iterator[Site]:
    # A class of that name that is defined here and is none of ours is not meant.
    others = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not _typed_bases(node, kinds)}
    kinds = kinds - others
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (kind := _name(node.func)) in kinds and node.args:
            remedy = any(named.arg in ("remedy", None) for named in node.keywords)
            said = next((part for part in node.args if not _number(part)), node.args[0])  # after an HTTP status
            yield Site(path, node.lineno, node.end_lineno or node.lineno, kind, ast.unparse(said), remedy)


def _number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def _typed_bases(node: ast.ClassDef, kinds: set[str]) -> bool:
    return node.name == BASE or any(_name(base) in kinds for base in node.bases)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def silent(log: Path) -> list[Site]:
    """The places that `log` has nothing of."""
    seen: dict[str, set[int]] = {}
    for place in set(log.read_text().splitlines()) if log.exists() else ():
        file, _, line = place.rpartition(":")
        seen.setdefault(str(Path(file).resolve()), set()).add(int(line))
    return [
        site
        for site in sites()
        if not any(site.first <= line <= site.last for line in seen.get(str(site.path.resolve()), ()))
    ]


def main() -> int:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if arguments[:1] == ["--keep"]:
            log, arguments = Path(arguments[1]).absolute(), arguments[2:]
        hook = Path(folder) / "hook.py"
        hook.write_text(HOOK.replace("@LOG@", str(log)))
        line = f"import os; exec(open({str(hook)!r}).read() if os.path.exists({str(hook)!r}) else '', {{}})\n"
        door = Path(sysconfig.get_path("purelib")) / "provoked.pth"
        door.write_text(line)
        try:
            code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT).returncode
        finally:
            door.unlink(missing_ok=True)
        left, every = silent(log), len(sites())
    for site in left:
        sys.stdout.write(f"{site.path.relative_to(ROOT)}:{site.first}: {site.kind}: {site.text}\n")
    sys.stdout.write(f"{every - len(left)} of {every} messages were provoked\n")
    return code or (1 if left else 0)


if __name__ == "__main__":
    sys.exit(main())
