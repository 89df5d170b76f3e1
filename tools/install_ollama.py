"""Install real Ollamas for the tests, once, outside the clone: `go install github.com/ollama/ollama@VERSION`, by name.

What `make ollama` runs. Two generations, because each hides what the other shows: v0.11.0 with its own CPU engine,
and v0.34.4, which finds its engine in a `llama-server` beside it: here the shim over xllamacpp of this interpreter.

    <root>/v0.11.0/bin/ollama                                       root: OLLAMA_TOOLS_DIR, or
    <root>/v0.34.4/bin/ollama, lib/ollama/llama-server              $XDG_CACHE_HOME/abliterated/ollama
    <root>/v0.34.4.reason.txt                                       why it isn't there; tests print it when they skip

What is there is left alone. Exit codes: 0 all there; 3 one can't be had here (the caller treats it as "skip, with
the reason"); 2 wrong usage. Nothing half-made stays: a version's folder appears in one rename.

Does not know: tests, engines, the daemon. Standard library only, so that any Python 3.11 runs it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE = "github.com/ollama/ollama"
SHIM = Path(__file__).with_name("llama_server_shim.py")
CANNOT_BE_HAD = 3


@dataclass(frozen=True)
class Generation:
    version: str
    go: tuple[int, int]  # what its go.mod asks for
    shim: bool  # no engine of its own: give it the llama-server shim


GENERATIONS = (
    Generation("v0.11.0", go=(1, 24), shim=False),
    Generation("v0.34.4", go=(1, 26), shim=True),
)


class CannotBeHad(Exception):
    """This version can't be installed here; the message says where it fails and what would help."""


def tools_root() -> Path:
    if given := os.environ.get("OLLAMA_TOOLS_DIR"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "abliterated" / "ollama"


def executable(root: Path, version: str) -> Path:
    return root / version / "bin" / "ollama"


def reason_file(root: Path, version: str) -> Path:
    return root / f"{version}.reason.txt"


def generation(version: str) -> Generation:
    """A known generation, or what its number says of another version (0.30 dropped the engine from the Go binary)."""
    for known in GENERATIONS:
        if known.version == version:
            return known
    numbers = re.fullmatch(r"v(\d+)\.(\d+)\.\d+(-[0-9A-Za-z.]+)?", version)
    if not numbers:
        raise argparse.ArgumentTypeError(f"not a version: {version!r}; write it as v0.11.0")
    modern = (int(numbers[1]), int(numbers[2])) >= (0, 30)
    return Generation(version, go=(1, 26) if modern else (1, 24), shim=modern)


def say(message: str) -> None:
    print(message, flush=True)


# --- the Go side -----------------------------------------------------------------------------------------------------


def go_command() -> str:
    """`GO` where it is set, else `go` on PATH, else where go.dev's archive is usually unpacked."""
    given = os.environ.get("GO")
    for candidate in (given,) if given else ("go", "/usr/local/go/bin/go"):
        if found := shutil.which(candidate):
            return found
    raise CannotBeHad(f"no Go toolchain: no {given or '`go` on PATH'}. Install Go 1.26 or newer from go.dev, or set GO")


def ask_go(go: str, arguments: list[str], folder: Path, deadline: float) -> str:
    command = [go, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=min(60.0, max(1.0, deadline - time.monotonic())),
        )
    except subprocess.TimeoutExpired:
        raise CannotBeHad(f"`{shlex.join(command)}` gave no answer in time") from None
    except OSError as error:
        raise CannotBeHad(f"`{shlex.join(command)}` can't be run: {error}") from None
    if done.returncode:
        raise CannotBeHad(f"`{shlex.join(command)}` failed: {last_lines(done.stderr)}")
    return done.stdout


def last_lines(text: str, count: int = 4) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:]) or "without a word"


def check_toolchain(go: str, wanted: Generation, folder: Path, deadline: float) -> None:
    facts = json.loads(ask_go(go, ["env", "-json", "GOVERSION", "GOTOOLCHAIN", "CC", "CXX"], folder, deadline))
    numbers = re.match(r"go(\d+)\.(\d+)", facts["GOVERSION"])
    have = (int(numbers[1]), int(numbers[2])) if numbers else wanted.go  # a development build: let it try
    fetches_newer = have >= (1, 21) and facts["GOTOOLCHAIN"] not in ("local", "path")
    if have < wanted.go and not fetches_newer:
        needed = ".".join(map(str, wanted.go))
        raise CannotBeHad(f"Go is too old: {facts['GOVERSION']}, {MODULE}@{wanted.version} needs {needed} or newer")
    for variable in ("CC", "CXX"):
        compiler = (shlex.split(facts[variable]) or [""])[0]
        if not shutil.which(compiler):
            raise CannotBeHad(f"no C/C++ compiler for cgo: {compiler or variable} is not on PATH. Install gcc and g++")


