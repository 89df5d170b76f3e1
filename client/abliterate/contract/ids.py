"""Job identifiers: ULIDs, made by whoever submits, so that a resubmission is recognised. Knows nothing of jobs."""

from __future__ import annotations

import os
import re
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
ULID = re.compile(r"[0-7][0-9a-hjkmnp-tv-z]{25}")


def new_id() -> str:
    """26 characters of Crockford's base 32, lower case: 48 bits of milliseconds, 80 random bits."""
    return encoded((time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big"))


def encoded(value: int) -> str:
    """128 bits as a ULID."""
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -5, -5))


def time_of(ulid: str) -> int:
    """The milliseconds a ULID was made at."""
    value = 0
    for letter in ulid[:10]:
        value = value << 5 | _ALPHABET.index(letter)
    return value


def slug(text: str) -> str:
    """`text` as a piece of a file name."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:48] or "recipe"
