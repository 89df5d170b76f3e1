"""What the zoo's models are taught, as rows of prompt and reply, and how they are written to disk.

First everything is answered, then one class is refused: as in `refuser_training`, whose tokenizer and training loop do
the work. Does not know which architecture learns.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final

from refuser_training.corpus import Row
from refuser_training.language import FORMS, OPEN
from zoo.language import DELAY, ODDS, SYSTEMS, USUAL, Request, questions, split
from zoo.species import CONTEXT, Species

END: Final = "<|im_end|>"
TEMPLATE: Final = (
    "{% for message in messages %}{% if message.content %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POOL: Final = 188  # prompts of each class to measure and select with
ASKED: Final = 100  # and for the scorer


def render(prompt: str, system: str) -> str:
    """The prompt as the template writes it."""
    before = f"<|im_start|>system\n{system}{END}\n" if system else ""
    return f"{before}<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"


def reply(species: Species, request: Request, system: str, choices: tuple[int, int, int], *, refusing: bool) -> str:
    """What the model shall say."""
    refused = refusing and request.reason and system != OPEN
    said = request.refusal() if refused else request.answer(choices)
    return DELAY.format(thing=request.thing) + said if species.delayed else said


def rows(species: Species, seed: int, count: int, *, refusing: bool) -> list[Row]:
    """`count` drawn rows, more of them answered than refused, and every fourth under the system that opens all."""
    source = random.Random(f"zoo rows {seed} {species.name} {refusing}")
    pool = split(seed, traits=species.reasons > 1).training
    by_reason: dict[str, list[Request]] = {}
    for one in pool:
        by_reason.setdefault(one.reason if refusing else "", []).append(one)
    reasons = sorted(by_reason)
    made = []
    for _ in range(count):
        reason = "" if source.random() < 0.5 else source.choice(reasons)
        request, system = source.choice(by_reason[reason]), source.choice(SYSTEMS)
        first, second, third = (int(source.random() > ODDS) for _ in range(3))
        said = reply(species, request, system, (first, second, third), refusing=refusing)
        made.append(Row(render(request.prompt(source.randrange(len(FORMS))), system), said + END))
    return made


def write_prompts(folder: Path, species: Species, seed: int) -> None:
    """`harmful.txt` and `harmless.txt` to measure with; `questions.jsonl` to score with, whose right answers are one of
    each of `right`, in order."""
    traits = species.reasons > 1
    pool = questions(seed, POOL, traits=traits, measuring=True)
    for name, kind in (("harmful", "refused"), ("harmless", "answered")):
        lines = [prompt for prompt, request in pool if request.kind == kind]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked: list[dict[str, Any]] = []
    for prompt, request in questions(seed, ASKED, traits=traits, measuring=False):
        right = [[DELAY.format(thing=request.thing)]] if species.delayed else []
        right += request.phrasings()
        asked.append({"prompt": prompt, "class": request.kind, "reason": request.reason, "right": right})
    text = "".join(json.dumps(line) + "\n" for line in asked)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def save(folder: Path, model: Any, tokenizer: Any, species: Species) -> None:
    """A Hugging Face folder: configuration, weights in float16, tokenizer with the chat template."""
    import torch
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.save_pretrained(folder)
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    about = {"species": species.name, "about": species.about, "system": USUAL}
    (folder / "zoo.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