def build(go: str, version: str, workshop: Path, deadline: float) -> None:
    """`go install` into the workshop's bin, as a process group that ends with the budget."""
    stamp = f"-s -w -X={MODULE}/version.Version={version.removeprefix('v')}"
    command = [go, "install", "-p", "2", "-ldflags", stamp, f"{MODULE}@{version}"]
    environment = os.environ | {"GOBIN": str(workshop / "bin"), "GOTMPDIR": str(workshop / "tmp"), "CGO_ENABLED": "1"}
    environment.pop("GOOS", None), environment.pop("GOARCH", None)
    log_path = workshop / "build.log"
    started = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            ["nice", "-n", "10", *command] if shutil.which("nice") else command,
            cwd=workshop, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                try:
                    process.wait(timeout=min(15.0, max(0.1, deadline - time.monotonic())))
                    break
                except subprocess.TimeoutExpired:
                    elapsed = time.monotonic() - started
                    if time.monotonic() >= deadline:
                        raise CannotBeHad(
                            f"the time budget ran out after {elapsed:.0f} s of `{shlex.join(command)}`. "
                            "What is compiled stays in Go's cache: run it again, or raise --budget"
                        ) from None
                    say(f"  {version}: building, {elapsed:.0f} s, {max(0.0, deadline - time.monotonic()):.0f} s left")
        finally:
            end_group(process)
    if process.returncode:
        raise CannotBeHad(f"`{shlex.join(command)}` failed: {last_lines(log_path.read_text(errors='replace'))}")
    say(f"  {version}: built in {time.monotonic() - started:.0f} s")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The compilers are the go command's children: end all of them, whether or not it ended itself."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


# --- the cache folder ------------------------------------------------------------------------------------------------


@contextmanager
def alone(root: Path, version: str) -> Iterator[None]:
    """Two runs at once build one after the other; the second finds the first's work."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


def give_shim(root: Path, version: str) -> None:
    """The launcher is a shell line, not a shebang: paths may be long or hold spaces. Tests may name another Python."""
    folder = root / version / "lib" / "ollama"
    write_whole(folder / SHIM.name, SHIM.read_text())
    launcher = (
        "#!/bin/sh\n"
        f'exec "${{LLAMA_SERVER_PYTHON:-{sys.executable}}}" "$(dirname "$0")/{SHIM.name}" "$@"\n'
    )  # fmt: skip
    write_whole(folder / "llama-server", launcher, mode=0o755)


def install(root: Path, wanted: Generation, budget: float) -> None:
    target = executable(root, wanted.version)
    with alone(root, wanted.version):
        deadline = time.monotonic() + budget
        for leftover in root.glob(f".building-{wanted.version}-*"):  # of a run that was killed; we hold the lock
            remove_workshop(leftover)
        if target.is_file():
            say(f"{wanted.version}: already there: {target}")
        else:
            say(f"{wanted.version}: installing {MODULE}@{wanted.version} into {root} (budget {budget:.0f} s)")
            go = go_command()
            workshop = Path(tempfile.mkdtemp(prefix=f".building-{wanted.version}-", dir=root))
            try:
                (workshop / "tmp").mkdir()
                check_toolchain(go, wanted, workshop, deadline)
                ask_go(go, ["list", "-m", f"{MODULE}@{wanted.version}"], workshop, deadline)  # does the proxy answer?
                build(go, wanted.version, workshop, deadline)
                prove_it_runs(workshop / "bin" / "ollama", wanted.version)
                product = workshop / "product"
                product.mkdir()
                (workshop / "bin").rename(product / "bin")
                shutil.rmtree(target.parents[1], ignore_errors=True)
                product.rename(target.parents[1])
            finally:
                remove_workshop(workshop)
            say(f"{wanted.version}: there: {target}")
        if wanted.shim:
            give_shim(root, wanted.version)
        reason_file(root, wanted.version).unlink(missing_ok=True)


def remove_workshop(workshop: Path) -> None:
    shutil.rmtree(workshop, ignore_errors=True)


def prove_it_runs(binary: Path, version: str) -> None:
    """A binary that can't start is not an engine: ask its version, of a server that isn't there."""
    environment = os.environ | {"OLLAMA_HOST": "127.0.0.1:1", "HOME": str(binary.parents[1])}
    try:
        done = subprocess.run([binary, "--version"], env=environment, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBeHad(f"the ollama just built doesn't start: {error}") from None
    if version.removeprefix("v") not in done.stdout + done.stderr:
        raise CannotBeHad(f"the ollama just built doesn't say {version}: {last_lines(done.stdout + done.stderr)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install real Ollamas for the tests, once, outside the clone.")
    parser.add_argument(
        "--version", type=generation, action="append", metavar="vX.Y.Z", help="default: both generations"
    )
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for each version (default 600)")
    options = parser.parse_args(arguments)
    root, missing = tools_root(), 0
    for wanted in options.version or GENERATIONS:
        try:
            install(root, wanted, options.budget)
        except (CannotBeHad, OSError) as error:
            missing += 1
            print(f"{wanted.version}: can't be had here: {error}", file=sys.stderr, flush=True)
            try:
                write_whole(reason_file(root, wanted.version), f"{error}\n")
            except OSError as second:
                print(f"{wanted.version}: nor can the reason be kept: {second}", file=sys.stderr)
    return CANNOT_BE_HAD if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the build's group and folder end with us
    raise SystemExit(main())
