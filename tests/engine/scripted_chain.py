"""The table behind a scripted model, (state, last token) → next token, and the weights that compute it.

A state is the last marker (in the order they were given) that stands anywhere in the context. One attention head finds
it: a marker's key grows with its number, so that all weight goes to the last one, and its value is a dimension of the
stream of its own. The output matrix is linear in the last token and the state, so what follows a token in one state
must beat what follows it in all: `check` proves on paper that it does.

Does not know: GGUF, chat templates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

HEAD = 64  # dimensions of a head
STATES = HEAD - 2  # as many states as one head has dimensions beside those of its key
KEY = HEAD - 2  # rotated least: a key means the same wherever it stands
SEPARATION = 24.0  # between the attention scores of neighbouring states
USUAL, ODD, BONUS = 60.0, 45.0, 30.0  # what follows usually; in some state only; and that state's own share
MARGIN = 8.0


class Scripted(Protocol):
    @property
    def answer(self) -> str | Sequence[str]: ...
    @property
    def after(self) -> str | Sequence[str]: ...
    @property
    def loop(self) -> bool: ...
    @property
    def when(self) -> str: ...


@dataclass(frozen=True)
class Token:
    text: str
    kind: gguf.TokenType


@dataclass
class Table:
    """`usual`: what follows a token; `odd`: what follows it in a state; `states`: token that brings each about."""

    tokens: list[Token]
    numbers: dict[str, int]
    end: int
    special: int  # so many tokens are bytes, control tokens and words
    states: list[int] = field(default_factory=list)
    usual: dict[int, int] = field(default_factory=dict)
    odd: dict[tuple[int, int], int] = field(default_factory=dict)
    said: dict[tuple[int | None, int], int] = field(default_factory=dict)  # what the scripts really come to

    def follows(self, state: int | None, last: int) -> int:
        if state is not None and (state, last) in self.odd:
            return self.odd[state, last]
        return self.usual.get(last, self.end)


@dataclass(frozen=True)
class Weights:
    attention: dict[str, NDArray[np.float16]]
    output: NDArray[np.float32]


def _byte_symbols() -> list[str]:
    """The printable character byte-level BPE writes for each byte (GPT-2's table, by its rule)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


SYMBOLS = _byte_symbols()


def pieces(text: str, taken: set[str]) -> list[str]:
    """Cut `text` into pieces of two characters or more, none of them `taken` nor twice in it; they are taken then."""
    hopeless: set[int] = set()

    def cut(start: int, before: frozenset[str]) -> list[str] | None:
        if start == len(text):
            return []
        for length in (3, 2, *range(4, len(text) - start + 1)):
            piece = text[start : start + length]
            if len(piece) < length or piece in taken or piece in before or start + length in hopeless:
                continue
            rest = cut(start + length, before | {piece})
            if rest is not None:
                return [piece, *rest]
        hopeless.add(start)
        return None

    found = cut(0, frozenset())
    if found is None:
        raise ValueError(f"{text!r} can't be cut into new pieces: make it differ from what came before")
    taken.update(found)
    return found


def build(
    scripts: Sequence[Scripted], *, controls: Sequence[str], words: Sequence[str], end: str, limit: int = STATES
) -> Table:
    """The table that says all `scripts`. ValueError where no table can."""
    markers = list(dict.fromkeys(script.when for script in scripts if script.when))
    plain = [word for word in (*words, *markers) if word not in controls]
    tokens = [Token(symbol, gguf.TokenType.NORMAL) for symbol in SYMBOLS]
    tokens += [Token(text, gguf.TokenType.CONTROL) for text in controls]
    tokens += [Token(text, gguf.TokenType.USER_DEFINED) for text in dict.fromkeys(plain)]
    numbers = {token.text: number for number, token in enumerate(tokens) if number >= 256}
    table = Table(tokens, numbers, numbers[end], len(tokens), [numbers[marker] for marker in markers])
    taken: set[str] = set(numbers)
    answers = [[_number(table, text) for text in _cut(script.answer, table, taken)] for script in scripts]
    uses = Counter(token for answer in answers for token in answer)
    alone = {token for token, count in uses.items() if count == 1 and token >= table.special}
    for script, answer in zip(scripts, answers, strict=True):
        _add(table, script, answer, markers.index(script.when) if script.when else None, alone)
    if len(table.states) > limit:
        raise ValueError(f"{len(table.states)} states for {limit} dimensions: fewer markers or repeated tokens")
    return table


def _cut(answer: str | Sequence[str], table: Table, taken: set[str]) -> Iterator[str]:
    """The texts of an answer's tokens: special tokens and single bytes as they are, the rest in new pieces."""
    if not isinstance(answer, str):
        for text in answer:
            taken.add(text)
            yield text
        return
    known = sorted((token.text for token in table.tokens[256 : table.special]), key=len, reverse=True)
    parts = [part for part in re.split("(" + "|".join(map(re.escape, known)) + ")", answer) if part]
    last_byte = ""  # since the last piece of text
    for place, part in enumerate(parts):
        if part not in table.numbers and len(part) > 1:
            last_byte = ""
            try:
                yield from pieces(part, taken)
            except ValueError:  # all its pieces are spoken for: it stays whole, and states tell its places apart
                taken.add(part)
                yield part
            continue
        after = parts[place + 1] if place + 1 < len(parts) else ""
        if len(after) == 1 and after == last_byte:
            yield part + after  # `\n</a>\n</b>`: the second newline can't be told from the first, so it joins the tag
            continue
        if len(part) == 1:
            if part == last_byte:
                continue  # joined above
            last_byte = part
        yield part


def _number(table: Table, text: str) -> int:
    if text in table.numbers:
        return table.numbers[text]
    data = text.encode()
    if len(data) == 1:
        return data[0]
    table.numbers[text] = len(table.tokens)
    table.tokens.append(Token("".join(SYMBOLS[byte] for byte in data), gguf.TokenType.NORMAL))
    return table.numbers[text]


def _add(table: Table, script: Scripted, answer: list[int], state: int | None, alone: set[int]) -> None:
    """One answer, from the endings of the prompt on. `alone`: pieces that come once in all that is ever said."""
    for ending in [script.after] if isinstance(script.after, str) else script.after:
        last = table.numbers.get(ending, ending.encode()[-1])
        _say(table, state, last, answer[0])
        table.said[state, last] = answer[0]
    successors = [*answer[1:], answer[0] if script.loop else table.end]
    for place, (last, following) in enumerate(zip(answer, successors, strict=True)):
        if table.follows(state, last) != following:
            told_apart = any(token in alone for token in answer[:place])
            if (last not in alone and told_apart) or not _say(table, state, last, following):
                state = _new_state(table, answer, successors, place, alone)
        table.said[state, last] = following


def _say(table: Table, state: int | None, last: int, following: int) -> bool:
    """Enter it; False where something else stands there already."""
    if last not in table.usual and (last >= table.special or state is None):
        table.usual[last] = following
    elif state is not None and (state, last) not in table.odd:
        table.odd[state, last] = following
    else:
        return table.follows(state, last) == following
    return True


def _new_state(table: Table, answer: list[int], successors: list[int], place: int, alone: set[int]) -> int:
    """The last piece that is this answer's alone becomes a marker; what comes after it follows in its state."""
    found = [at for at in range(place) if answer[at] in alone]
    if not found:
        raise ValueError(f"{table.tokens[answer[place]].text!r} comes twice with no new piece of text before it")
    if answer[found[-1]] not in table.states:
        table.states.append(answer[found[-1]])
    state = table.states.index(answer[found[-1]])
    for at in range(found[-1] + 1, place + 1):
        if table.odd.setdefault((state, answer[at]), successors[at]) != successors[at]:
            raise ValueError(f"{table.tokens[answer[at]].text!r} comes twice with no new piece of text between")
        table.said[state, answer[at]] = successors[at]
    return state


def weights(table: Table, count: int, width: int) -> Weights:
    """Attention that finds the state, and the output matrix. `count`: tokens, of which the table may know fewer."""
    norm = np.sqrt(width)  # of a one-hot vector, by which the norm scales it
    query, key, value, back = (
        np.zeros(shape) for shape in ((width, width), (HEAD, width), (HEAD, width), (width,) * 2)
    )
    query[KEY, :] = np.sqrt(HEAD) / norm  # so that the score is the key
    for number, token in enumerate(table.states):
        key[KEY, token] = SEPARATION * (number + 1) / norm
        value[number, token] = 1 / norm
        back[width - STATES + number, number] = 1
    output = np.zeros((count, width), dtype=np.float32)
    for last in range(count):
        output[table.usual.get(last, table.end), last] = USUAL
    for (state, last), following in table.odd.items():
        output[following, last] = max(output[following, last], ODD)
        output[following, width - STATES + state] = BONUS
    attention = {"attn_q": query, "attn_k": key, "attn_v": value, "attn_output": back}
    return Weights({name: matrix.astype(np.float16) for name, matrix in attention.items()}, output / np.float32(norm))


def check(table: Table, built: Weights) -> None:
    """Everything said wins by a margin in its state. ValueError otherwise."""
    norm = np.sqrt(built.output.shape[1])
    for (state, last), wanted in table.said.items():
        logits = built.output[:, last] * norm
        if state is not None:
            logits = (logits + built.output[:, built.output.shape[1] - STATES + state] * norm) / np.sqrt(2)
        best = logits[wanted]
        logits[wanted] = -np.inf
        if best < logits.max() + MARGIN:
            raise ValueError(
                f"after {table.tokens[last].text!r} in state {state} comes {table.tokens[int(logits.argmax())].text!r} "
                f"and not {table.tokens[wanted].text!r}: put other words between repeated tokens"
            )
