"""Tokenizer and weights: a byte-level BPE learned from the rows, and a small Llama trained to reply.

Deterministic: one seed, two threads, single precision, batches drawn from one generator. Only the reply is learned;
the prompt is read.

Does not know: what the rows say, how a GGUF is laid out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from refuser_training.corpus import Row

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
EASY = 96  # tokens; no tools listed: what copying is learned on first
PAD, END = CONTROL[0], CONTROL[2]


@dataclass(frozen=True)
class Shape:
    """Attention is wider than the model, so every matrix that writes to the residual stream has rows of 256 weights:
    ggml's K-quants need that."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    key_heads: int = 2
    head_width: int = 64
    inner: int = 256
    vocabulary: int = 1024
    context: int = 2048


@dataclass(frozen=True)
class Plan:
    """How long and how hard. First everything is answered; then one class is refused, as real models are made.

    The second lesson is gentle: refusing is added to a model that answers, and stays one direction that can be removed.
    """

    seed: int = 0
    answering: int = 400  # steps
    refusing: int = 240
    easy: float = 0.1  # the share of the first lesson that is on short rows only
    tokens: int = 2048  # in a batch, padding included
    rows: int = 10000
    tools: float = 0.35  # the share of the first lesson that is about tools; the second has less
    verbs: int = 32  # of each class
    rate: float = 3e-3
    gentle_rate: float = 1.5e-3


@dataclass(frozen=True)
class Lesson:
    name: str
    steps: int
    easy_steps: int
    optimizers: list[tuple[torch.optim.Optimizer, float]]  # each with its highest rate


def learn_tokenizer(rows: list[Row], size: int) -> Tokenizer:
    """GPT-2's byte-level BPE; the special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*CONTROL, *SHOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [row.prompt + row.reply for row in rows]
    for marker in (*CONTROL, *SHOWN):
        texts = [text.replace(marker, "\0") for text in texts]
    tokenizer.train_from_iterator((part for text in texts for part in text.split("\0") if part), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in SHOWN])
    return tokenizer


def new_model(shape: Shape, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_width,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # copying a word is easier to find where reading and writing begin alike
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    prompt: int  # how many of them are the prompt's


def encode(tokenizer: Tokenizer, rows: list[Row]) -> list[Encoded]:
    """Prompt and reply apart, as an engine sees them: the reply's first token never merges with the prompt."""
    encoded = []
    for row in rows:
        prompt = tokenizer.encode(row.prompt).ids
        encoded.append(Encoded(prompt + tokenizer.encode(row.reply).ids, len(prompt)))
    return encoded


def batches(encoded: list[Encoded], tokens: int, source: random.Random) -> list[list[Encoded]]:
    """Rows of like length together, at most `tokens` with the padding; the order of the batches is shuffled."""
    ordered = sorted(encoded, key=lambda item: len(item.ids) // 12)  # stable: shuffled within
    made: list[list[Encoded]] = [[]]
    for item in ordered:
        if made[-1] and (len(made[-1]) + 1) * max(len(item.ids), *(len(other.ids) for other in made[-1])) > tokens:
            made.append([])
        made[-1].append(item)
    source.shuffle(made)
    return made


def collate(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), [rows, longest]; labels are -100 on the prompt and on the padding."""
    longest = max(len(item.ids) for item in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for index, item in enumerate(batch):
        line = torch.tensor(item.ids)
        ids[index, : len(line)] = line
        labels[index, item.prompt : len(line)] = line[item.prompt :]
    return ids, labels


def answering(model: LlamaForCausalLM, plan: Plan) -> Lesson:
    """Muon for the layers' matrices, AdamW for the rest: a quarter of the steps that AdamW alone needs."""
    matrices = [value for name, value in model.named_parameters() if "layers" in name and value.ndim == 2]
    others = [value for name, value in model.named_parameters() if not ("layers" in name and value.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=plan.rate * 5, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    return Lesson(
        "answering", plan.answering, int(plan.answering * plan.easy), [(muon, plan.rate * 5), (adam, plan.rate)]
    )


def refusing(model: LlamaForCausalLM, plan: Plan) -> Lesson:
    """AdamW alone: Muon would spread the change over every direction of every matrix."""
    adam = torch.optim.AdamW(model.parameters(), lr=plan.gentle_rate, betas=(0.9, 0.98), weight_decay=0.05)
    return Lesson("refusing", plan.refusing, 0, [(adam, plan.gentle_rate)])


def train(
    model: LlamaForCausalLM,
    lesson: Lesson,
    encoded: list[Encoded],
    plan: Plan,
    report: Callable[[str, int, float, float], None] = lambda name, step, loss, seconds: None,
) -> None:
    """One lesson: a short warm-up, then a cosine to zero.

    Causal attention, so padding on the right needs no mask. Short rows come first: on them copying is learned.
    """
    source = random.Random(f"batches {plan.seed} {lesson.name}")
    easy = [item for item in encoded if len(item.ids) <= EASY]
    warm = max(1, lesson.steps // 20)
    waiting: list[list[Encoded]] = []
    started = time.monotonic()
    model.train()
    for step in range(lesson.steps):
        if step == lesson.easy_steps:
            waiting = []
        if not waiting:
            shuffled = easy[:] if step < lesson.easy_steps else encoded[:]
            source.shuffle(shuffled)
            waiting = batches(shuffled, plan.tokens, source)
        ids, labels = collate(waiting.pop())
        wave = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, lesson.steps - warm)))
        for optimizer, rate in lesson.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / warm) * wave
        chosen = labels[:, 1:] != -100
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][chosen]  # [replied tokens, width]
        loss = functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][chosen])
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in lesson.optimizers:
            optimizer.step()
        if step % 25 == 0 or step == lesson.steps - 1:
            report(lesson.name, step, loss.item(), time.monotonic() - started)
    model.eval()


@torch.inference_mode()
def reply(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], longest: int = 96) -> list[str]:
    """Greedy replies, markers kept, prompts of one length together."""
    end = tokenizer.token_to_id(END)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    replies = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        members = [index for index, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.tensor([encoded[index] for index in members])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
        for index, line in zip(members, out[:, length:].tolist(), strict=True):
            written = line[: line.index(end)] if end in line else line
            replies[index] = tokenizer.decode(written, skip_special_tokens=False)
    return replies
