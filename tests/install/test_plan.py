"""What an installation does, in which order, and that a failure takes all of it back."""

from __future__ import annotations

import plistlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from abliterated.install.facts import agent, shared
from abliterated.install.machine import InstallError, ThisMachine, carry_out, described
from abliterated.install.plan import (
    ASIDE_PORT,
    CONTROL,
    OLLAMA_PORT,
    OTHER_PORT,
    SERVICE,
    SOCKET,
    Facts,
    Run,
    Wait,
    Write,
    install,
    uninstall,
)

FOLDER = shared("systemd")
TEXTS = {name: (FOLDER / name).read_text() for name in (SERVICE, SOCKET, CONTROL)}
TEXTS |= {"drop-in": (FOLDER / "ollama-drop-in.conf").read_text(), "agent": "<plist/>"}
SYSTEM = Facts(
    kind="system",
    program="/opt/a/bin/abliterated",
    home=Path("/root"),
    ollama_unit=True,
    store="/usr/share/ollama/.ollama/models",
    groups=frozenset({"ollama", "video", "render", "adm"}),
    port_taken=True,
    texts=TEXTS,
)
USER = replace(SYSTEM, kind="user", home=Path("/home/me"), uid=1000, ollama_unit=False, port_taken=False)


@dataclass
class Rehearsal:
    """A machine that writes down what is asked of it. Ollama holds 11434 until it is restarted with its drop-in."""

    files: dict[Path, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    fails: str = "nothing"
    users: set[str] = field(default_factory=set)
    ports: set[int] = field(default_factory=lambda: {OLLAMA_PORT})

    def read(self, path: Path) -> str | None:
        return self.files.get(path)

    def write(self, path: Path, text: str, mode: int) -> None:
        self.files[path] = text

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)

    def run(self, argv: Sequence[str]) -> tuple[int, str]:
        line = " ".join(argv)
        if line == "id -u abliterated":
            return (0, "") if "abliterated" in self.users else (1, "no such user")
        self.ran.append(line)
        if self.fails in line:
            return 1, f"{argv[0]} failed"
        if line.startswith("useradd"):
            self.users.add("abliterated")
        if line.startswith("userdel"):
            self.users.discard("abliterated")
        moved = any("50-abliterated" in str(path) for path in self.files)
        if "restart ollama" in line:
            self.ports = {ASIDE_PORT if moved else OLLAMA_PORT}
        if "enable --now" in line:
            self.ports |= {OTHER_PORT if self.ports == {OLLAMA_PORT} else OLLAMA_PORT}
        if "disable --now" in line and moved:
            self.ports.discard(OLLAMA_PORT)
        return 0, ""

    def answers(self, port: int) -> bool:
        return port in self.ports

    def sleep(self, seconds: float) -> None: ...


def do(facts: Facts, machine: Rehearsal, back: bool = False) -> list[str]:
    said: list[str] = []
    carry_out(uninstall(facts) if back else install(facts), machine, said.append)
    return said


def test_ollama_moves_before_its_port_is_taken() -> None:
    machine = Rehearsal()
    said = do(SYSTEM, machine)
    order = ["useradd", "usermod -aG ollama,render,video", "runuser", "daemon-reload", "restart ollama", "enable --now"]
    places = [next(n for n, line in enumerate(machine.ran) if part in line) for part in order]
    assert places == sorted(places)
    assert machine.ports == {ASIDE_PORT, OLLAMA_PORT}
    drop_in = machine.files[Path("/etc/systemd/system/ollama.service.d/50-abliterated.conf")]
    assert "OLLAMA_HOST=127.0.0.1:11435" in drop_in
    assert "ExecStart=/opt/a/bin/abliterated serve" in machine.files[Path("/etc/systemd/system") / SERVICE]
    assert all(any(str(path) in line for line in said) for path in machine.files), "each thing is said"


