"""The page: one file, nothing from elsewhere, everything escaped, readable in both themes, whatever it is told."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.contract.report import (
    BaseModel,
    Candidate,
    EditReport,
    LayerSeparation,
    Product,
    Report,
    Search,
    TensorReport,
    Trial,
    UnreadableReport,
    read_report,
)
from abliterated.report import charts, page, redraw
from abliterated.report.axes import number, percent, ticks
from abliterated.report.markup import VOID, Markup, escape, tag
from abliterated.report.style import DARK, LIGHT, STYLE
from report.samples import least, rich

HOSTILE = "<script>alert(1)</script>\"'>&amp;\u202e\x00\x1b[2J\ud800</title><img src=//x onerror=y>"


class Tree(HTMLParser):
    """Reads the page as a browser would, and complains where elements don't nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Tree:
    tree = Tree()
    tree.feed(html)
    tree.close()
    assert tree.open == []
    return tree


def test_a_rich_report_shows_everything_the_run_measured() -> None:
    tree = parsed(page(rich()))
    text = " ".join(tree.text)
    for words in (
        "brook-abliterated:8b",
        "Before and after",
        "97\u00a0%",
        "(92–99)",
        "Trials of the search",
        "Candidates by layer and position",
        "Separation by layer",
        "Projections behind layer 17, the chosen one",
        "Strength by layer",
        "blk.9.ffn_down.weight".replace("9", ""),
        "64 of 64 tensors",
        "7 min 14 s in all",
        "17.2 GB",
        "hf:org/harmless#text",
        "apache-2.0",
        "In the engine",
        "the search stopped after 44 trials",
    ):
        assert words.split(".")[0] in text, words
    headings = [name for name, _ in tree.tags if name in ("h1", "h2")]
    assert headings[0] == "h1"
    # The figures come before the pictures.
    assert text.index("Harmful prompts refused") < text.index("Trials of the search")


def test_before_stands_before_after_and_each_class_in_its_own_bars() -> None:
    told = {"refusal_before": 0.75, "refusal_after": 0.125, "cross_entropy_before": 0.5, "cross_entropy_after": 0.625}
    text = " ".join(parsed(page(msgspec.structs.replace(rich(), evaluation=told))).text)
    rows = text[text.index("Before and after") : text.index("How the direction")]
    assert rows.index("75\u00a0%") < rows.index("12.5\u00a0%") < rows.index("0.5 ") < rows.index("0.625")
    drawn = str(charts.histogram(LayerSeparation(layer=1, harmful=[9.0] * 3, harmless=[0.0], apart=5.0), "one"))
    bars = re.findall(r"<rect [^>]*>.*?</rect>", drawn)
    assert [("harmful" in bar, "harmless" in bar) for bar in bars] == [(True, False), (False, True)]
    places = [float(re.search(r' x="([\d.]+)"', bar)[1]) for bar in bars]  # type: ignore[index]
    assert places[0] > places[1]


def test_the_fuller_the_cell_the_less_refusal_is_left() -> None:
    candidates = [Candidate(layer=float(layer), position=-1, bypass=score) for layer, score in ((1, -4.0), (2, 3.0))]
    drawn = str(charts.heat_map(candidates, (1.0, -1)))
    full = {
        float(title): float(opacity)
        for opacity, title in re.findall(r'fill-opacity="([\d.]+)"[^>]*>\s*<title>layer (\d)', drawn)
    }
    assert full[1.0] == 1.0
    assert full[2.0] < 0.1


def test_tokens_are_counted_once() -> None:
    """What the run counted is everything, the evaluation's tokens among it."""
    found = msgspec.structs.replace(rich(), evaluation={"tokens_decoded": 7_692.0, "tokens_decoded_run": 12_303.0})
    assert found.search is not None
    found = msgspec.structs.replace(found, search=msgspec.structs.replace(found.search, tokens_decoded=12_303))
    assert "<dd>12,303</dd>" in page(found)


def test_a_strengthened_refusal_and_spared_layers_are_shown_as_they_are() -> None:
    whole = rich()
    for strengths, bars, words in (
        ([(-1.0, -0.5), (-1.0, -1.0)], 4, "of the tensors that write"),
        ([(0.0, 0.0), (1.0, 0.5)], 2, "of the chosen tensors that write"),
    ):
        edit = msgspec.structs.replace(whole.edit, strengths=strengths)
        text = page(msgspec.structs.replace(whole, edit=edit))
        drawn = text[text.index("Strength of the edit by layer") :].partition("</svg>")[0]
        heights = [float(one) for one in re.findall(r'<rect [^>]*height="([-\d.]+)"', drawn)]
        assert len(heights) == bars
        assert min(heights) > 20
        assert words in text


def test_the_least_report_is_a_page_too() -> None:
    tree = parsed(page(least()))
    assert not any(name == "figure" for name, _ in tree.tags)
    assert "direction.safetensors" in " ".join(tree.text)


def test_nothing_comes_from_elsewhere_and_nothing_may_run() -> None:
    html = page(rich())
    tree = parsed(html)
    assert not {name for name, _ in tree.tags} & {"script", "img", "iframe", "object", "embed", "form", "base"}
    for name, attributes in tree.tags:
        assert not [key for key in attributes if key.startswith("on")], name
        assert "style" not in attributes, name
        assert attributes.get("href", "data:,") == "data:,"
        assert "src" not in attributes
    assert not re.search(r"url\(|@import", STYLE)
    assert not re.findall(r"https?://", html.replace("http://www.w3.org/2000/svg", ""))
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    assert f"style-src &#39;sha256-{digest}&#39;" in html
    assert html.count("<style>") == 1
    assert f"<style>{STYLE}</style>" in html


