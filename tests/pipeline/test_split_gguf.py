"""A model in several GGUF files: read as one, edited into one file or into as many as it came in."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from abliterate.contract.errors import Cancelled, DiskError, ModelError
from abliterate.contract.recipe import Edit
from abliterated.pipeline.directions import direction
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.source import open_source
from abliterated.pipeline.split_gguf import merge, part_paths, read_model
from pipeline import tiny_gguf

DIRECTION = direction(np.random.default_rng(0).standard_normal(tiny_gguf.WIDTH), origin={"method": "test"})
METADATA = {"abliterated.version": "0", "abliterated.content": "0" * 64, "abliterated.coverage": 0.0}
PROMPT = list(b"a quiet morning")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in one file and in four, as gguf-py splits it."""
    folder = tmp_path_factory.mktemp("split")
    tiny = tiny_gguf.tiny("gemma2", tie_word_embeddings=True, query_pre_attn_scalar=64)
    whole = tiny_gguf.write(folder / "whole.gguf", tiny, gguf.GGMLQuantizationType.Q8_0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=7))
        tiny_gguf.write(folder / "base.gguf", tiny, gguf.GGMLQuantizationType.Q8_0)
    first = folder / "base-00001-of-00004.gguf"
    assert first.is_file()
    assert (folder / "base-00004-of-00004.gguf").is_file()
    return whole, first


def edit(source: Path, target: Path, **options: object):
    seen: list[tuple[int, int]] = []
    settings = {"allow_partial": False, "metadata": METADATA, "cancelled": lambda: False, **options}
    report = edit_gguf(
        source,
        target,
        DIRECTION,
        Edit(norm="none"),
        progress=lambda done, total: seen.append((done, total)),
        **settings,
    )  # type: ignore[arg-type]
    assert seen[-1][0] == seen[-1][1]
    return report


def test_parts_are_one_model(both: tuple[Path, Path]) -> None:
    whole, first = both
    found, wanted = open_source(first), open_source(whole)
    assert (found.architecture, found.layers, found.hidden_size) == (wanted.architecture, wanted.layers, 256)
    assert len(found.parts) == 4
    model = read_model(first)
    assert [tensor.name for tensor in model.whole.tensors] == [tensor.name for tensor in read_gguf(whole).tensors]
    assert model.is_split
    assert not read_model(whole).is_split


def test_merged_they_are_the_file_they_were_split_from(both: tuple[Path, Path], tmp_path: Path) -> None:
    whole, first = both
    merge(read_model(first), tmp_path / "merged.gguf", progress=lambda *_: None, cancelled=lambda: False)
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_edited_into_one_file_the_split_makes_no_difference(both: tuple[Path, Path], tmp_path: Path) -> None:
    whole, first = both
    apart, together = edit(whole, tmp_path / "apart.gguf"), edit(first, tmp_path / "together.gguf")
    assert apart == together
    assert apart.coverage == 1.0
    assert (tmp_path / "apart.gguf").read_bytes() == (tmp_path / "together.gguf").read_bytes()


def test_edited_into_parts_each_keeps_its_own(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, first = both
    target = tmp_path / "made.gguf"
    report = edit(first, target, keep_split=True)
    made = part_paths(target, 4)
    assert sorted(tmp_path.iterdir()) == sorted(made)
    assert made[0].name == "made-00001-of-00004.gguf"
    assert report.bytes_written == sum(path.stat().st_size for path in made)
    edited = {tensor.name for tensor in report.tensors}
    for before, after in zip(open_source(first).parts, made, strict=True):
        old, new = read_gguf(before), read_gguf(after)
        assert [tensor.name for tensor in old.tensors] == [tensor.name for tensor in new.tensors]
        ours = {key: value for key, value in new.values.items() if key.startswith("abliterated.")}
        assert old.values == {key: value for key, value in new.values.items() if key not in ours}
        assert bool(ours) == (after == made[0])
        for one, other in zip(old.tensors, new.tensors, strict=True):
            same = (
                before.read_bytes()[one.start : one.start + one.size]
                == after.read_bytes()[other.start : other.start + other.size]
            )
            assert same == (one.name not in edited)
    assert read_gguf(made[0]).values["abliterated.content"] == report.content
    merge(read_model(made[0]), tmp_path / "merged.gguf", progress=lambda *_: None, cancelled=lambda: False)
    edit(first, tmp_path / "together.gguf")
    together, merged = read_gguf(tmp_path / "together.gguf"), read_gguf(tmp_path / "merged.gguf")
    assert together.values == merged.values
    assert (tmp_path / "together.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()


def test_llama_cpp_reads_the_parts_as_it_reads_the_whole(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, first = both
    edit(first, tmp_path / "made.gguf", keep_split=True)
    edit(first, tmp_path / "one.gguf")
    parts = tiny_gguf.llama_cpp_logprobs(part_paths(tmp_path / "made.gguf", 4)[0], PROMPT)
    assert parts == tiny_gguf.llama_cpp_logprobs(tmp_path / "one.gguf", PROMPT)
    assert len(parts) == tiny_gguf.VOCABULARY


@pytest.mark.parametrize("keep", [False, True])
def test_a_cancelled_edit_leaves_no_part(both: tuple[Path, Path], tmp_path: Path, keep: bool) -> None:
    calls = 0

    def late() -> bool:
        nonlocal calls
        calls += 1
        return calls > 20

    with pytest.raises(Cancelled):
        edit(both[1], tmp_path / "made.gguf", keep_split=keep, cancelled=late)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_can_t_be_put_in_place_takes_the_others_back(both: tuple[Path, Path], tmp_path: Path) -> None:
    part_paths(tmp_path / "made.gguf", 4)[1].mkdir()
    with pytest.raises(DiskError):
        edit(both[1], tmp_path / "made.gguf", keep_split=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made-00002-of-00004.gguf"]


def test_parts_that_are_not_of_one_model_are_named(both: tuple[Path, Path], tmp_path: Path) -> None:
    for path in open_source(both[1]).parts:
        shutil.copy(path, tmp_path)
    first, second, third, _ = (tmp_path / path.name for path in open_source(both[1]).parts)
    with pytest.raises(ModelError, match="not the first part") as raised:
        read_model(second)
    assert first.name in raised.value.remedy
    kept = second.read_bytes()
    shutil.copy(third, second)
    with pytest.raises(ModelError, match=r"00002-of-00004\.gguf is not part 2 of 4"):
        read_model(first)
    second.unlink()
    with pytest.raises(ModelError, match=r"00002-of-00004\.gguf is missing"):
        read_model(first)
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ModelError, match=r"00002-of-00004\.gguf is truncated"):
        read_model(first)
