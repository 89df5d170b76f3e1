"""Carries a plan out on this machine, says each thing it does, and takes it back where a step fails.

Does not know what a plan is for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from abliterate.contract.errors import AbliteratedError
from abliterated.files import write_whole
from abliterated.install.plan import IfFailed, Remove, Run, Say, Step, Wait, Write

NOT_FOUND = 127  # as a shell says it


class InstallError(AbliteratedError):
    """A step failed; what had been done was taken back."""


class Machine(Protocol):
    """What a plan may do."""

    def read(self, path: Path) -> str | None: ...
    def write(self, path: Path, text: str, mode: int) -> None: ...
    def remove(self, path: Path) -> None: ...
    def run(self, argv: Sequence[str]) -> tuple[int, str]: ...
    def answers(self, port: int) -> bool: ...
    def sleep(self, seconds: float) -> None: ...


class ThisMachine:
    """The real one."""

    def read(self, path: Path) -> str | None:
        try:
            return path.read_text()
        except FileNotFoundError:
            return None

    def write(self, path: Path, text: str, mode: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode(), mode)
        path.chmod(mode)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir() if path.parent.name.endswith(".d") else None

    def run(self, argv: Sequence[str]) -> tuple[int, str]:
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        except FileNotFoundError:
            return NOT_FOUND, f"{argv[0]}: not found"
        except subprocess.TimeoutExpired:
            return 124, "took too long"
        return done.returncode, (done.stderr or done.stdout).strip()

    def answers(self, port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def carry_out(steps: Sequence[Step], machine: Machine, say: Callable[[str], None]) -> None:
    """Do every step; where one fails, undo those before it, last first. Raises InstallError."""
    undo: list[Callable[[], None]] = []
    changed = False
    for step in steps:
        try:
            if isinstance(step, Run | Wait) and step.if_changed and not changed:
                continue
            changed = _do(step, machine, say, undo) or changed
        except (InstallError, OSError) as error:
            if undo:
                say("taking back what was done")
            for back in reversed(undo):
                with contextlib.suppress(OSError):
                    back()
            if isinstance(error, InstallError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise InstallError(f"{where}{error.strerror or error}", remedy="Are you root?") from error


def _do(step: Step, machine: Machine, say: Callable[[str], None], undo: list[Callable[[], None]]) -> bool:
    """Do one step; whether it changed a file."""
    match step:
        case Say(text):
            say(f"note: {text}")
        case IfFailed(argv):
            undo.append(lambda: _quietly(machine, argv))
        case Write(path, text, why, mode):
            before = machine.read(path)
            if before == text:
                say(f"have  {path} ({why})")
                return False
            say(f"write {path} ({why})")
            undo.append(lambda: machine.remove(path) if before is None else machine.write(path, before, mode))
            machine.write(path, text, mode)
            return True
        case Remove(path, why):
            before = machine.read(path)
            if before is not None:
                say(f"remove {path} ({why})")
                undo.append(lambda: machine.write(path, before, 0o644))
                machine.remove(path)
                return True
        case Run(argv, why, back, unless, may_fail):
            if unless and machine.run(unless)[0] == 0:
                say(f"have  {why}")
                return False
            say(f"run   {' '.join(argv)} ({why})")
            # Before it runs: a command that fails may have done half of it.
            if back:
                undo.append(lambda: _quietly(machine, back))
            code, told = machine.run(argv)
            if code and not may_fail:
                line = told.splitlines()[-1] if told else f"exit {code}"
                raise InstallError(f"{' '.join(argv)}: {line}", remedy=step.remedy or _next(argv, code, why))
        case Wait(port, answers, why, remedy, seconds):
            say(f"wait  until {why}")
            left = seconds
            while machine.answers(port) != answers:
                if left <= 0:
                    raise InstallError(f"waited in vain until {why}", remedy=remedy)
                machine.sleep(0.5)
                left -= 0.5
    return False


def _next(argv: Sequence[str], code: int, why: str) -> str:
    """What to do about a command that failed."""
    if code == NOT_FOUND:
        return f"There is no {argv[0]} here, and a service needs it; `abliterated serve` in a terminal does without"
    return f"Run it by hand until it succeeds ({why}), then this again: what was done before it was taken back"


def _quietly(machine: Machine, argv: Sequence[str]) -> None:
    machine.run(argv)


def described(steps: Sequence[Step]) -> list[str]:
    """The plan for people, as --dry-run prints it."""
    told = []
    for step in steps:
        match step:
            case Say(text):
                told.append(f"note: {text}")
            case Write(path, text, why, mode):
                told.append(f"write {path} ({why}, {mode:o})")
                told += [f"    | {line}" for line in text.splitlines()]
            case Remove(path, why):
                told.append(f"remove {path} ({why})")
            case Run(argv, why, _, unless, _):
                told.append(f"run   {' '.join(argv)} ({why}{'; unless it is so' if unless else ''})")
            case Wait(_, _, why, _, _):
                told.append(f"wait  until {why}")
    return told


def is_root() -> bool:
    return os.geteuid() == 0
