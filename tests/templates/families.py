"""A family: a chat template and the scripted model that answers in its own dialect.

What the model must say is read off the template itself: a conversation that already holds a call, an answer, two
calls is rendered, and what the template writes for the assistant's turn is what a trained model would have written.
Where a template writes no calls (that is one of the things the matrix shows) the dialect is taken from its markers.

Does not know: engines, requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterated.templates.rendering import TemplateRefuses, render
from engine.scripted_gguf import Model, Script

OWN = Path(__file__).parent / "own"

# Markers: one token wherever they stand in a prompt; what the model answers hangs on the last of them it finds.
TOOL_SEEN, ASK_TWO, ASK_THINK, CALL_SEEN, RESULT_SEEN = "zqtool", "zqtwo", "zqthink", "zqcall", "zqresult"
NOTHING, SAW_CALL, SAW_RESULT, THOUGHT, CONCLUDED = (
    "No tools.", "Your call is known.", "Its result came in.", "Let me ponder", "Hence it rains",
)  # fmt: skip
ONE, TWO = ("Paris at dawn",), ("Lisbon by tram", "Oslo by night")
PLACE = "town_or_city"
ID = ("abcdef123", "bcdefg234")  # Mistral's templates want nine letters or digits

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": f"The weather {TOOL_SEEN} there",
        "parameters": {
            "type": "object",
            "properties": {PLACE: {"type": "string", "description": "Which city"}},
            "required": [PLACE],
        },
    },
}

_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^<>｜]{1,40}｜>|\[/?[A-Z_]{3,24}\]"
    r"|</?(?:start_of_turn|end_of_turn|s)>|\[gMASK\]|<sop>|</?seed:[a-z_]+>|<｜DSML｜>"
)
_WORD = re.compile(
    r"<\|\"\|>|</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>|</?seed:(?:think|tool_call)>"
)
_ENDS = re.compile(
    r"(?i)<\|im_end\|>|<\|eot_id\|>|<\|return\|>|<\|end_of_text\|>|<｜end▁of▁sentence｜>|<end_of_turn>|<turn\|>"
    r"|<\|END_OF_TURN_TOKEN\|>|</s>|<seed:eos>|<\|end\|>|<\|call\|>"
)
# (a marker in the template, what opens a thought, what closes it)
_THOUGHTS = (
    ("<|channel|>analysis", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ("[THINK]", "[THINK]", "[/THINK]"),
    ("<|channel>thought", "<|channel>thought\n", "<channel|>"),
    ("<seed:think>", "<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    ("<think>", "<think>\n", "\n</think>\n\n"),
)


@dataclass(frozen=True)
class Family:
    """`own`: of our hand and committed; the others come from CHAT_TEMPLATES_DIR."""

    name: str
    jinja: str
    own: bool = False

    @property
    def thinks(self) -> tuple[str, str] | None:
        return next(((opening, closing) for marker, opening, closing in _THOUGHTS if marker in self.jinja), None)


def own_families() -> list[Family]:
    return [Family(path.stem, path.read_text(), own=True) for path in sorted(OWN.glob("*.jinja"))]


def published_families() -> list[Family]:
    """Those of CHAT_TEMPLATES_DIR; none where it isn't set."""
    folder = os.environ.get("CHAT_TEMPLATES_DIR", "")
    return [Family(path.stem, path.read_text()) for path in sorted(Path(folder).glob("*.jinja"))] if folder else []


def call(number: int, city: str) -> dict[str, Any]:
    return {"id": ID[number], "type": "function", "function": {"name": "get_weather", "arguments": {PLACE: city}}}


def user(text: str = "Is it raining?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(cities: Sequence[str]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(at, city) for at, city in enumerate(cities)]}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": ID[number], "name": "get_weather", "content": text}


def commonprefix(texts: Sequence[str]) -> str:
    return os.path.commonprefix(list(texts))  # noqa: RUF071 (characters are what is meant)


@dataclass(frozen=True)
class _Turn:
    """What follows the prompt: `opened` is what the prompt has begun already (a thought), `body` what was said."""

    opened: str
    body: str
    end: str