def test_doing_it_twice_restarts_and_changes_nothing() -> None:
    machine = Rehearsal()
    do(SYSTEM, machine)
    before, machine.ran = dict(machine.files), []
    do(SYSTEM, machine)
    assert machine.files == before
    assert not [line for line in machine.ran if "restart" in line or "stop" in line or "useradd" in line]


@pytest.mark.parametrize("kind", ["user", "mac"])
@pytest.mark.parametrize("taken", [True, False])
def test_a_user_s_second_installation_keeps_the_port_of_the_first(kind: str, taken: bool) -> None:
    """Whoever has 11434 then may be ourselves."""
    texts = TEXTS | {"agent": agent("/opt/abliterated", Path("/home/me"))}
    facts = replace(USER, kind=kind, texts=texts, port_taken=taken)  # type: ignore[arg-type]
    machine = Rehearsal(ports={OLLAMA_PORT} if taken else set())
    steps = install(facts)
    (first,) = [step.port for step in steps if isinstance(step, Wait)]
    assert first == (OTHER_PORT if taken else OLLAMA_PORT)
    machine.files = {step.path: step.text for step in steps if isinstance(step, Write)}
    again = replace(facts, port_taken=True, installed=True, listen=OTHER_PORT if taken else 0)
    steps = install(again)
    (second,) = [step.port for step in steps if isinstance(step, Wait)]
    assert second == first
    assert {step.path: step.text for step in steps if isinstance(step, Write)}.items() <= machine.files.items()


@pytest.mark.parametrize("kind", ["user", "mac"])
def test_a_configuration_that_is_there_is_the_person_s_and_is_never_overwritten(kind: str) -> None:
    facts = replace(USER, kind=kind, port_taken=True, ollama_app=True, listen=12000)  # type: ignore[arg-type]
    steps = install(facts)
    assert not [step for step in steps if isinstance(step, Write) and step.path.name == "config.toml"]
    assert [step.port for step in steps if isinstance(step, Wait)] == [12000]
    steps = install(replace(facts, listen=OLLAMA_PORT))
    waits = [step for step in steps if isinstance(step, Wait)]
    assert (waits[0].port, waits[0].answers, f":{OTHER_PORT}" in waits[0].remedy) == (OLLAMA_PORT, False, True)


@pytest.mark.parametrize(
    "fails", ["usermod", "runuser", "daemon-reload", "restart ollama.service", "enable --now abliterated.socket"]
)
def test_a_step_that_fails_takes_back_those_before_it(fails: str) -> None:
    older = {Path("/etc/systemd/system/ollama.service.d/50-abliterated.conf"): "theirs\n"}
    machine = Rehearsal(files=dict(older), fails=fails)
    with pytest.raises(InstallError):
        do(SYSTEM, machine)
    assert machine.files == older, "what was there before is there again"
    reloads = [n for n, line in enumerate(machine.ran) if "daemon-reload" in line]
    if fails in ("restart ollama.service", "enable --now abliterated.socket"):
        assert machine.ran[reloads[-1] + 1] == "systemctl restart ollama.service", "after its drop-in is gone"
    assert "abliterated" not in machine.users


def test_a_port_that_stays_taken_takes_everything_back_and_ollama_too() -> None:
    machine = Rehearsal()
    answers = machine.answers
    machine.answers = lambda port: port == OLLAMA_PORT or answers(port)  # type: ignore[method-assign]
    with pytest.raises(InstallError, match="11434 is free"):
        do(SYSTEM, machine)
    assert machine.files == {}
    assert machine.ports == {OLLAMA_PORT}
    assert machine.ran[-1] == "userdel abliterated"
    assert machine.ran[-2] == "systemctl restart ollama.service"


def test_uninstalling_gives_ollama_its_port_back_and_leaves_nothing_of_ours() -> None:
    machine = Rehearsal()
    do(SYSTEM, machine)
    said = do(SYSTEM, machine, back=True)
    assert machine.files == {}
    assert machine.ports == {OLLAMA_PORT}
    assert any("Kept" in line for line in said)
    do(SYSTEM, machine, back=True)


