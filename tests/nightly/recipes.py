"""A hundred thousand recipes nobody would write: bytes, structures and TOML gone wrong, each with a verdict in time."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import parse_recipe
from abliterated.config import check_spooled

LIMIT = 64 * 1024
_KEYS = "model name replace force prompts direction edit search evaluate export run schedule matrix".split()
_VALUES = ['"x"', "1", "-1", "1e309", "nan", "true", "[]", "{}", "[[[]]]", '""', "1979-05-27", "0x7fffffffffffffff"]
_SEEDS = [
    b'model = "ollama:qwen3:8b"\n[edit]\nstrength = 1.0\n[schedule]\nwindow = "01:00-07:00"\n',
    b'model = "hf:o/m"\n[matrix]\n"edit.strength" = [0.5, 1.0]\nmodel = ["ollama:a", "ollama:b"]\n',
    b'model = "/m.gguf"\n[prompts]\nharmful = ["a", "b"]\n[direction]\nlayer = [1, 2.5]\n',
]


def cases(count: int, seed: int) -> Iterator[bytes]:
    luck = random.Random(seed)
    makers = [_mutated, _mutated, _structured, _structured, _right, _bytes, _deep]
    for number in range(count):
        # The large ones are rare, as they are slow to make; each hundredth fills the limit.
        yield (_large if number % 100 == 0 else luck.choice(makers))(luck)[:LIMIT]


def _mutated(luck: random.Random) -> bytes:
    data = bytearray(luck.choice(_SEEDS))
    for _ in range(luck.randint(1, 8)):
        place = luck.randrange(len(data) + 1)
        match luck.randrange(4):
            case 0:
                data[place:place] = luck.randbytes(luck.randint(1, 4))
            case 1:
                del data[place : place + luck.randint(1, 9)]
            case 2:
                data[place:place] = luck.choice([b'"', b"'''", b"[", b"]", b"\n", b"=", b"#", b"\\u", b"\0", b"."])
            case _:
                other = luck.choice(_SEEDS)
                start = luck.randrange(len(other))
                data[place:place] = other[start : start + 20]
    return bytes(data)


def _structured(luck: random.Random) -> bytes:
    lines = []
    for _ in range(luck.randint(1, 12)):
        key = luck.choice([*_KEYS, "edit.strength", '"' + "k" * luck.randint(0, 99) + '"', "schedule.after"])
        lines.append(luck.choice([f"[{key}]", f"[[{key}]]", f"{key} = {luck.choice(_VALUES)}"]))
    return "\n".join(lines).encode()


_RIGHT = {
    "prompts": ["count = 64", 'system = "be brief"', 'harmful = ["builtin", "/m/a.txt"]'],
    "direction": ['method = "layer"\nlayer = [0.5, 0.6]', "rank = 2", "orthogonalize = false"],
    "edit": ["strength = 0.7", 'layers = "2-30"', 'kernel = "linear"', 'norm = "rows"'],
    "schedule": ['window = "22:00-06:00"', "not_before = 2030-01-31T22:00:00", 'after = ["other"]', "priority = -3"],
    "matrix": ['"edit.attention" = [0.5, 1.0, 1.5]', 'model = ["ollama:a", "ollama:b"]'],
}


def _right(luck: random.Random) -> bytes:
    """A recipe that is one, with comments and blanks where nobody would put them."""
    lines = [f'model = "{luck.choice(["ollama:qwen3:8b", "hf:o/m", "/m/x.gguf"])}"']
    for table, choices in luck.sample(list(_RIGHT.items()), luck.randint(0, 4)):
        lines += [f"[{table}]", *luck.sample(choices, luck.randint(0, 2))]
        lines += ["  # " + "é" * luck.randint(0, 40)] * luck.randint(0, 2)
    return "\n".join(lines).encode()


def _bytes(luck: random.Random) -> bytes:
    return luck.randbytes(luck.randint(0, 300))


def _deep(luck: random.Random) -> bytes:
    depth = luck.randint(1, 400)
    return luck.choice(
        [
            b"a = " + b"[" * depth + b"]" * depth,
            b".".join([b"a"] * depth) + b" = 1",
            b"a = " + b"{b = " * depth + b"1" + b"}" * depth,
            b"a = " + b"9" * (depth * 20),
            b"[" + b".".join([b"a"] * depth) + b"]",
        ]
    )


def _wide(luck: random.Random) -> bytes:
    """As many jobs as a matrix may make, each with a list as long as one may be, or longer."""
    head, item = luck.choice(
        [
            (b"[prompts]\nharmful = [", b'"/m/%s",' % (b"x" * 50)),
            (b"[prompts]\natoms = [", b'"/m/../m/x",'),
            (b"[schedule]\nafter = [", b'"%s",' % (b"x" * 50)),
            (b"[edit]\nlayers = [", b"1,"),
            (b"[evaluate]\nsuites = [", b'"injection",'),
        ]
    )
    tail = b']\n[matrix]\n"edit.strength" = [' + b",".join(b"%.2f" % (n / 100) for n in range(1, 65)) + b"]\n"
    start = b'model = "ollama:m"\n' + head
    most = (LIMIT - len(start) - len(tail)) // len(item)
    return start + item * luck.choice([most, min(most, 1000)]) + tail


def _large(luck: random.Random) -> bytes:
    return luck.choice(
        [
            lambda: b"a." * (LIMIT // 2 - 4) + b"b = 1",
            lambda: b'model = "ollama:m"\n[prompts]\nharmful = [' + b'"x",' * (LIMIT // 4 - 20) + b"]",
            lambda: b"\n".join(b"k%d = 1" % n for n in range(6000)),
            lambda: b'model = "ollama:m"\n[matrix]\n"edit.strength" = [' + b"1, 0.5, " * 7000 + b"]",
            lambda: b'model = "ollama:m"\n[matrix]\n"prompts.system" = [' + b'"%s",' % (b"y" * 250) * 250 + b"]",
            lambda: _wide(luck),
            lambda: b"a = " + b"[" * (LIMIT - 8),
            lambda: b"#" * LIMIT,
            lambda: b"a = " + b"9" * (LIMIT - 8),
            lambda: b"\n".join(b"[" + b".".join([b"t%d" % n] * 90) + b"]" for n in range(200)),
        ]
    )()


def fuzz(count: int = 100_000, seed: int = 1) -> dict[str, float]:
    """Slowest verdict, memory grown, and what was no verdict."""
    parse_recipe(_SEEDS[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, good, uncaught = 0.0, 0, 0
    for case in cases(count, seed):
        begun = time.thread_time()
        try:
            check_spooled(parse_recipe(case), ["/m"])
            good += 1
        except RecipeError:
            pass
        except Exception:
            uncaught += 1
        slowest = max(slowest, time.thread_time() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "recipes": count,
        "slowest_ms": round(slowest * 1000, 1),
        "grown_mb": round(grown, 1),
        "uncaught": uncaught,
        "good": good,
    }
