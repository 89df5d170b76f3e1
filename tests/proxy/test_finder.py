"""The model's name is found wherever it stands, however the body is cut, and nothing costs more than a look."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterated.proxy.finder import NAME_LIMIT, Found, ModelFinder

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.just("model"), inner, max_size=4)
    ),
    max_leaves=12,
)


def find(body: bytes, *, cuts: list[int] | None = None, second: bool = False) -> Found | None:
    finder = ModelFinder(second=second)
    edges = [0, *sorted(cuts or []), len(body)]
    for start, end in itertools.pairwise(edges):
        if finder.feed(body[start:end]):
            break
    return finder.found


@settings(max_examples=300, deadline=None)
@given(
    before=st.dictionaries(
        st.text(max_size=8).filter(lambda key: key.lower() not in ("model", "name")), values, max_size=4
    ),
    name=st.text(max_size=30),
    after=values,
    indent=st.sampled_from([None, 0, 2]),
    plain=st.booleans(),
    data=st.data(),
)
def test_the_name_is_what_a_json_parser_reads_wherever_the_body_is_cut(
    before: dict[str, Any], name: str, after: Any, indent: int | None, plain: bool, data: st.DataObject
) -> None:
    whole = {**before, "model": name, "later": after}
    body = json.dumps(whole, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    found = find(body, cuts=cuts)
    assert found is not None and found.name == name
    assert json.loads(body[found.start : found.end]) == name


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_the_finder_neither_raises_nor_invents(body: bytes) -> None:
    found = find(body, cuts=list(range(0, len(body), 7)))
    assert found is None or body[found.start : found.start + 1] == b'"'


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"a"}', "a"),
        (b' \r\n{ "stream" : true , "model" : "a:b" }', "a:b"),
        (b'{"MODEL":"a"}', "a"),  # Ollama's decoder compares keys without case
        (b'{"mod\\u0065l":"a"}', "a"),
        (b'{"messages":[{"model":"no"}],"options":{"model":"no"},"model":"yes"}', "yes"),
        (b'{"x":"\\"model\\":\\"no\\"","model":"yes"}', "yes"),
        (b'{"x":"\\\\","model":"yes"}', "yes"),
        (b'{"model":"first","model":"second"}', "first"),
        (b'{"x":1.5e3,"y":null,"z":[],"model":"m"}', "m"),
        (b'{"model":"\\u0061\\/b"}', "a/b"),
        (b'{"model":7}', None),
        (b'{"model":null,"x":1}', None),
        (b'{"model":["a"]}', None),
        (b'["model","a"]', None),
        (b'"model"', None),
        (b"", None),
        (b"{}", None),
        (b'{"model" "a"}', None),
        (b'{model:"a"}', None),
        (b'\xef\xbb\xbf{"model":"a"}', None),  # Ollama's decoder refuses a byte order mark, too
        (b'{"model":"' + b"a" * NAME_LIMIT + b'"}', None),
    ],
)
def test_what_counts_as_the_name(body: bytes, name: str | None) -> None:
    for step in (1, 3, len(body) or 1):
        found = find(body, cuts=list(range(0, len(body), step)))
        assert (found.name if found else None) == name


def test_the_older_spelling_counts_only_where_it_is_asked_for_and_model_is_missing() -> None:
    assert find(b'{"name":"a"}') is None
    older = find(b'{"name":"a","x":1}', second=True)
    assert older is not None and older.name == "a"
    newer = find(b'{"name":"a","model":"b"}', second=True)
    assert newer is not None and newer.name == "b"


def test_a_name_behind_megabytes_of_images_is_found_without_keeping_them() -> None:
    finder = ModelFinder()
    body = b'{"messages":[{"images":["' + b"QUJD" * 2_000_000 + b'"]}],"model":"m"}'
    began = time.thread_time()
    for start in range(0, len(body), 65536):
        finder.feed(body[start : start + 65536])
        assert len(finder._buffer) < 2 * 65536
    assert finder.found is not None and finder.found.name == "m"
    assert time.thread_time() - began < 2.0


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 2_000_000,
        b'{"a":' * 400_000,
        b"[]," * 700_000,
        b'"",' * 700_000,
        b'"\\"' + b"\\u0041" * 400_000,
        b'"' * 999_999,
    ],
)
def test_a_bomb_costs_a_bounded_look(bomb: bytes) -> None:
    finder = ModelFinder()
    body = b'{"x":[' + bomb
    began = time.thread_time()
    for start in range(0, len(body), 4096):
        if finder.feed(body[start : start + 4096]):
            break
    assert finder.found is None
    assert time.thread_time() - began < 2.0


def test_a_body_that_trickles_in_is_read_once_not_once_for_each_byte() -> None:
    finder = ModelFinder()
    began = time.thread_time()
    for byte in b'{"prompt":"' + b"a" * 200_000 + b'","model":"m"}':
        finder.feed(bytes((byte,)))
    assert finder.found is not None
    assert time.thread_time() - began < 5.0
