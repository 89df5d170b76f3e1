"""A prompt as the model reads it: its own chat template, the answer's first position, thinking closed.

Works on a tokenizer of transformers. Does not know where prompts come from, or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from abliterate.contract.errors import ModelError

# What opens a block of reasoning and what closes it, so that measuring happens where the answer starts.
THINKING: Final = (
    ("<think>", "\n\n</think>\n\n"),
    ("<thinking>", "\n</thinking>\n\n"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
HARMONY: Final = ("<|start|>assistant", "<|channel|>final<|message|>")
# Contents that share neither beginning nor end: what is common to their renderings is the template's own.
_PROBES: Final = ("How far is the sea?", "7 + 4 =", "Zürich (a town)", "say it aloud!")
# Further behind the instruction than this, positions repeat what nearer ones show.
MOST_POSITIONS: Final = 8


@dataclass(frozen=True)
class Renderer:
    """Turns prompts into token ids. `suffix`: how many tokens follow the instruction in every prompt."""

    tokenizer: Any
    context: int
    system: str = ""
    suffix: int = 1

    def text(self, prompt: str) -> str:
        """The rendered prompt, up to where the answer begins."""
        return render(self.tokenizer, prompt, self.system)

    def tokens(self, prompt: str) -> tuple[int, ...]:
        """Its token ids. ModelError where it is longer than the model's context."""
        return self._fitting(prompt, self.text(prompt))

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A whole conversation's token ids, up to where the next answer begins. ModelError as for a prompt."""
        return self._fitting(messages[-1]["content"], render_messages(self.tokenizer, messages))

    def _fitting(self, prompt: str, text: str) -> tuple[int, ...]:
        found = _encode(self.tokenizer, text)
        if len(found) >= self.context:
            start = prompt if len(prompt) < 60 else prompt[:57] + "…"
            raise ModelError(
                f"the prompt {start!r} has {len(found)} tokens, the model's context {self.context}",
                remedy="Leave it out or shorten it",
            )
        return found

    def all_tokens(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each prompt's token ids."""
        return [self.tokens(prompt) for prompt in prompts]

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions after the instruction, last first: -1, -2, …"""
        return tuple(range(-1, -min(self.suffix, MOST_POSITIONS) - 1, -1))


def renderer(tokenizer: Any, context: int, system: str = "") -> Renderer:
    """A renderer for this tokenizer, which knows what its template puts behind the instruction."""
    rendered = [_encode(tokenizer, render(tokenizer, probe, system))[::-1] for probe in _PROBES]
    shared = 0
    while all(len(one) > shared for one in rendered) and len({one[shared] for one in rendered}) == 1:
        shared += 1
    return Renderer(tokenizer, context, system, max(1, shared))


def render(tokenizer: Any, prompt: str, system: str = "") -> str:
    """One prompt through the chat template, with the generation prompt and every thinking block closed."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return render_messages(tokenizer, messages)


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation that ends with the user's word, rendered likewise."""
    system, prompt = any(message["role"] == "system" for message in messages), messages[-1]["content"]
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template runs as a program of the model's maker and may raise anything
        what = "its chat template takes no system prompt" if system else "its chat template fails"
        line = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"{what}: {line}", remedy="Leave prompts.system empty" if system else "Take a model whose template works"
        ) from error
    if prompt.strip() not in text:
        raise ModelError("the chat template leaves out what the user says", remedy="Take a model whose template works")
    return text + closing(text)


def closing(text: str) -> str:
    """What closes the reasoning that a rendered prompt leaves open; "" where nothing is."""
    if text.endswith(HARMONY[0]):
        return HARMONY[1]
    for opened, closed in THINKING:
        if text.rfind(opened) > text.rfind(closed.strip()):
            return closed if text.rstrip().endswith(opened) else ""
    return ""


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    # A template writes its own beginning-of-sequence token; the tokenizer must not add a second one.
    bos = tokenizer.bos_token
    special = bool(bos) and not text.startswith(bos)
    return tuple(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])
