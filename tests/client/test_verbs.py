"""The console script against a daemon on a real socket: what is printed, where, and how it exits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.contract.messages import Failure, Result
from client.conftest import IDS, make_job
from client.fake_daemon import FakeDaemon

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_status_is_a_table_with_a_reason(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0, state="running", stage="search", done=15, total=60, remaining=340, submitted=1.0))
    daemon.put(make_job(1, reason="window", explanation="waits until 01:00"))
    daemon.put(make_job(2, state="failed", failure=Failure(failure="disk", message="no room on /x")))
    done = run("status")
    assert done.returncode == 0
    head, first, second, third = done.stdout.splitlines()
    assert head.split() == ["ID", "NAME", "MODEL", "→", "TARGET", "STATE", "REASON", "%", "ETA", "AGE"]
    assert IDS[0][-6:] in first
    assert "ollama:qwen3:8b → qwen3-abliterated:8b" in first
    for words in ("running", "search", "25%", "5m40s"):
        assert words in first
    assert "window: waits until 01:00" in second
    assert "failed" in third
    assert "disk: no room on /x" in third
    assert "abliterated 9.9.9" in done.stderr
    assert "ollama 0.34.1" in done.stderr
    assert "\x1b" not in done.stdout


def test_status_of_an_empty_queue_says_what_to_do(daemon: FakeDaemon, run: Run) -> None:
    done = run("status")
    assert (done.returncode, done.stdout) == (0, "")
    assert "abliterate submit" in done.stderr


def test_status_as_json_has_jobs_and_the_daemon(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0))
    daemon.put(make_job(1, state="succeeded", result=Result(product="x.gguf", format="gguf")))
    daemon.paused = True
    answer = json.loads(run("status", "--json").stdout)
    assert [job["id"] for job in answer["jobs"]] == [IDS[0], IDS[1]]
    assert answer["paused"] is True
    assert answer["version"] == "9.9.9"
    assert answer["engine"]["kind"] == "ollama"
    assert answer["proxy"] == "127.0.0.1:11434"


def test_one_job_is_shown_by_a_piece_of_its_id(daemon: FakeDaemon, run: Run) -> None:
    result = Result(product="x.gguf", format="gguf", metrics={"refusal_after": 0.02}, notes=["Q8_0 in two tensors"])
    daemon.put(make_job(0, state="succeeded", result=result, submitted=1.0))
    done = run("status", IDS[0][-4:])
    assert done.returncode == 0
    for words in (IDS[0], "succeeded", "refusal_after", "0.02", "Q8_0 in two tensors"):
        assert words in done.stdout
    assert json.loads(run("status", IDS[0], "--json").stdout)["id"] == IDS[0]


def test_what_others_named_can_t_drive_the_terminal(daemon: FakeDaemon, run: Run) -> None:
    evil = "a\x1b[2Jb\x9b31m\u202ec\nd"
    daemon.put(make_job(0, label=evil, explanation=evil, reason="window", model=f"/x/{evil}.gguf"))
    for args in (["status"], ["status", IDS[0]], ["status", "--json"], ["status", IDS[0], "--json"]):
        done = run(*args)
        assert done.returncode == 0
        for char in "\x1b\x9b\u202e":
            assert char not in done.stdout
    assert "\\x1b[2Jb" in run("status").stdout
    assert json.loads(run("status", IDS[0], "--json").stdout)["label"] == evil


def test_no_daemon_is_one_clear_error_and_no_invented_data(run: Run) -> None:
    for args in (["status"], ["status", "--json"], ["pause"], ["wait", "abcd"], ["logs", "abcd"], ["cancel", "abcd"]):
        done = run(*args)
        assert done.returncode == 69, args
        assert done.stdout == ""
        message, remedy = done.stderr.splitlines()
        assert message.startswith("abliterate: the daemon does not answer at ")
        assert remedy.startswith("  → Start it with `abliterated serve`")


def test_submitting_a_model_s_name(daemon: FakeDaemon, run: Run) -> None:
    done = run("submit", "qwen3:8b")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert daemon.jobs[job].model == "ollama:qwen3:8b"
    assert daemon.jobs[job].label == "qwen3:8b"
    assert done.stderr == ""


def test_submitting_a_path_it_is_called_as_its_last_part(daemon: FakeDaemon, run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").touch()
    job = run("submit", str(tmp_path / "base.gguf")).stdout.strip()
    assert (daemon.jobs[job].label, daemon.jobs[job].model) == ("base.gguf", str(tmp_path / "base.gguf"))


def test_submitting_a_recipe_as_it_is_written(daemon: FakeDaemon, run: Run, tmp_path: Path) -> None:
    text = '# mine\nmodel = "ollama:qwen3:8b"\n'
    (tmp_path / "night.toml").write_text(text)
    done = run("submit", "night.toml", "--json")
    answer = json.loads(done.stdout)
    assert answer == {
        "id": answer["id"],
        "target": "qwen3-abliterated:8b",
        "existing": False,
        "delivered": "daemon",
    }
    assert daemon.submitted[answer["id"]].recipe == text
    assert daemon.submitted[answer["id"]].label == "night"


def test_submitting_from_stdin_with_settings(daemon: FakeDaemon, run: Run) -> None:
    done = run(
        "submit", "-", "--set", "edit.strength=0.5", "--set", "edit.layers=2-30", "--name", "mild:8b",
        input='model = "ollama:qwen3:8b"',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = daemon.submitted[done.stdout.strip()].recipe
    assert "strength = 0.5" in sent
    assert 'layers = "2-30"' in sent
    assert daemon.jobs[done.stdout.strip()].target == "mild:8b"


def test_paths_are_sent_absolute_from_the_recipe_s_folder(daemon: FakeDaemon, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.gguf").write_bytes(b"GGUF")
    (folder / "ask.txt").write_text("x\n")
    (tmp_path / "here.txt").write_text("x\n")
    (folder / "r.toml").write_text(
        'model = "base.gguf"\n[prompts]\nharmful = ["ask.txt", "builtin", "hf:a/b#text"]\n[matrix]\n'
        'model = ["base.gguf"]'
    )
    done = run("submit", "recipes/r.toml", "--set", "prompts.harmless=here.txt")
    assert done.returncode == 0, done.stderr
    sent = daemon.submitted[done.stdout.strip()].recipe
    assert f'model = "{folder}/base.gguf"' in sent
    assert f'"{folder}/ask.txt"' in sent
    assert '"builtin"' in sent
    assert '"hf:a/b#text"' in sent
    assert f'harmless = "{tmp_path}/here.txt"' in sent


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["submit", "none.toml"], 7, ["none.toml: no such recipe", "abliterate new"]),
        (
            ["submit", "./none.gguf"],
            2,
            ["model:", "no such file or folder", "Correct the path: it was looked for at /"],
        ),
        (["submit", "a b"], 2, ["'a b' is no model name"]),
        (["submit", "qwen3", "--set", "edit.strenght=1"], 2, ["edit.strenght: unknown key", "`strength`"]),
        (["submit", "qwen3", "--set", "edit"], 2, ["no key=value"]),
        (["submit", "qwen3", "--set", "model.x=1"], 2, ["model is no table"]),
        (["submit", "qwen3", "--set", "edit.strength=nan"], 2, ["not a finite number"]),
        (["submit", "qwen3", "--name", "a b"], 2, ["no model name Ollama accepts"]),
        (["submit", "~nobody-here/x.gguf"], 2, ["no such user's home"]),
        (["submit", "~nobody-here/x.toml"], 2, ["no such user's home"]),
        (["status", "--socket", "~nobody-here/x"], 2, ["no such user's home"]),
        (["status", "--socket", "/" + "x" * 200], 69, ["too long a path"]),
        (["statsu"], 2, ["no verb 'statsu'", "abliterate status"]),
        (["cancel"], 2, ["ID"]),
        (["wait", "abcd", "--timeout", "soon"], 2, ["90s, 10m, 2h or 1d"]),
        (["status", "../../x"], 7, ["no job's id"]),
        (["status", "zzzz"], 7, ["no job zzzz"]),
        (["--config", "none.toml", "status"], 2, ["none.toml: no such configuration file"]),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(
    daemon: FakeDaemon, run: Run, args: list[str], code: int, words: list[str]
) -> None:
    done = run(*args)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("abliterate: ")
    assert "\n  → " in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not daemon.submitted


def test_with_the_daemon_down_the_folder_alone_takes_the_recipe(run: Run, tmp_path: Path) -> None:
    done = run("submit", "qwen3:8b", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["delivered"] == "folder"
    incoming = tmp_path / "state" / "spool" / "incoming"
    assert [path.name for path in incoming.iterdir()] == [f"{answer['id']}.qwen3-8b.toml"]
    assert Path(answer["path"]).read_text() == 'model = "ollama:qwen3:8b"\n'
    assert "the daemon does not answer" in done.stderr
    assert "abliterated serve" in done.stderr


def test_a_malformed_recipe_never_reaches_the_folder(run: Run, tmp_path: Path) -> None:
    assert run("submit", "-", input="model = ").returncode == 2
    assert not (tmp_path / "state").exists()


def test_a_lone_socket_that_is_down_fills_no_other_daemon_s_in_tray(run: Run, tmp_path: Path) -> None:
    bare = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = run("submit", "qwen3:8b", "--socket", str(tmp_path / "none.sock"), env=bare)
    assert done.returncode == 69
    assert "--config" in done.stderr
    assert list(tmp_path.rglob("*.toml")) == [tmp_path / "config.toml"]


def test_hold_release_cancel_retry(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0))
    piece = IDS[0][-6:]
    for verb, state in (("hold", "held"), ("release", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        done = run(verb, piece)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[:2] == [IDS[0], state]
        assert daemon.jobs[IDS[0]].state == state


def test_one_refusal_does_not_keep_the_others_from_being_done(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0, state="succeeded"))
    daemon.put(make_job(1))
    done = run("cancel", IDS[0], "nojob", IDS[1], "--json")
    assert done.returncode == 6
    assert "is succeeded" in done.stderr
    assert "no job nojob" in done.stderr
    assert [view["state"] for view in json.loads(done.stdout)["jobs"]] == ["cancelled"]


def test_pause_and_resume(daemon: FakeDaemon, run: Run) -> None:
    assert run("pause").stdout.startswith("paused")
    assert daemon.paused
    assert "queue paused" in run("status").stderr
    assert json.loads(run("resume", "--json").stdout) == {"paused": False}
    assert not daemon.paused


def test_logs_come_as_they_are(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0, state="succeeded"))
    daemon.write_log(IDS[0], b"one\ntwo \xe2\x9c\x93\n" * 20_000)
    done = run("logs", IDS[0])
    assert done.returncode == 0
    assert done.stdout == "one\ntwo ✓\n" * 20_000


def test_check_reads_the_recipe_and_nothing_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('model = "/nowhere/at/all.gguf"\n')
    (tmp_path / "bad.toml").write_text('model = "ollama:x"\n\n[edit]\nstrenght = 1\nnorm = "colums"\n')
    done = run("check", "good.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "all-abliterated:latest" in done.stdout
    done = run("check", "good.toml", "bad.toml")
    assert done.returncode == 2
    assert "bad.toml, line 4: edit.strenght: unknown key (did you mean `strength`?)" in done.stderr
    assert "bad.toml, line 5: edit.norm:" in done.stderr
    verdicts = json.loads(run("check", "good.toml", "bad.toml", "--json").stdout)["recipes"]
    assert [verdict["valid"] for verdict in verdicts] == [True, False]
    assert len(verdicts[1]["problems"]) == 2
    assert run("check", "none.toml").returncode == 7
    assert run("check", ".").returncode == 2
    assert run("check", "-", input='model = "ollama:x"').returncode == 0


def test_new_writes_a_recipe_that_check_and_submit_take(daemon: FakeDaemon, run: Run) -> None:
    text = run("new", "llama3.2:1b").stdout
    assert run("check", "-", input=text).returncode == 0
    assert run("submit", "-", input=text).returncode == 0


def test_output_nobody_reads_is_no_error(daemon: FakeDaemon, environment: dict[str, str], tmp_path: Path) -> None:
    for number in range(3):
        daemon.put(make_job(number, label="x" * 60_000))
    script = '"$0" status --json | head -n 1; echo "${PIPESTATUS[0]}"'
    from client.conftest import ABLITERATE

    done = subprocess.run(
        ["bash", "-c", script, str(ABLITERATE)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("\n141\n")
    assert done.stderr == ""


def test_the_version_and_bare_help(run: Run) -> None:
    from abliterate import __version__

    assert run("--version").stdout == f"abliterate {__version__}\n"
    assert run().returncode == 2
    assert "start here" in run("--help").stdout


def test_a_narrow_locale_breaks_nothing(daemon: FakeDaemon, run: Run, environment: dict[str, str]) -> None:
    daemon.put(make_job(0))
    done = run("status", env=environment | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert "\\u2192" in done.stdout
