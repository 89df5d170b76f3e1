"""The user's converter as a process: started as it should be, watched, ended with us, its last words kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from abliterate.contract.errors import (
    AbliteratedError,
    Cancelled,
    DiskError,
    EngineUnavailable,
    ModelError,
    RecipeError,
)
from abliterate.contract.messages import Progress
from abliterated.pipeline import convert as room
from abliterated.pipeline.convert import check_converter, convert, stamp
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.watch import Watch
from engines import free_port
from pipeline.planted import plant
from strangers import gone, within


def program(at: Path, body: str) -> str:
    """A converter that does as `body` says; `outfile` is what it was asked to write."""
    path = at / "converter.py"
    path.write_text(
        "import os, sys, time\nfrom pathlib import Path\noutfile = Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
        f"{body}\n"
    )
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "edited"
    made.mkdir()
    (made / "config.json").write_text("{}")
    save_file(
        {"a": np.zeros((64, 64), dtype=np.float16), "b": np.zeros(4, dtype=np.float32)}, made / "model.safetensors"
    )
    return made


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".gguf", ".partial"))


def test_it_is_called_with_folder_file_and_the_weights_own_type(tmp_path: Path, folder: Path) -> None:
    model = plant(tmp_path).path.rename(tmp_path / "ready")
    words = tmp_path / "argv.json"
    convert(
        program(
            tmp_path,
            f"import json, shutil\nPath({str(words)!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
            f"shutil.copy({str(model)!r}, outfile)",
        ),
        folder,
        tmp_path / "made.gguf",
        Watch(),
    )
    argv, environment = json.loads(words.read_text())
    assert argv[0] == str(folder)
    assert argv[1:] == ["--outfile", str(tmp_path / ".made.gguf.partial"), "--outtype", "f16"]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert read_gguf(tmp_path / "made.gguf").tensors
    assert left(tmp_path) == ["made.gguf"]


def test_no_token_goes_to_it(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ModelError) as caught:
        convert(program(tmp_path, "sys.exit(os.environ.get('HF_TOKEN', 'none'))"), folder, tmp_path / "m.gguf", Watch())
    assert "none" in caught.value.message


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("sys.exit('ERROR: model X is not supported')", ModelError, r"\(exit 1\): ERROR: model X is not supported"),
        ("raise ValueError('no such tensor')", ModelError, "ValueError: no such tensor"),
        ("os.kill(os.getpid(), 11)", ModelError, "killed by SIGSEGV"),
        ("raise OSError(28, 'No space left on device')", DiskError, "full"),
        ("pass", ModelError, "can't read"),
        ("outfile.write_bytes(b'nonsense' * 9)", ModelError, "not a GGUF"),
        ("outfile.write_bytes(b'x'); sys.exit(3)", ModelError, r"\(exit 3\)"),
    ],
)
def test_what_went_wrong_is_said_and_nothing_left(
    tmp_path: Path, folder: Path, body: str, kind: type[AbliteratedError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        convert(program(tmp_path, body), folder, tmp_path / "made.gguf", Watch())
    assert left(tmp_path) == []


def test_an_engine_in_its_place_that_is_away_is_waited_for(tmp_path: Path, folder: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    check_converter(address)
    with pytest.raises(EngineUnavailable, match=f"no engine answers at {address}"):
        convert(address, folder, tmp_path / "made.gguf", Watch())
    assert left(tmp_path) == []


def test_it_is_told_how_far_it_is_and_ended_when_the_run_is(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOOK", 0.01)
    pid = tmp_path / "pid"
    body = f"outfile.write_bytes(bytes(4096)); Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    seen: list[Progress] = []
    watch = Watch(seen.append, lambda: pid.exists() and bool(pid.read_text()))
    with within(30), pytest.raises(Cancelled):
        convert(program(tmp_path, body), folder, tmp_path / "made.gguf", watch)
    assert not psutil.pid_exists(int(pid.read_text()))
    assert any(progress.message == "converting to GGUF" for progress in seen)
    assert left(tmp_path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's promise is Linux's")
def test_it_dies_with_a_run_that_is_killed(tmp_path: Path, folder: Path) -> None:
    pid = tmp_path / "pid"
    converter = program(tmp_path, f"Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")
    code = (
        "import sys; from pathlib import Path\n"
        "from abliterated.pipeline.convert import convert; from abliterated.pipeline.watch import Watch\n"
        "convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Watch())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, converter, str(folder), str(tmp_path / "made.gguf")])
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int(pid.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while not gone(child):
        assert time.monotonic() < deadline, "it outlived the run"
        time.sleep(0.02)


def test_a_converter_that_can_not_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not executable"):
        plain = tmp_path / "convert"
        plain.write_text("#!/bin/sh\n")
        check_converter(str(plain))
    plain.chmod(0o755)
    check_converter(str(plain))


def test_a_system_that_can_not_start_it_says_why(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert"
    script.write_bytes(b"\x7fELF of no machine")
    script.chmod(0o755)
    with pytest.raises(ModelError, match=r"convert could not convert the folder \(exit 1\): OSError.*format"):
        convert(str(script), folder, tmp_path / "made.gguf", Watch())
    monkeypatch.setattr(sys, "platform", "darwin")  # where no process of ours starts it
    with pytest.raises(ModelError, match=r"convert can't be started: .*format") as raised:
        convert(str(script), folder, tmp_path / "made.gguf", Watch())
    assert raised.value.remedy == "Check [tools] converter"
    (tmp_path / "made.gguf.log").unlink()
    (tmp_path / "made.gguf.log").mkdir()
    with pytest.raises(DiskError, match=r"can't write made\.gguf\.log: Is a directory") as full:
        convert(str(script), folder, tmp_path / "made.gguf", Watch())
    assert full.value.remedy == "Check its folder"
    assert left(tmp_path) == []


def test_a_gguf_without_a_tensor_is_no_model(tmp_path: Path, folder: Path) -> None:
    body = "import gguf\nwriter = gguf.GGUFWriter(outfile, 'llama')\nwriter.write_header_to_file()\n"
    body += "writer.write_kv_data_to_file()\nwriter.write_tensors_to_file()\nwriter.close()"
    with pytest.raises(ModelError, match=r"converter\.py wrote a GGUF without tensors") as raised:
        convert(program(tmp_path, body), folder, tmp_path / "made.gguf", Watch())
    assert "Update llama.cpp" in raised.value.remedy
    assert left(tmp_path) == []


def test_a_program_of_ones_own_is_called_as_it_is(tmp_path: Path, folder: Path) -> None:
    model = plant(tmp_path).path.rename(tmp_path / "ready")
    script = tmp_path / "convert"
    script.write_text(f'#!/bin/sh\nshift\ncp {model} "$2"\n')
    script.chmod(0o755)
    convert(str(script), folder, tmp_path / "made.gguf", Watch())
    assert (tmp_path / "made.gguf").read_bytes() == model.read_bytes()


def test_a_stamp_changes_the_header_alone(tmp_path: Path) -> None:
    source = plant(tmp_path).path
    target = tmp_path / "made.gguf"
    size = stamp(
        source,
        target,
        {"abliterated.version": "1", "abliterated.coverage": 1.0},
        quantize="keep",
        progress=lambda done, total: None,
        cancelled=lambda: False,
    )
    old, new = read_gguf(source), read_gguf(target)
    assert size == target.stat().st_size
    assert new.values["abliterated.version"] == "1"
    assert [entry.key for entry in new.key_values][: len(old.key_values)] == [entry.key for entry in old.key_values]
    data = [path.read_bytes()[found.data_start :] for path, found in ((source, old), (target, new))]
    assert data[0] == data[1]


def test_a_number_that_is_none_is_named_with_its_tensor_by_the_stamp_too(tmp_path: Path) -> None:
    source = plant(tmp_path, broken=True).path
    with pytest.raises(ModelError, match=r"blk\.2\.ffn_down\.weight: NaN or Inf among the weights") as raised:
        stamp(source, tmp_path / "m.gguf", {}, quantize="Q8_0", progress=lambda *_: None, cancelled=lambda: False)
    assert raised.value.remedy == "Download or pull the model again"
    assert not (tmp_path / "m.gguf").exists()


def test_a_full_disk_leaves_no_stamped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plant(tmp_path).path
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, *([0] * 8))))
    with pytest.raises(DiskError, match=r"needs .* MB, and its disk has 0.0 MB free"):
        stamp(source, tmp_path / "m.gguf", {}, quantize="keep", progress=lambda *_: None, cancelled=lambda: False)
    assert not (tmp_path / "m.gguf").exists()
