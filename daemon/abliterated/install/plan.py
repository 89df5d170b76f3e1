"""What an installation does, in order, with what undoes each step. Pure: facts in, steps out. Touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

OLLAMA_PORT, ASIDE_PORT, OTHER_PORT = 11434, 11435, 11436
SERVICE, SOCKET, CONTROL = "abliterated.service", "abliterated.socket", "abliterated-control.socket"
LABEL = "io.abliterated.daemon"


@dataclass(frozen=True)
class Write:
    """A whole file; what was there before comes back when the plan fails."""

    path: Path
    text: str
    why: str
    mode: int = 0o644


@dataclass(frozen=True)
class Remove:
    """A file that goes, if it is there."""

    path: Path
    why: str


@dataclass(frozen=True)
class Run:
    """A command; `undo` runs when a later step fails. `unless`: skipped where this one succeeds."""

    argv: tuple[str, ...]
    why: str
    undo: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    may_fail: bool = False
    if_changed: bool = False  # only where a file of the plan changed
    remedy: str = ""  # where running it by hand tells nothing more


@dataclass(frozen=True)
class IfFailed:
    """Does nothing but remember a command for the case that a later step fails; the last remembered runs first."""

    argv: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Until somebody answers on the port, or nobody does."""

    port: int
    answers: bool
    why: str
    remedy: str
    seconds: float = 60.0
    if_changed: bool = False


@dataclass(frozen=True)
class Say:
    """What a person should know; does nothing."""

    text: str


Step = Write | Remove | Run | IfFailed | Wait | Say


@dataclass(frozen=True)
class Facts:
    """What was found on the machine."""

    kind: Literal["system", "user", "mac"]
    program: str
    home: Path
    uid: int = 0
    ollama_unit: bool = False  # of the same manager: the system's for a system installation, the user's for a user's
    ollama_app: bool = False
    ollama_user: str = "ollama"
    store: str = ""
    groups: frozenset[str] = frozenset()
    port_taken: bool = False
    installed: bool = False  # ours is here already: whoever has the port may be it
    listen: int = 0  # the proxy's port in a configuration that is there already: it is the person's, and stays
    texts: dict[str, str] = field(default_factory=dict)


def install(facts: Facts) -> list[Step]:
    """The steps of an installation."""
    return {"system": _system, "user": _user, "mac": _mac}[facts.kind](facts)


def uninstall(facts: Facts) -> list[Step]:
    """The steps back. Jobs, models and configuration stay."""
    if facts.kind == "mac":
        agent = _agent(facts)
        return [
            Run(("launchctl", "bootout", f"gui/{facts.uid}/{LABEL}"), "stop the agent", may_fail=True),
            Remove(agent, "the agent's plist"),
            Say("Ollama's app takes port 11434 again when it is started anew."),
        ]
    manager, folder = _manager(facts), _units(facts)
    steps: list[Step] = [
        Run((*manager, "disable", "--now", SERVICE, SOCKET, CONTROL), "stop the daemon", may_fail=True),
        *(Remove(folder / name, "unit") for name in (SERVICE, SOCKET, CONTROL)),
        Remove(_drop_in(facts), "Ollama's drop-in: it goes back to its own port"),
        Run((*manager, "daemon-reload"), "tell systemd"),
    ]
    if facts.ollama_unit:
        steps += [
            Run((*manager, "restart", "ollama.service"), "Ollama goes back to its port"),
            Wait(OLLAMA_PORT, True, "Ollama answers on its own port", "journalctl -u ollama"),
        ]
    kept = "/var/lib/abliterated and /etc/abliterated" if facts.kind == "system" else "its state and configuration"
    return [*steps, Say(f"Kept: {kept}, and every model in Ollama.")]


