"""The importer's own part: which engines have one, what is sent, what a store out of reach is called.

With a real engine it is tried in `e2e/test_import.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.contract.errors import ModelError
from abliterated.ollama.importer import _files, _out, converts
from abliterated.ollama.version import read_version
from engines import free_port


@pytest.mark.parametrize(
    ("version", "has_one"),
    [
        ("0.4.9", False), ("0.5.0", True), ("0.11.0", True), ("0.25.0-rc0", True), ("0.34.0", True), ("0.34.1", False),
        ("0.40.0", False), ("0.0.0", True), ("0.1.0+abliterated", False),
    ],
)  # fmt: skip
def test_which_engines_make_a_gguf_of_safetensors(version: str, has_one: bool) -> None:
    assert converts(read_version(version)) is has_one


def test_the_template_goes_where_the_engine_looks_and_reports_stay_here(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    for name in ("config.json", "tokenizer.json", "abliterated.json", "report.json", "MODEL_CARD.md", "a.safetensors"):
        (folder / name).write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = _files(folder, scratch)
    assert sorted(found) == ["a.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    sent = json.loads(found["tokenizer_config.json"].read_text())
    assert sent == {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"model/tokenizer_config\.json can't be read"):
        _files(folder, scratch)


def test_a_store_that_cannot_be_read_from_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the engine's store /elsewhere/blobs can't be read") as caught:
        _out(Path("/elsewhere/blobs/sha256-0"), tmp_path / "out.gguf")
    assert "own machine" in caught.value.remedy
    assert not (tmp_path / "out.gguf").exists()


def test_called_as_a_converter_its_last_words_say_what_is_wrong(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    told = subprocess.run(
        [sys.executable, "-m", "abliterated.ollama.importer", address, str(tmp_path), "--outfile", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert told.returncode == 75
    assert told.stderr.splitlines()[-1].startswith(f"no engine answers at {address}")
