"""The same prompts put to a base and to what was made of it; the pair as columns, as plain text and as JSON.

One model after the other, not in turns: an engine that has room for one alone loads each once. Does not know the
command line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from abliterate.chat.engine import Engine
from abliterate.chat.openings import reads_as_refusal
from abliterate.chat.screen import printable
from abliterate.contract.errors import EngineRefused, NotFound, RecipeError
from abliterate.contract.names import SUFFIX, ModelName, parse_name
from abliterate.render import cell_width

BASE_KEY: Final = "abliterated.base.name"
_NARROWEST: Final = 24


@dataclass(frozen=True)
class Said:
    """One answer."""

    answer: str
    thinking: str = ""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def refusal(self) -> bool:
        return reads_as_refusal(self.answer)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answer": self.answer,
            "thinking": self.thinking,
            "refusal": self.refusal,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Row:
    """A prompt and both answers."""

    prompt: str
    base: Said
    model: Said


def find_base(engine: Engine, model: str) -> str:
    """What `model` was made from: as its own weights say, else as its name does. Raises NotFound, RecipeError."""
    info = engine.show(model).get("model_info")
    told = str(info.get(BASE_KEY) or "") if isinstance(info, Mapping) else ""
    candidates = [told.removeprefix("ollama:")] if told.startswith("ollama:") or (told and ":" not in told) else []
    name = parse_name(model)
    if name.model.endswith(SUFFIX):
        candidates.append(ModelName(name.host, name.namespace, name.model.removesuffix(SUFFIX), name.tag).short())
    if not candidates:
        raise RecipeError(f"{model}: neither its weights nor its name tell a base", remedy="Name it with --base")
    for candidate in candidates:
        try:
            engine.show(candidate)
        except (NotFound, EngineRefused):
            continue
        return candidate
    raise NotFound(
        f"{candidates[0]}: the base of {model} is not at {engine.address}",
        remedy=f"Name another with --base; or {engine.how_to_have(candidates[0])}",
    )


def ask(engine: Engine, body: Mapping[str, Any], prompt: str, system: str = "") -> Said:
    """One prompt, answered whole."""
    messages = [{"role": "system", "content": system}] if system else []
    content: list[str] = []
    thinking: list[str] = []
    numbers: Mapping[str, Any] = {}
    with engine.chat({**body, "messages": [*messages, {"role": "user", "content": prompt}]}) as answer:
        for piece in answer:
            content.append(piece.content)
            thinking.append(piece.thinking)
            numbers = piece.numbers or numbers
    spent = numbers.get("total_duration")
    count = numbers.get("eval_count")
    return Said(
        "".join(content).strip(),
        "".join(thinking).strip(),
        count if isinstance(count, int) else 0,
        spent / 1e9 if isinstance(spent, int) else 0.0,
    )


def compare(
    engine: Engine,
    base: str,
    model: str,
    prompts: Sequence[str],
    body: Mapping[str, Any],
    *,
    system: str = "",
    tell: Callable[[str, int], None] = lambda _model, _done: None,
    show: Callable[[Row], None] = lambda _row: None,
) -> list[Row]:
    """Every prompt to the base, then every prompt to the model; `show` gets each pair as soon as it is one."""
    first: list[Said] = []
    for number, prompt in enumerate(prompts):
        tell(base, number)
        first.append(ask(engine, {**body, "model": base}, prompt, system))
    rows = []
    for number, (prompt, said) in enumerate(zip(prompts, first, strict=True)):
        tell(model, number)
        rows.append(Row(prompt, said, ask(engine, {**body, "model": model}, prompt, system)))
        show(rows[-1])
    return rows


def as_columns(row: Row, base: str, model: str, width: int, *, colour: bool = False) -> str:
    """The pair side by side in `width` cells; one under the other where that is too little."""
    half = (width - 3) // 2
    if half < _NARROWEST:
        return as_text(row, base, model, colour=colour)
    sides = [[_head(name, said), *_wrapped(said.answer, half)] for name, said in ((base, row.base), (model, row.model))]
    lines = [_paint(f"» {line}", "1", colour) for line in _wrapped(row.prompt, width - 2)]
    for number in range(max(map(len, sides))):
        left, right = (side[number] if number < len(side) else "" for side in sides)
        left, right = _cut(left, half), _cut(right, half)
        pad = " " * (half - cell_width(left))
        if number == 0:
            left, right = _head_paint(left, row.base, colour), _head_paint(right, row.model, colour)
        lines.append(f"{left}{pad} │ {right}".rstrip())
    return "\n".join(lines)


def as_text(row: Row, base: str, model: str, *, colour: bool = False) -> str:
    """The pair one under the other."""
    parts = [_paint(f"» {printable(row.prompt)}", "1", colour)]
    for name, said in ((base, row.base), (model, row.model)):
        parts.append(f"{_head_paint(_head(name, said), said, colour)}\n{textwrap.indent(printable(said.answer), '  ')}")
    return "\n".join(parts)


def totals(rows: Sequence[Row], base: str, model: str) -> str:
    """How many read as refusals, on one line."""
    before, after = sum(row.base.refusal for row in rows), sum(row.model.refusal for row in rows)
    return f"read as refusals: {base} {before} of {len(rows)} · {model} {after} of {len(rows)}"


def as_table(rows: Sequence[Row], base: str, model: str) -> dict[str, Any]:
    """For JSON."""
    return {
        "base": base,
        "model": model,
        "rows": [{"prompt": row.prompt, "base": row.base.plain(), "model": row.model.plain()} for row in rows],
        "refusals": {
            "base": sum(row.base.refusal for row in rows),
            "model": sum(row.model.refusal for row in rows),
            "total": len(rows),
        },
    }


def _head(name: str, said: Said) -> str:
    return f"{printable(name)}{' · refusal' if said.refusal else ''}"


def _head_paint(head: str, said: Said, colour: bool) -> str:
    return _paint(head, "1;31" if said.refusal else "1;32", colour)


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in printable(text).expandtabs(4).split("\n"):
        pieces = textwrap.wrap(line, width, drop_whitespace=True, replace_whitespace=False) or [""]
        for piece in pieces:
            lines += _folded(piece, width)
    return lines


def _folded(text: str, width: int) -> list[str]:
    """Cut where wide signs make a line wider than its characters are many."""
    found = []
    while cell_width(text) > width:
        at = len(_cut(text, width))
        found.append(text[:at])
        text = text[at:]
    return [*found, text]


def _cut(text: str, width: int) -> str:
    while cell_width(text) > width:
        text = text[:-1]
    return text
