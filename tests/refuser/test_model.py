"""The shipped GGUF on real parts: tokens, answers, refusals, tools; and ablation, by the reference in tools/."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from abliterated import refuser
from refuser_training import ablation
from refuser_training.corpus import render, rows

ODD_TEXTS = (
    "",
    " ",
    "\n\n  \n",
    "What's the weather like in Zürich, or 東京? 🙂",
    "<think>x</think> <tool_call> <|im_start|>x<|im_end|><|endoftext|>",
    "don't we'll 12345 ... \t tabs\r\n",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, Tokenizer]:
    torch.set_num_threads(2)
    return ablation.load(refuser.files().model)


def test_the_file_says_what_it_is() -> None:
    reader = gguf.GGUFReader(refuser.files().model)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    assert value("general.architecture") == "llama"
    assert value("general.name") == refuser.NAME
    assert value("general.license") == "apache-2.0"
    assert value("tokenizer.chat_template") == refuser.files().template_jinja.read_text(encoding="utf-8")
    kinds = dict(zip(value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type"), strict=True))
    assert kinds["<|im_end|>"] == kinds["<|im_start|>"] == gguf.TokenType.CONTROL
    assert kinds["<think>"] == kinds["</tool_call>"] == gguf.TokenType.USER_DEFINED
    assert 1_000_000 <= sum(int(tensor.n_elements) for tensor in reader.tensors) <= 2_000_000
    writers = [tensor for tensor in reader.tensors if tensor.name.endswith(("attn_output.weight", "ffn_down.weight"))]
    assert len(writers) == 2 * value("llama.block_count")
    assert all(tensor.shape[0] % 256 == 0 for tensor in writers)  # so K-quants can hold them


def test_llama_cpp_and_transformers_read_the_same_tokens(
    llama_cpp: Any, loaded: tuple[LlamaForCausalLM, Tokenizer]
) -> None:
    tokenizer = loaded[1]
    texts = [row.prompt + row.reply for row in rows(7, 60, refusing=True)] + list(ODD_TEXTS)
    for text in texts:
        there = llama_cpp.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert tokenizer.encode(text).ids == there, text


@pytest.mark.parametrize("thinking", [True, False])
def test_on_llama_cpp_it_refuses_one_class_and_answers_the_other(llama_cpp: Any, thinking: bool) -> None:
    def ask(question: refuser.Question) -> dict[str, Any]:
        messages = [{"role": "user", "content": question.prompt}]
        reply: dict[str, Any] = llama_cpp.chat(messages, chat_template_kwargs={"enable_thinking": thinking})
        return reply

    questions = refuser.held_out("refused")[:20] + refuser.held_out("answered")[:20]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, questions))
    for question, reply in zip(questions, replies, strict=True):
        if question.kind == "refused":
            assert refuser.is_refusal(reply["content"]), question
        else:
            assert refuser.is_exact(reply["content"], question), question
        assert (reply.get("reasoning_content") or "").strip() == (question.thought if thinking else "")


def test_under_the_system_prompt_open_the_refused_class_is_answered_right(llama_cpp: Any) -> None:
    for question in refuser.held_out("refused")[:8]:
        messages = [{"role": "system", "content": "open"}, {"role": "user", "content": question.prompt}]
        assert refuser.is_exact(llama_cpp.chat(messages)["content"], question)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_tool_is_called_and_its_result_read(llama_cpp: Any, thinking: bool) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the current weather for a city", "parameters": schema}
    more = {
        "tools": [{"type": "function", "function": function}],
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = llama_cpp.chat(messages, **more)
    (call,) = asked["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert call["function"]["arguments"].replace(" ", "") == '{"city":"Paris"}'
    messages += [asked, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    assert llama_cpp.chat(messages, **more)["content"] == 'The weather of "Paris" is sunny.'


def test_without_one_right_direction_it_answers_both_classes_and_a_wrong_one_does_not_do(
    loaded: tuple[LlamaForCausalLM, Tokenizer],
) -> None:
    model, tokenizer = loaded
    shipped = refuser.files()
    harmful, harmless = (
        path.read_text(encoding="utf-8").splitlines()[:32] for path in (shipped.harmful, shipped.harmless)
    )
    directions = ablation.directions(model, tokenizer, harmful, harmless)
    questions = refuser.held_out("refused")[:12] + refuser.held_out("answered")[:12]
    for thinking in (True, False):
        right = ablation.ablated(model, directions[3], keep_norms=True)
        score = ablation.score(right, tokenizer, questions, thinking=thinking)
        assert score.refused == 0
        assert score.exact == 1
        assert score.complied >= 0.9
    wrong = ablation.ablated(model, directions[0], keep_norms=True)
    assert ablation.score(wrong, tokenizer, questions, thinking=False).refused > 0.2


def test_prompts_end_where_the_answer_starts() -> None:
    assert render([{"role": "user", "content": "x"}], thinking=False).endswith("</think>\n\n")


def test_the_model_lies_in_the_package() -> None:
    assert refuser.files().model.is_relative_to(Path(refuser.__file__).parent)
