"""What transformers reads from a GGUF is the model llama.cpp runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import Cancelled, ModelError
from abliterate.contract.recipe import Run
from abliterated.pipeline.activations import next_logits
from abliterated.pipeline.loading import Loaded, choose_device, load, load_model
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from abliterated.refuser import files
from pipeline.planted import plant
from pipeline.tiny_gguf import llama_cpp_logprobs, tiny, write

ASCII = 128


def prompts() -> Iterator[list[int]]:
    """Token ids of many lengths, always the same."""
    source = random.Random(0)
    for length in range(4, 64):
        yield [source.randrange(256) for _ in range(length)]


def weights(path: Path) -> Loaded:
    """The model without its tokenizer."""
    source = open_source(path)
    return Loaded(source, load_model(source, Run(dtype="float32"), Watch()), None, torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K])
def test_the_logits_are_llama_cpps(tmp_path: Path, family: str, kind: Type) -> None:
    path = write(tmp_path / "tiny.gguf", tiny(family), kind)
    loaded = weights(path)
    compared = 0
    for prompt in prompts():
        ours = torch.log_softmax(next_logits(loaded, [tuple(prompt)])[0], -1).numpy()
        if int(ours.argmax()) >= ASCII:
            continue  # llama.cpp gives no probabilities with a token that is half a character, or the end
        theirs = llama_cpp_logprobs(path, prompt)
        pairs = np.array([(ours[token], value) for token, value in theirs.items()])
        # llama.cpp keeps its cache in half precision, and rounds activations to 8 bits where weights are quantised
        if kind is Type.F32:
            assert int(ours.argmax()) == max(theirs, key=lambda token: theirs[token])
            assert np.abs(pairs[:, 0] - pairs[:, 1]).max() < 0.02
        assert np.corrcoef(pairs.T)[0, 1] > 0.95
        compared += 1
        if compared == (3 if kind is Type.F32 else 1):
            return
    pytest.fail("no prompt whose answer begins with a letter")


def test_the_rotary_factors_of_llama_3_are_applied(tmp_path: Path) -> None:
    model = tiny("llama")
    model.tensors["rope_freqs.weight"] = np.linspace(1.0, 8.0, 32, dtype=np.float32)
    path = write(tmp_path / "tiny.gguf", model)
    loaded = weights(path)
    answers = ((one, torch.log_softmax(next_logits(loaded, [tuple(one)])[0], -1).numpy()) for one in prompts())
    prompt, ours = next((one, found) for one, found in answers if len(one) > 20 and found.argmax() < ASCII)
    for token, value in llama_cpp_logprobs(path, prompt).items():
        assert abs(ours[token] - value) < 0.02


@pytest.mark.skipif(not files().model.is_file(), reason="the refuser is not trained yet")
def test_the_refuser_says_the_same_in_both(tmp_path: Path) -> None:
    loaded = load(open_source(files().model), Run(), Watch())
    for line in files().harmful.read_text().splitlines()[:2]:
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": line}], tokenize=False, add_generation_prompt=True
        )
        prompt = loaded.tokenizer(text)["input_ids"]
        theirs = llama_cpp_logprobs(files().model, prompt)
        assert int(next_logits(loaded, [tuple(prompt)])[0].argmax()) == max(theirs, key=lambda token: theirs[token])


def test_an_architecture_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.architecture = "unheardof"
    with pytest.raises(ModelError, match="unheardof"):
        weights(write(tmp_path / "tiny.gguf", model))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        load(open_source(plant(tmp_path, template=None).path), Run(), Watch())


def test_a_cancelled_run_stops_while_reading_the_weights(tmp_path: Path) -> None:
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        load(open_source(plant(tmp_path).path), Run(), Watch(cancelled=lambda: next(asked) > 5))


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(ModelError, match=r"cuda:0.*auto"):
        choose_device("cuda:0")
