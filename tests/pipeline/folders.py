"""The planted model as the folder Hugging Face would have, and tasks on models of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abliterate.contract.messages import Task
from abliterate.contract.recipe import Run, recipe_from_table
from abliterated.pipeline.loading import load
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from pipeline.planted import Planted, plant

CONVERTER = Path(__file__).with_name("converter.py")


def planted_folder(at: Path, *, shards: bool = False) -> Planted:
    """`at/whole`: the planted model with its licence, in one file or in several."""
    planted = plant(at)
    loaded = load(open_source(planted.path), Run(), Watch())
    # It came from a GGUF, and no longer is one.
    del loaded.model.hf_quantizer, loaded.model.config.quantization_config
    folder = at / "whole"
    loaded.model.save_pretrained(folder, **({"max_shard_size": "100KB"} if shards else {}))
    loaded.tokenizer.save_pretrained(folder)
    _without_strangers(folder / "tokenizer.json", loaded.model.config.vocab_size)
    (folder / "LICENSE").write_text("Do with it as you like.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [tiny]\n---\n# Whole\n")
    return Planted(folder, planted.harmful, planted.harmless)


def _without_strangers(file: Path, rows: int) -> None:
    """Take out the token transformers adds where a GGUF names none for the unknown: the embedding has no row for it."""
    tokenizer = read_json(file)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def table(model: Planted, **tables: Any) -> dict[str, Any]:
    """A recipe's table for it, small and quick."""
    return {
        "model": str(model.path),
        "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
        "search": {"trials": 0},
        "evaluate": {"tokens": 8, "prompts": 16},
        **tables,
    }


def task(model: Planted, converter: Path | None = None, **tables: Any) -> Task:
    """A task on it, in its own folder."""
    at = model.path.parent
    return Task(
        recipe=recipe_from_table(table(model, **tables)),
        base=str(model.path),
        source=str(model.path),
        work=str(at / "work"),
        output=str(at / "out"),
        converter=str(converter or ""),
    )


def listed(folder: Path) -> list[str]:
    """Everything in it, hidden things too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
