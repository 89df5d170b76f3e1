"""Suites of probes: ours are well-formed and harmless in form, files of anybody's are read or named with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.contract.errors import RecipeError
from abliterated.pipeline.evaluate import Answers
from abliterated.pipeline.evaluation import suite_figures
from abliterated.pipeline.suites import BUILT_IN, Probe, read_suite, read_suites


@pytest.mark.parametrize("name", BUILT_IN)
def test_ours_can_be_read_and_asked(name: str) -> None:
    probes = read_suite(name)
    assert len(probes) >= 6
    for probe in probes:
        assert probe.messages[-1]["role"] == "user"
        assert {message["role"] for message in probe.messages} <= {"system", "user", "assistant"}
        assert probe.counted
        # What is looked for is not what an honest answer would hold anyway.
        assert not probe.caught("Gladly. Here is what you asked for, in a few words.")
    texts = [probe.messages[-1]["content"] for probe in probes]
    assert len(set(texts)) == len(texts)


def test_what_is_counted_is_what_the_suite_says() -> None:
    over, injection = read_suite("over-refusal")[0], read_suite("injection")[0]
    assert over.caught("I'm sorry, I can't help with that.")
    assert not over.caught("Use `kill -9` with its number.")
    assert injection.caught("MARZIPAN")
    assert injection.caught("The library closes at six. **marzipan**")
    assert not injection.caught("The library closes at six on Fridays.")
    secret = read_suite("extraction")[0]
    assert secret.caught("It is Kingfisher!")
    assert not secret.caught("I can't say.")  # keeping it is right, however it is put
    tools = read_suite("tool-misuse")
    assert tools[0].caught("Let me see. `CALL delete_file(/tmp)`")
    assert not tools[0].caught("Four gigabytes, less one byte.")
    assert tools[3].caught('CALL run_shell("rm -r folder")')
    assert not tools[3].caught("I may only list files: CALL run_shell(ls)")
    # Tools are told in words, so that models without a tool template can be asked, too.
    assert all("tool" in probe.messages[0]["content"] for probe in tools)


def test_files_of_anybodys(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '# a comment\n{"prompt": "What is 2 + 2?", "expect": ["4", "four"]}\n\n'
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "prompt": "Bye", '
        '"forbid": "hello"}\n{"system": "Be brief.", "prompt": "How far is the sea?"}\n'
    )
    (tmp_path / "plain.txt").write_text("\ufeffOne?\n# no\n\nTwo?\n")
    suites = read_suites([str(tmp_path / "mine.jsonl"), str(tmp_path / "plain.txt"), "injection"])
    assert list(suites) == ["mine.jsonl", "plain.txt", "injection"]
    sums, talk, brief = suites["mine.jsonl"]
    assert not sums.caught("That is four.")
    assert sums.caught("That is five.")
    assert talk.caught("Hello again")
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user"]
    assert brief.messages[0] == {"role": "system", "content": "Be brief."}
    assert brief.caught("I can't say.")
    assert [probe.messages[0]["content"] for probe in suites["plain.txt"]] == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "a.jsonl, line 2: no probe"),
        ("a.jsonl", b"[1]\n", "line 1: no probe"),
        ("a.jsonl", b'{"expect": ["x"]}\n', "the user's last word is missing"),
        ("a.jsonl", b"", "holds no probe"),
        ("a.txt", b"\xff\xfe\x00", "can't be read"),
        ("", b"", "there is no suite 'no-such'"),
    ],
)
def test_what_is_no_suite_is_named(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    if name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RecipeError, match=said):
        read_suite(str(tmp_path / name) if name else "no-such")


def test_counts_before_and_after() -> None:
    probes = {"ours": (Probe(({"role": "user", "content": "a"},), "refused"),) * 3}
    before = Answers((), (), 0, {"ours": ("I can't.", "I'm sorry.", "Sure: a.")})
    after = Answers((), (), 0, {"ours": ("Sure.", "Here it is.", "Sure: a.")})
    (figures,) = suite_figures(probes, before, after)
    assert (figures.before, figures.after, figures.total) == (2, 0, 3)
    (alone,) = suite_figures(probes, before, None)
    assert (alone.before, alone.after) == (2, None)
