"""Weights that are no numbers, a base that changes or is cut short while it is read: named, and nothing delivered."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.contract.errors import AbliteratedError, ModelError
from abliterate.contract.messages import Progress, Task
from abliterated import cli
from abliterated.commands.cut_short import name_cut_files
from abliterated.jobs.outcome import Ended, after_worker
from abliterated.pipeline import loading
from abliterated.pipeline.run import run
from pipeline.folders import listed, planted_folder, task
from pipeline.forked import forked
from pipeline.planted import plant

QUICK = {"method": "layer", "layer": 2}


def run_cut(asked: Task, cut_at: str, file: str) -> None:
    """Run it; at the first word of that message the file is cut to a third."""
    loading.free_memory = lambda _: 0  # streamed

    def emit(progress: Progress) -> None:
        if progress.message == cut_at:
            os.truncate(file, 40_000)

    try:
        run(asked, emit, lambda: False)
    except AbliteratedError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def attempt(asked: Task, cut_at: str, file: str = "") -> tuple[int, str]:
    """The exit code and the last words of a process that runs it."""
    errors = Path(asked.work).parent / "errors.txt"
    code = forked(run_cut, asked, cut_at, file or asked.source, errors=errors)
    return code, errors.read_text()


def test_a_base_cut_short_while_it_is_measured_is_named(tmp_path: Path) -> None:
    asked = task(plant(tmp_path), direction=QUICK)
    code, told = attempt(asked, "measuring harmful prompts")
    assert code == 1
    assert "ModelError: planted.gguf ended before blk." in told
    assert listed(Path(asked.output)) == []


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal here")
def test_a_folder_cut_short_in_memory_is_a_named_outcome_of_the_job(tmp_path: Path) -> None:
    """Safetensors are mapped, so the kernel may end the worker; the queue knows what that means."""
    model = planted_folder(tmp_path)
    asked = task(model, direction=QUICK)
    code, told = attempt(asked, "measuring harmful prompts", str(model.path / "model.safetensors"))
    if code != -signal.SIGBUS:  # where a view was made after the cut
        assert code == 1
        assert "ModelError: model.safetensors ended before" in told
    move = after_worker(Ended(-signal.SIGBUS, None), registers=True, attempts=0, crashes=0, retries=5)
    assert (move.state, move.failure and move.failure.failure) == ("failed", "model")
    assert listed(Path(asked.output)) == []


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal here")
@pytest.mark.parametrize("by", ["python", "torch"])
def test_a_mapped_file_cut_short_ends_a_foreground_verb_with_a_sentence(tmp_path: Path, by: str) -> None:
    """Whether Python holds the interpreter's lock there or torch has let it go."""
    file, errors = tmp_path / "model", tmp_path / "errors.txt"
    file.write_bytes(bytes(60_000))
    code = forked(touch_cut, file, by, errors=errors)
    assert code == ModelError.exit_code
    assert errors.read_text().startswith("abliterated: a file of the model was cut short while it was read\n  → ")


def touch_cut(file: Path, by: str) -> None:
    """Read what is no longer there, as the verbs do."""
    name_cut_files()
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    os.truncate(file, 100)
    print(memory[40_000] if by == "python" else torch.frombuffer(memory, dtype=torch.uint8)[40_000:].sum())


def test_every_verb_that_reads_a_model_itself_has_that_sentence() -> None:
    commands = Path(cli.__file__).parent / "commands"
    ways = ("abliterated.pipeline", "abliterated.once import", "commands.foreground import")
    sources = {verb: (commands / f"{verb}.py").read_text() for verb in cli.VERBS}
    assert {verb for verb, source in sources.items() if any(way in source for way in ways)} == cli.READING


def test_a_base_cut_short_while_it_is_edited_is_named(tmp_path: Path) -> None:
    asked = task(plant(tmp_path), direction=QUICK, evaluate={"prompts": 0})
    code, told = attempt(asked, "editing the weights")
    assert code == 1
    assert "planted.gguf ended while it was read" in told
    assert listed(Path(asked.output)) == []


def test_a_base_written_to_meanwhile_is_no_base(tmp_path: Path) -> None:
    model = plant(tmp_path)
    asked = task(model, direction=QUICK, evaluate={"prompts": 0})

    def emit(progress: Progress) -> None:
        if progress.message == "editing the weights":
            with model.path.open("ab") as file:
                file.write(bytes(32))

    with pytest.raises(ModelError, match=r"planted\.gguf changed while it was read"):
        run(asked, emit, lambda: False)
    assert listed(Path(asked.output)) == []


@pytest.mark.parametrize(("form", "method"), [("gguf", "auto"), ("folder", "per-layer")])
def test_weights_that_are_no_numbers_are_named_and_never_an_answer(tmp_path: Path, form: str, method: str) -> None:
    if form == "gguf":
        model = plant(tmp_path, broken=True)
    else:
        model = planted_folder(tmp_path)
        file = model.path / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3] = torch.nan  # a reader: the edit does not touch it
        save_file(tensors, file, {"format": "pt"})
    asked = task(model, direction={"method": method})
    with pytest.raises(ModelError, match="NaN"):
        run(asked, lambda _: None, lambda: False)
    assert listed(Path(asked.output)) == []


def test_with_a_direction_at_hand_broken_weights_are_found_by_the_edit(tmp_path: Path) -> None:
    torch.save(torch.eye(64)[60], tmp_path / "direction.pt")
    asked = task(
        plant(tmp_path, broken=True),
        direction={"method": "file", "file": str(tmp_path / "direction.pt")},
        evaluate={"prompts": 0},
    )
    with pytest.raises(ModelError, match=r"blk\.2\.ffn_down\.weight.*NaN or Inf"):
        run(asked, lambda _: None, lambda: False)
    assert listed(Path(asked.output)) == []
