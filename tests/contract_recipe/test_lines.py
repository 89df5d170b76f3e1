"""On which line a key stands; ids; slugs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.ids import ULID, new_id, slug
from abliterate.contract.toml_source import line_of, parse_toml

TEXT = """\
model = "x"   # [edit]
edit.mlp = 1
[ prompts ]
"count" = 3
# seed = 4
  system = '''
[edit]
'''
[[upstream]]
url = 1
["matrix"]
"edit.strength" = [1]
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model", 1),
        ("edit.mlp", 2),
        ("prompts", 3),
        ("prompts.count", 4),
        ("prompts.seed", 3),
        ("prompts.system", 6),
        ("upstream.url", 10),
        ("matrix", 11),
        ("nowhere", None),
    ],
)
def test_a_key_s_line_is_found(path: str, line: int | None) -> None:
    assert line_of(TEXT, path) == line


def test_times_become_text() -> None:
    table, _ = parse_toml(b"a = 2030-01-31T22:00:00\nb = [2030-01-31]\nc = {d = 01:02:03}", "t")
    assert table == {"a": "2030-01-31T22:00:00", "b": ["2030-01-31"], "c": {"d": "01:02:03"}}


def test_ids_are_ulids_and_never_the_same() -> None:
    ids = {new_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert all(ULID.fullmatch(one) for one in ids)


@given(st.text())
def test_a_slug_is_a_harmless_piece_of_a_file_name(text: str) -> None:
    piece = slug(text)
    assert 1 <= len(piece) <= 48
    assert piece.isascii()
    assert piece.isprintable()
    assert "/" not in piece
    assert not piece.startswith((".", "-"))