def _shapes(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same call as templates may want it: an object or text as arguments."""
    yield message
    calls = []
    for one in message.get("tool_calls") or []:
        function = {**one["function"], "arguments": json.dumps(one["function"]["arguments"])}
        calls.append({**one, "function": function})
    yield {**message, "tool_calls": calls}


def _turn(jinja: str, before: list[dict[str, Any]], said: dict[str, Any], tools: list[Any] | None) -> _Turn:
    """TemplateRefuses where the template can't say it."""
    asked = render(jinja, before, tools=tools, enable_thinking=True)
    base = commonprefix([render(jinja, before, tools=tools, generate=False, enable_thinking=True), asked])
    whole = render(jinja, [*before, said], tools=tools, generate=False, enable_thinking=True)
    shared = commonprefix([base, whole])
    header, turn = asked[len(shared) :], whole[len(shared) :]
    role = re.sub(r"<[^<>]*$", "", commonprefix([header, turn]))
    if (at := re.search(r"<think>|<seed:think>|</think>", role)) is not None:
        role = role[: at.start()]
    body = re.sub(
        r"^\s*(?:<think>\s*</think>|</think>|<\|START_THINKING\|><\|END_THINKING\|>)\s*", "", turn[len(role) :]
    )
    found = _ENDS.search(body)
    return _Turn(
        header[len(role) :], (body[: found.start()] if found else body).rstrip(), found.group() if found else "</s>"
    )


def _said(jinja: str, cities: Sequence[str]) -> _Turn | None:
    for said in _shapes(assistant(cities)):
        try:
            turn = _turn(jinja, [user()], said, [TOOL])
        except TemplateRefuses:
            continue
        if "get_weather" in turn.body and all(city in turn.body for city in cities) and '\\"' not in turn.body:
            return turn
    return None


def one_at_a_time(family: Family) -> bool:
    """The template tells a call, but no two at once: its model never learnt to make them."""
    return bool(_said(family.jinja, ONE)) and not _said(family.jinja, TWO)


def _guessed(jinja: str, cities: Sequence[str]) -> str:
    """A call in the dialect the template's markers speak of, for one that never writes any."""
    objects = [json.dumps({"name": "get_weather", "arguments": {PLACE: city}}) for city in cities]
    if "<｜tool▁sep｜>" in jinja:
        said = "\n".join(
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{json.dumps({PLACE: city})}\n```"
            "<｜tool▁call▁end｜>"
            for city in cities
        )
        return f"<｜tool▁calls▁begin｜>{said}<｜tool▁calls▁end｜>"
    if "<|tool_call|>" in jinja or "start_of_role" in jinja:
        return f"<|tool_call|>[{', '.join(objects)}]"
    if "<|tool_list_start|>" in jinja or "List of tools" in jinja:
        called = ", ".join(f'get_weather({PLACE}="{city}")' for city in cities)
        return f"<|tool_call_start|>[{called}]<|tool_call_end|>"
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)


def _closed(family: Family, turn: _Turn) -> str:
    """What must come first where the prompt has opened a thought."""
    opening, closing = family.thinks or ("", "")
    opened = bool(opening) and opening.strip() in turn.opened and closing.strip() not in turn.opened
    return f"Fine{closing}" if opened else ""


def scripted(family: Family, *, other: Family | None = None) -> Model:
    """The model whose template is the family's. `other`: speak as that family's template teaches, not as this one's
    (a template that replaces another is asked whether it suits what the model was trained on)."""
    spoken = other or family
    answer = _turn(spoken.jinja, [user()], {"role": "assistant", "content": "ANSWER"}, None)
    own = answer if other is None else _turn(family.jinja, [user()], {"role": "assistant", "content": "ANSWER"}, None)
    before = _closed(family, own)

    def plain(text: str) -> str:
        return answer.body.replace("ANSWER", text)

    answers = {"": before + plain(NOTHING)}
    for marker, cities in ((TOOL_SEEN, ONE), (ASK_TWO, TWO)):
        turn = _said(spoken.jinja, cities)
        text = turn.body if turn else _guessed(spoken.jinja, cities)
        if turn and turn.end != own.end and turn.end.startswith("<|c"):
            text += turn.end
        answers[marker] = before + text
    if thoughts := family.thinks:
        opening, closing = thoughts
        answers[ASK_THINK] = f"{'' if before else opening}{THOUGHT}{closing}{plain(CONCLUDED)}"
    after = _after_result(family, before)
    answers |= {CALL_SEEN: after + plain(SAW_CALL), RESULT_SEEN: after + plain(SAW_RESULT)}
    texts = [family.jinja, spoken.jinja, *answers.values()]
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    controls = sorted({token for text in texts for token in _SPECIAL.findall(text)} - set(words))
    endings = _endings(family.jinja, [*words, *controls])
    begin = "<s>" if "bos_token" in family.jinja else ""
    return Model(
        [Script(answer, endings, when=marker) for marker, answer in answers.items()],
        family.jinja, controls, words, own.end, begin, context_length=32768,
    )  # fmt: skip


def _prompts(jinja: str) -> Iterator[str]:
    """The prompts a conversation of ours can become."""
    for tools in (None, [TOOL]):
        for cities in ((), ONE, TWO):
            for said in _shapes(assistant(cities)):
                results = [result(at, "RESULT") for at in range(len(cities))]
                with contextlib.suppress(TemplateRefuses):
                    yield render(
                        jinja, [user(), *([said, *results] if cities else [])], tools=tools, enable_thinking=True
                    )


def _endings(jinja: str, special: Sequence[str]) -> list[str]:
    """The tokens those prompts end in."""
    found = set()
    for prompt in _prompts(jinja):
        found.add(max((token for token in special if prompt.endswith(token)), key=len, default=prompt[-1]))
    return sorted(found)


def _after_result(family: Family, before: str) -> str:
    """As `_closed`, for the prompt that ends in a tool's result."""
    ends = [prompt[prompt.rfind("RESULT") :] for prompt in _prompts(family.jinja) if "RESULT" in prompt]
    if not ends or family.thinks is None:
        return before
    opening, closing = family.thinks
    return f"So{closing}" if opening.strip() in ends[0] and closing.strip() not in ends[0] else ""