def _system(facts: Facts) -> list[Step]:
    manager, folder = _manager(facts), _units(facts)
    joined = sorted(facts.groups & {facts.ollama_user, "video", "render"})
    steps: list[Step] = [
        Run(
            ("useradd", "--system", "--user-group", "--home-dir", "/var/lib/abliterated", "--no-create-home",
             "--shell", "/usr/sbin/nologin", "abliterated"),
            "a user of its own",
            undo=("userdel", "abliterated"),
            unless=("id", "-u", "abliterated"),
        ),
    ]  # fmt: skip
    if joined:
        why = "read Ollama's store, use the GPU" if facts.ollama_user in joined else "use the GPU"
        steps.append(Run(("usermod", "-aG", ",".join(joined), "abliterated"), why))
    if facts.store and facts.ollama_user in facts.groups:
        steps.append(
            Run(
                ("runuser", "-u", "abliterated", "--", "test", "-r", facts.store, "-a", "-x", facts.store),
                f"check that it can read {facts.store}",
                remedy=f"Let the group {facts.ollama_user} read it (chmod g+rX, the folders above it too), then again",
            )
        )
    steps += [Write(folder / name, text, "unit") for name, text in _unit_texts(facts).items()]
    steps += _moved_ollama(facts, manager)
    steps += [
        Run(
            (*manager, "enable", "--now", SOCKET, CONTROL, SERVICE),
            "start it now and with the machine",
            undo=(*manager, "disable", "--now", SOCKET, CONTROL, SERVICE),
        ),
        Wait(OLLAMA_PORT, True, "the proxy answers on Ollama's port", "journalctl -u abliterated"),
        Say("Who may submit recipes: members of the group abliterated (`usermod -aG abliterated NAME`)."),
    ]
    return steps


def _user(facts: Facts) -> list[Step]:
    manager, folder = _manager(facts), _units(facts)
    beside = not facts.ollama_unit and _taken_by_others(facts)
    config = facts.home / ".config" / "abliterated" / "config.toml"
    steps: list[Step] = _as_configured(facts, config)
    if beside:
        steps += [
            Say(
                f"Port {OLLAMA_PORT} belongs to an Ollama that isn't yours to move: the proxy listens on {OTHER_PORT}. "
                "With `sudo abliterated install --system` it gets Ollama's own port."
            ),
            Write(
                config,
                f'[proxy]\nlisten = "127.0.0.1:{OTHER_PORT}"\nupstream = "http://127.0.0.1:{OLLAMA_PORT}"\n',
                "where the proxy listens",
                0o600,
            ),
        ]
    steps += [
        Write(folder / name, text, "unit")
        for name, text in _unit_texts(facts, beside or facts.listen not in (0, OLLAMA_PORT)).items()
    ]
    steps += _moved_ollama(facts, manager)
    port = facts.listen or (OTHER_PORT if beside else OLLAMA_PORT)
    units = (SOCKET, SERVICE) if port == OLLAMA_PORT else (SERVICE,)
    steps += [
        Run(
            (*manager, "enable", "--now", *units),
            "start it now and with your session",
            undo=(*manager, "disable", "--now", *units),
        ),
        Wait(port, True, "the proxy answers", "journalctl --user -u abliterated"),
        Run(("loginctl", "enable-linger"), "go on when you log out, for the nights", may_fail=True),
    ]
    return steps


def _mac(facts: Facts) -> list[Step]:
    agent = _agent(facts)
    config = facts.home / "Library" / "Application Support" / "abliterated" / "config.toml"
    steps: list[Step] = _as_configured(facts, config)
    beside = _taken_by_others(facts) or (facts.ollama_app and not facts.listen)
    if beside:
        # The app ends whoever has its port and takes it: moving it needs its own environment, set before it starts.
        steps += [
            Say(
                f"Ollama's app owns port {OLLAMA_PORT} and stops other servers there: the proxy listens on "
                f"{OTHER_PORT}. Point your clients at 127.0.0.1:{OTHER_PORT} (OLLAMA_HOST), or quit the app and use "
                "`ollama serve`."
            ),
            Write(
                config,
                f'[proxy]\nlisten = "127.0.0.1:{OTHER_PORT}"\nupstream = "http://127.0.0.1:{OLLAMA_PORT}"\n',
                "where the proxy listens",
                0o600,
            ),
        ]
    port = facts.listen or (OTHER_PORT if beside else OLLAMA_PORT)
    return [
        *steps,
        Write(agent, facts.texts["agent"], "the agent's plist"),
        Run(("launchctl", "bootout", f"gui/{facts.uid}/{LABEL}"), "stop an older one", may_fail=True),
        Run(
            ("launchctl", "bootstrap", f"gui/{facts.uid}", str(agent)),
            "start it now and at login",
            undo=("launchctl", "bootout", f"gui/{facts.uid}/{LABEL}"),
        ),
        Wait(port, True, "the proxy answers", "see ~/Library/Logs/abliterated.log"),
    ]