def test_groups_that_do_not_exist_keep_no_unit_from_starting() -> None:
    bare = replace(SYSTEM, groups=frozenset({"video"}))
    (unit,) = [step for step in install(bare) if isinstance(step, Write) and step.path.name == SERVICE]
    assert "SupplementaryGroups=video\n" in unit.text
    none = replace(SYSTEM, groups=frozenset())
    (unit,) = [step for step in install(none) if isinstance(step, Write) and step.path.name == SERVICE]
    assert "SupplementaryGroups" not in unit.text
    assert not [step for step in install(none) if isinstance(step, Run) and step.argv[0] in ("usermod", "runuser")]


def test_a_user_who_can_t_move_ollama_gets_a_port_beside_it() -> None:
    machine = Rehearsal()
    said = do(replace(USER, port_taken=True), machine)
    config = machine.files[Path("/home/me/.config/abliterated/config.toml")]
    assert f'listen = "127.0.0.1:{OTHER_PORT}"' in config
    assert f'upstream = "http://127.0.0.1:{OLLAMA_PORT}"' in config
    assert not [line for line in machine.ran if not line.startswith(("systemctl --user", "loginctl"))]
    assert any("isn't yours to move" in line for line in said)
    assert Path("/home/me/.config/systemd/user") / SOCKET not in machine.files


def test_a_user_without_ollama_gets_its_port_by_a_socket_unit() -> None:
    machine = Rehearsal(ports=set())
    do(USER, machine)
    assert Path("/home/me/.config/systemd/user") / SOCKET in machine.files
    assert "loginctl enable-linger" in machine.ran


def test_on_a_mac_ollama_s_app_keeps_its_port_and_that_is_said() -> None:
    mac = replace(USER, kind="mac", ollama_app=True, texts={"agent": agent("/opt/abliterated", Path("/Users/me"))})
    machine = Rehearsal()
    steps = install(mac)
    assert [step.port for step in steps if isinstance(step, Wait)] == [OTHER_PORT]
    assert any("Ollama's app owns port" in line for line in described(steps))
    plist = next(step for step in steps if isinstance(step, Write) and step.path.suffix == ".plist")
    told = plistlib.loads(plist.text.encode())
    assert told["ProgramArguments"] == ["/opt/abliterated", "serve"]
    assert told["StandardErrorPath"] == "/Users/me/Library/Logs/abliterated.log"
    known = {"Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut", "Umask"}
    assert set(told) == known | {"StandardOutPath", "StandardErrorPath"}
    assert machine.files == {}


def test_a_real_file_is_written_whole_and_a_drop_in_s_empty_folder_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "ollama.service.d" / "50-abliterated.conf"
    said: list[str] = []
    with pytest.raises(InstallError, match="false"):
        carry_out([Write(path, "x\n", "drop-in"), Run(("false",), "fails")], ThisMachine(), said.append)
    assert not path.parent.exists()
    assert "taking back what was done" in said


def test_a_command_that_fails_is_named_with_what_to_do() -> None:
    for argv, words in (
        (("no-such-program", "x"), "There is no no-such-program here.*abliterated serve"),
        (("false",), r"Run it by hand until it succeeds \(tell it\), then this again"),
    ):
        with pytest.raises(InstallError) as failed:
            carry_out([Run(argv, "tell it")], ThisMachine(), lambda _: None)
        assert failed.value.message.startswith(" ".join(argv))
        assert re.search(words, failed.value.remedy)
    with pytest.raises(InstallError, match=r"runuser.*/models") as failed:
        do(SYSTEM, Rehearsal(fails="runuser"))
    assert "Let the group ollama read it" in failed.value.remedy


@pytest.mark.parametrize("verb", ["install", "uninstall"])
@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_a_dry_run_prints_the_plan_and_does_nothing(verb: str, kind: str) -> None:
    told = subprocess.run(
        [str(Path(sys.executable).parent / "abliterated"), verb, kind, "--dry-run"], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "abliterated.service" in told.stdout
    assert not Path("/etc/systemd/system/abliterated.service").exists()
