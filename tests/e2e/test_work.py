"""One recipe in the foreground: `abliterated work`, and every bad input a person may give it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from abliterated import refuser
from e2e.daemons import BIN
from pipeline.folders import CONVERTER, listed, planted_folder
from pipeline.planted import plant

pytestmark = pytest.mark.e2e


def work(
    folder: Path, recipe: str, *arguments: str, before: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    return subprocess.run(
        [*(before or []), str(BIN / "abliterated"), "work", str(path), "--out", str(folder / "out"), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
    )


def recipe(**changes: str) -> str:
    data = refuser.files()
    values = {"model": str(data.model), "harmful": str(data.harmful), "harmless": str(data.harmless)} | changes
    return (
        f'model = "{values["model"]}"\n'
        f'[prompts]\nharmful = "{values["harmful"]}"\nharmless = "{values["harmless"]}"\ncount = 64\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 16\ntokens = 48\n"
    )


def products(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*.gguf")) if (folder / "out").exists() else []


def test_a_recipe_becomes_one_gguf_beside_its_reports(tmp_path: Path) -> None:
    told = work(tmp_path, recipe(), "--json")
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert products(tmp_path) == [summary["product"]]
    assert summary["metrics"]["refusal_before"] >= 0.9
    assert summary["metrics"]["refusal_after"] <= 0.1
    assert summary["coverage"] == 1.0
    assert "direction" in told.stderr, "progress is told"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")], "nothing half-written"
    direction = next((tmp_path / "out").glob("direction*.safetensors"))

    again = tmp_path / "again"
    again.mkdir()
    by_file = (
        f'model = "{refuser.files().model}"\n[direction]\nmethod = "file"\nfile = "{direction}"\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 0\n"
    )
    told = work(again, by_file, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["coverage"] == 1.0
    assert len(products(again)) == 1


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        told = work(folder, recipe())
        assert told.returncode == 0, told.stderr
        made.append((folder / "out" / products(folder)[0]).read_bytes())
    assert made[0] == made[1]


def truncated(path: Path) -> None:
    path.write_bytes(refuser.files().model.read_bytes()[:100_000])


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"NOPE" + refuser.files().model.read_bytes()[4:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [truncated, wrong_magic, empty])
def test_a_gguf_that_is_none_is_named(tmp_path: Path, make: object) -> None:
    make(tmp_path / "bad.gguf")  # type: ignore[operator]
    told = work(tmp_path, recipe(model="bad.gguf"))
    assert told.returncode == 3, told.stderr
    assert "bad.gguf" in told.stderr
    assert "→" in told.stderr
    assert "Traceback" not in told.stderr
    assert products(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "without a prompt"), (b"# only this\n", "without a prompt"), (b"ok\n\xff\xfe\n", "UTF-8")],
)
def test_a_prompt_file_that_holds_none_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    told = work(tmp_path, recipe(harmful="p.txt"))
    assert told.returncode == 2, told.stderr
    assert "p.txt" in told.stderr
    assert word.lower() in told.stderr.lower()
    assert products(tmp_path) == []


def test_a_missing_model_and_an_impossible_name_are_named(tmp_path: Path) -> None:
    told = work(tmp_path, recipe(model="nowhere.gguf"))
    assert (told.returncode, "nowhere.gguf" in told.stderr) == (3, True)
    told = work(tmp_path, 'name = "no spaces please"\n' + recipe())
    assert told.returncode == 2
    assert "no spaces please" in told.stderr


# --- on a planted model: small, and every weight is known -------------------------------------------------------------


def planted_recipe(model: str = "./planted.gguf", more: str = "", harmless: str = "harmless.txt") -> str:
    return (
        f'model = "{model}"\n[prompts]\nharmful = "harmful.txt"\nharmless = "{harmless}"\n'
        f"[search]\ntrials = 0\n[evaluate]\nprompts = 16\ntokens = 8\n{more}"
    )


BY_FILE = '[direction]\nmethod = "file"\nfile = "given.safetensors"\n'


def given(folder: Path, *numbers: float, width: int = 64) -> None:
    vector = np.zeros(width, dtype=np.float32)
    vector[: len(numbers)] = numbers
    save_file({"direction": vector}, folder / "given.safetensors")


def no_language_model(folder: Path, architecture: str, kind: str = "") -> None:
    writer = gguf.GGUFWriter(folder / "planted.gguf", architecture)
    if kind:
        writer.add_type(kind)
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def renamed(folder: Path, architecture: str) -> None:
    path = folder / "planted.gguf"
    assert len(architecture) == len("llama")
    path.write_bytes(path.read_bytes().replace(b"llama", architecture.encode()))


def halved(folder: Path) -> None:
    data = (folder / "planted.gguf").read_bytes()
    (folder / "planted.gguf").write_bytes(data[: len(data) // 2])


def with_a_long_prompt(folder: Path) -> None:
    with (folder / "harmful.txt").open("a") as file:
        file.write("how do you " + "bake " * 200 + "\n")


def enormous(folder: Path) -> None:
    """A model whose embedding alone has two terabytes, of which the disk holds none."""
    writer = gguf.GGUFWriter(folder / "planted.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    size = 1 << 41
    writer.add_tensor_info("token_embd.weight", (size // 256, 64), np.dtype(np.float32), size)
    for name in ("attn_output.weight", "ffn_down.weight"):
        writer.add_tensor_info(f"blk.0.{name}", (64, 64), np.dtype(np.float32), 64 * 64 * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (folder / "planted.gguf").open("r+b") as file:
        file.truncate(size + (1 << 20))


@pytest.mark.parametrize(
    ("spoil", "text", "code", "said"),
    [
        (lambda at: no_language_model(at, "llama", "adapter"), planted_recipe(), 3, "not a language model"),
        (lambda at: no_language_model(at, "clip", "mmproj"), planted_recipe(), 3, "but mmproj of clip"),
        (lambda at: no_language_model(at, "whale"), planted_recipe(), 3, "planted.gguf"),
        (lambda at: renamed(at, "zorgo"), planted_recipe(), 3, "zorgo"),
        (halved, planted_recipe(), 3, "is truncated"),
        (lambda at: None, planted_recipe(harmless="harmful.txt"), 2, "nothing tells them apart"),
        (lambda at: plant(at, refuses=False), planted_recipe(), 3, "refuses none"),
        (lambda at: plant(at, template=None), planted_recipe(), 3, "chat template"),
        (with_a_long_prompt, planted_recipe(), 3, "the model's context 64"),
        (lambda at: given(at, 1.0, width=63), planted_recipe(more=BY_FILE), 3, "(63,), the model needs (64,)"),
        (lambda at: given(at), planted_recipe(more=BY_FILE), 3, "no direction"),
        (lambda at: given(at, float("nan")), planted_recipe(more=BY_FILE), 3, "NaN or Inf"),
        (lambda at: None, planted_recipe(more=BY_FILE), 2, "direction.file: there is no"),
        (enormous, planted_recipe(more=BY_FILE), 4, "and its disk has"),
        (lambda at: None, planted_recipe(more='[export]\nformat = "safetensors"\n'), 2, "is a GGUF and stays one"),
        (lambda at: (at / "out").write_text("a file"), planted_recipe(), 4, "out: can't be made"),
    ],
)
def test_what_can_not_be_done_is_one_clear_line(
    tmp_path: Path, spoil: Callable[[Path], object], text: str, code: int, said: str
) -> None:
    plant(tmp_path)
    spoil(tmp_path)
    told = work(tmp_path, text, "--quiet")
    assert told.returncode == code, told.stderr
    first, second = told.stderr.splitlines()
    assert said in first
    assert first.startswith("abliterated: ")
    assert second.startswith("  → ")
    assert listed(tmp_path / "out") == [] if (tmp_path / "out").is_dir() else True


@pytest.mark.parametrize(("blocks", "said"), [(200, "can't write planted-abliterated.gguf"), (0, "can be written")])
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path, blocks: int, said: str) -> None:
    plant(tmp_path)
    limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "limited"]
    told = work(tmp_path, planted_recipe(), "--quiet", before=limited)
    assert told.returncode == 4, told.stderr
    assert said in told.stderr
    assert listed(tmp_path / "out") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_nothing_is_visible(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe())
    command = [str(BIN / "abliterated"), "work", str(path), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("direction"):
                process.send_signal(number)
        assert process.wait(150) == 86, told
    assert any("asked to stop" in line for line in told)
    assert "Run it again" in told[-1], "not: submit it, nor: it goes on where it was"
    assert listed(tmp_path / "out") == []


def test_a_killed_run_goes_on_when_started_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe())
    command = [str(BIN / "abliterated"), "work", str(path), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("evaluate"):
                process.kill()
    assert [name for name in listed(tmp_path / "out") if not name.startswith(".")] == []
    told = work(tmp_path, recipe())
    assert told.returncode == 0, told.stderr
    assert "direction" not in [line.split()[0] for line in told.stderr.splitlines()]
    assert not any(name.startswith(".") for name in listed(tmp_path / "out"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = work(tmp_path, recipe())
    finally:
        os.close(held)
    assert told.returncode == 75
    assert "another run works there" in told.stderr


def test_files_of_others_are_never_overwritten(tmp_path: Path) -> None:
    plant(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "planted-abliterated.gguf").write_bytes(b"mine")
    told = work(tmp_path, planted_recipe(), "--quiet")
    assert told.returncode == 6, told.stderr
    assert (tmp_path / "out" / "planted-abliterated.gguf").read_bytes() == b"mine"


def test_a_folder_becomes_a_gguf_by_the_configured_converter_and_else_a_folder(tmp_path: Path) -> None:
    planted_folder(tmp_path)
    told = work(tmp_path, planted_recipe("./whole"), "--json", "--quiet")
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert (summary["product"], summary["format"]) == ("whole-abliterated", "safetensors")
    assert any("[tools] converter" in note for note in summary["notes"])
    assert (tmp_path / "out" / "whole-abliterated" / "config.json").is_file()

    (tmp_path / "out").rename(tmp_path / "first")
    (tmp_path / "config.toml").write_text(f'[tools]\nconverter = "{CONVERTER}"\n')
    config = ("--config", str(tmp_path / "config.toml"), "--json", "--quiet")
    told = work(tmp_path, planted_recipe("./whole"), *config)
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert (summary["product"], summary["format"]) == ("whole-abliterated.gguf", "gguf")
    assert summary["metrics"]["refusal_after"] == 0.0
    assert products(tmp_path) == ["whole-abliterated.gguf"]


def test_an_adapter_is_one_small_gguf(tmp_path: Path) -> None:
    plant(tmp_path)
    text = planted_recipe(more='[edit]\nnorm = "none"\n[export]\nformat = "adapter"\n')
    told = work(tmp_path, text, "--json", "--quiet")
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert summary["format"] == "adapter"
    assert products(tmp_path) == [summary["product"]]
    assert summary["coverage"] == 1.0