def _taken_by_others(facts: Facts) -> bool:
    return facts.port_taken and not facts.installed and not facts.listen


def _as_configured(facts: Facts, config: Path) -> list[Step]:
    """A configuration that is there already is kept; that its port can be had is seen before anything starts."""
    if not facts.listen:
        return []
    steps: list[Step] = [Say(f"{config} stays as it is: the proxy listens on {facts.listen}.")]
    if facts.listen == OLLAMA_PORT and facts.port_taken and not facts.installed and not facts.ollama_unit:
        remedy = f'In {config}: [proxy] listen = "127.0.0.1:{OTHER_PORT}", upstream = "http://127.0.0.1:{OLLAMA_PORT}"'
        steps.append(Wait(OLLAMA_PORT, False, f"{OLLAMA_PORT} is free", remedy, seconds=1))
    return steps


def _moved_ollama(facts: Facts, manager: Sequence[str]) -> list[Step]:
    """Ollama goes to the port beside, by a drop-in: its own unit is its installer's. Then 11434 is free."""
    steps: list[Step] = []
    reload, restart = (*manager, "daemon-reload"), (*manager, "restart", "ollama.service")
    if facts.ollama_unit:
        # Taken back after the drop-in is gone, or Ollama would read it once more.
        steps += [IfFailed(restart), IfFailed(reload)]
        steps.append(Write(_drop_in(facts), facts.texts["drop-in"], f"Ollama listens on {ASIDE_PORT} from now on"))
    steps.append(Run(reload, "tell systemd", if_changed=True))
    if facts.ollama_unit:
        steps += [
            Run(
                (*manager, "stop", SERVICE, SOCKET), "an older one lets go of the port", may_fail=True, if_changed=True
            ),
            Run(restart, "Ollama moves", if_changed=True),
            Wait(ASIDE_PORT, True, f"Ollama answers on {ASIDE_PORT}", "systemctl status ollama"),
            Wait(
                OLLAMA_PORT,
                False,
                f"{OLLAMA_PORT} is free",
                "find who has it: ss -ltnp 'sport = 11434'",
                if_changed=True,
            ),
        ]
    elif facts.port_taken and facts.kind == "system":
        remedy = "stop the Ollama there, or run it as a service"
        steps.append(Wait(OLLAMA_PORT, False, f"{OLLAMA_PORT} is free", remedy, seconds=5, if_changed=True))
    return steps


def _unit_texts(facts: Facts, beside: bool = False) -> dict[str, str]:
    groups = " ".join(sorted(facts.groups & {"video", "render"}))
    service = facts.texts[SERVICE].replace("/usr/bin/abliterated", facts.program)
    # A group that does not exist keeps a unit from starting.
    named = f"SupplementaryGroups={groups}\n" if groups else ""
    service = service.replace("SupplementaryGroups=video render\n", named)
    if facts.kind == "user":
        return {SERVICE: service} if beside else {SERVICE: service, SOCKET: facts.texts[SOCKET]}
    return {SERVICE: service, SOCKET: facts.texts[SOCKET], CONTROL: facts.texts[CONTROL]}


def _manager(facts: Facts) -> tuple[str, ...]:
    return ("systemctl",) if facts.kind == "system" else ("systemctl", "--user")


def _units(facts: Facts) -> Path:
    return Path("/etc/systemd/system") if facts.kind == "system" else facts.home / ".config" / "systemd" / "user"


def _drop_in(facts: Facts) -> Path:
    return _units(facts) / "ollama.service.d" / "50-abliterated.conf"


def _agent(facts: Facts) -> Path:
    return facts.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
