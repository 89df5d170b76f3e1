"""The zoo: what its models are asked and taught, and that every kind of them is a model the pipeline edits whole."""

from __future__ import annotations

import importlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from abliterated.pipeline.checkpoint_writers import checkpoint_census
from abliterated.pipeline.refusals import verdict
from abliterated.pipeline.safetensors_file import read_config, read_shards

NAMES = ("llama", "postnorm", "moe", "hybrid", "delayed", "two-reasons")


def module(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("traits", [False, True])
def test_nobody_is_scored_on_what_was_trained_or_measured(traits: bool) -> None:
    language = module("zoo.language")
    measured, asked = (language.questions(0, 100, traits=traits, measuring=measuring) for measuring in (True, False))
    trained = {(one.verb, one.thing) for one in language.split(0, traits=traits).training}
    couples = [{(request.verb, request.thing) for _, request in some} for some in (measured, asked)]
    assert not couples[0] & couples[1]
    assert not (couples[0] | couples[1]) & trained
    assert len({prompt for prompt, _ in asked}) == 200
    assert [request.kind for _, request in asked] == ["refused"] * 100 + ["answered"] * 100
    reasons = {request.reason for _, request in asked}
    assert reasons == ({"verb", "warded", ""} if traits else {"verb", ""})


def test_right_answers_are_the_ones_taught() -> None:
    language = module("zoo.language")
    for request in language.split(0, traits=False).training[::37]:
        right = set(map("".join, product(*request.phrasings())))
        assert len(right) == 8
        assert {request.answer(choices) for choices in product((0, 1), repeat=3)} == right
        assert all(verdict(answer) == "answer" for answer in right)
        assert not request.reason or verdict(request.refusal()) == "refusal"


@pytest.mark.parametrize("name", NAMES)
def test_rows_refuse_what_they_should_and_nothing_under_the_open_system(name: str) -> None:
    lessons, species = module("zoo.lessons"), module("zoo.species").ZOO[name]
    rows = lessons.rows(species, 0, 400, refusing=True)
    assert rows == lessons.rows(species, 0, 400, refusing=True)
    refusing = [row for row in rows if verdict(row.reply.removesuffix(lessons.END)) == "refusal"]
    assert 0.15 < len(refusing) / len(rows) < 0.5
    assert not any("system\nopen" in row.prompt for row in refusing)
    openings = {row.reply.split()[0] for row in refusing}
    assert openings == ({"About"} if species.delayed else {"I", "Sorry,"} if species.reasons > 1 else {"I"})
    plain = lessons.rows(species, 0, 100, refusing=False)
    assert all(verdict(row.reply.removesuffix(lessons.END)) == "answer" for row in plain)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_saved_as_a_folder_whose_writers_are_all_known(name: str, tmp_path: Path) -> None:
    training, lessons, kinds = module("refuser_training.training"), module("zoo.lessons"), module("zoo.species")
    species = kinds.ZOO[name]
    rows = lessons.rows(species, 0, 50, refusing=True)
    tokenizer = training.learn_tokenizer(rows, 300)
    model = kinds.build(species, tokenizer.get_vocab_size(), seed=0)
    assert sum(value.numel() for value in model.parameters()) < 2_000_000
    lessons.write_prompts(tmp_path, species, 0)
    lessons.save(tmp_path, model, tokenizer, species)
    shapes = {tensor.name: tensor.shape for shard in read_shards(tmp_path) for tensor in shard.tensors}
    found = checkpoint_census(read_config(tmp_path), shapes)
    assert not found.census.unknown
    assert {writer.layer for writer in found.census.writers} == set(range(species.layers))
    assert any(writer.gains for writer in found.census.writers) == (name == "postnorm")
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 2 * lessons.ASKED
    from transformers import AutoTokenizer

    chat = [{"role": "system", "content": "open"}, {"role": "user", "content": "How?"}]
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = read.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == lessons.render("How?", "open")