def test_pictures_and_tables_say_what_they_are() -> None:
    tree = parsed(page(rich()))
    identifiers = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    pictures = [attributes for name, attributes in tree.tags if name == "svg" and "aria-hidden" not in attributes]
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture["role"] == "img"
        for named in (picture["aria-labelledby"] or "").split():
            assert named in identifiers
    names = [name for name, _ in tree.tags]
    assert names.count("caption") == names.count("table")
    assert all(attributes.get("scope") for name, attributes in tree.tags if name == "th")
    assert dict(tree.tags[0][1]) == {"lang": "en"}


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_in_both_themes(theme: dict[str, str]) -> None:
    for behind in ("paper", "card"):
        for text in ("ink", "soft", "accent", "warn", "bad"):
            assert contrast(theme[text], theme[behind]) >= 4.5, (text, behind)
        for mark in ("harmful", "harmless", "accent"):
            assert contrast(theme[mark], theme[behind]) >= 3.0, (mark, behind)


TEXT = st.one_of(st.just(HOSTILE), st.text(st.characters(codec=None), max_size=40))
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
SMALL = st.integers(-8, 80)


def reports() -> st.SearchStrategy[Report]:
    return st.builds(
        Report,
        base=st.builds(BaseModel, name=TEXT, digest=TEXT, architecture=TEXT, licence=TEXT, bytes=st.integers(0, 2**40)),
        product=st.builds(Product, name=TEXT, format=TEXT),
        recipe=st.dictionaries(TEXT, st.one_of(TEXT, NUMBER, st.lists(TEXT, max_size=2)), max_size=4),
        direction=st.fixed_dictionaries(
            {}, optional={"layer": st.one_of(SMALL, TEXT), "position": SMALL, "method": TEXT}
        ),
        candidates=st.lists(st.builds(Candidate, layer=st.floats(0, 80), position=SMALL, bypass=st.none() | NUMBER)),
        search=st.none()
        | st.builds(Search, trials=st.lists(st.builds(Trial, number=SMALL, refusal=NUMBER, kl=NUMBER))),
        separation=st.lists(
            st.builds(
                LayerSeparation,
                layer=SMALL,
                harmful=st.lists(NUMBER, max_size=4),
                harmless=st.lists(NUMBER, max_size=4),
                apart=NUMBER,
            ),
            max_size=3,
        ),
        edit=st.builds(
            EditReport,
            coverage=NUMBER,
            residual=NUMBER,
            strengths=st.lists(st.tuples(NUMBER, NUMBER), max_size=4),
            tensors=st.lists(
                st.builds(TensorReport, name=TEXT, kind=TEXT, residual=NUMBER, rounding=NUMBER), max_size=4
            ),
            unknown=st.lists(TEXT, max_size=2),
        ),
        evaluation=st.dictionaries(
            st.sampled_from(["refusal_before", "refusal_after", "refusal_after_low", "kl_mean", "harmless_exact"]),
            NUMBER,
        ),
        seconds=st.dictionaries(TEXT, NUMBER, max_size=3),
        notes=st.lists(TEXT, max_size=2),
    )


@given(reports())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_report_breaks_the_page_or_out_of_it(report: Report) -> None:
    html = page(report)
    tree = parsed(html)
    assert not {name for name, _ in tree.tags} & {"script", "img"}
    # A browser reads UTF-8 without controls and without anything that turns text around.
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    html.encode()
    assert html == page(report)
    for place in re.findall(r' (?:x|y|cx|cy|r|width|height|x1|y2)="([^"]*)"', html):
        assert math.isfinite(float(place)), place


def test_a_hostile_name_is_shown_and_does_nothing() -> None:
    html = page(rich(HOSTILE))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\ufffd" in html


def test_a_report_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    data = msgspec.json.encode(rich())
    assert read_report(data) == rich()
    more = json.loads(data) | {"of a later minor version": 1}
    assert read_report(json.dumps(more).encode()) == rich()
    (tmp_path / "report.json").write_bytes(data)
    redraw(tmp_path)
    assert (tmp_path / "report.html").read_text() == page(rich())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"version": 99}', b'{"version": 2, "base": 3}', b"\xff"])
def test_what_is_no_report_is_said(data: bytes) -> None:
    with pytest.raises(UnreadableReport) as raised:
        read_report(data)
    assert raised.value.remedy


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.003), (-4.2, 7.9), (0, 1e9), (3, 3)])
def test_ticks_are_round_and_few_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in found)


def pairs() -> Iterator[tuple[str, str]]:
    yield number(0.0042), "0.0042"
    yield number(0), "0"
    yield number(1234.5), "1234.5"
    yield number(0.00002), "2e-5"
    yield percent(0.125), "12.5\u00a0%"


def test_numbers_are_short() -> None:
    for found, wanted in pairs():
        assert found == wanted


def test_markup_is_escaped_once() -> None:
    assert tag("p", "a < b", Markup("<b>c</b>")) == "<p>a &lt; b<b>c</b></p>"
    assert escape('"') == "&quot;"
    assert tag("rect", stroke_width=1.5, x=None, class_="a b") == '<rect stroke-width="1.5" class="a b"></rect>'
