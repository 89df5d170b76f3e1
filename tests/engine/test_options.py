"""Durations, options, templates and origins: the pure parts."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterated.engine import options
from abliterated.engine.create import check_template
from abliterated.engine.models import parameter_size
from abliterated.engine.origins import host_allowed, origin_allowed
from abliterated.engine.store import read_digest, read_name
from abliterated.shapes.refusals import Refused


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("-1s", -1), ("0", 0), ("90", 90), ("1.5h", 5400), ("24h", 86400)],
)
def test_a_duration_is_gos(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=9)))
def test_a_duration_written_in_parts_is_their_sum(wanted: timedelta) -> None:
    minutes, seconds = divmod(wanted.seconds, 60)
    text = f"{wanted.days * 24}h{minutes}m{seconds}s{wanted.microseconds}us"
    assert options.duration(text) == pytest.approx(wanted.total_seconds())


@given(st.text())
def test_any_other_text_is_refused(text: str) -> None:
    try:
        assert isinstance(options.duration(text), float)
    except Refused as error:
        assert error.status == 400


def test_keep_alive_knows_never_and_for_ever() -> None:
    assert options.keep_alive(None) == 300
    assert options.keep_alive(0) == options.keep_alive("0s") == 0
    assert options.keep_alive(-1) is options.keep_alive("-1m") is None
    assert options.keep_alive(float("inf")) is options.keep_alive("99999999h") is None
    with pytest.raises(Refused):
        options.keep_alive(True)


def test_the_request_wins_over_the_model_and_the_model_over_the_defaults() -> None:
    merged = options.merge(
        {"temperature": 0.1, "top_k": 5, "stop": ["a"]}, {"temperature": 0.9, "top_p": None, "stop": "b"}
    )
    body = options.sampling(merged)
    assert (body["temperature"], body["top_k"], body["top_p"], body["stop"]) == (0.9, 5, 0.9, ["b"])
    assert body["n_predict"] == -1 and "num_predict" not in body
    assert "num_ctx" not in options.sampling({"num_ctx": 10})


def test_the_context_stays_within_what_the_model_was_trained_for() -> None:
    assert options.load({}, 0).context == 4096
    assert options.load({}, 512).context == 512
    assert options.load({"num_ctx": 100_000}, 32_768).context == 32_768
    assert options.load({"num_ctx": 100}, 32_768).context == 100


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ .Prompt }}",
        "{{- if .System }}a{{ else if .X }}b{{ else }}c{{ end }}",
        "{{/* {{ }} */}}x",
        '{"a": {{ .B }}}}',
        "{{ range .Messages }}{{ with .Content }}{{ . }}{{ end }}{{ end -}}",
        '{{ define "x" }}{{ end }}',
    ],
)
def test_a_template_that_closes_is_kept(template: str) -> None:
    check_template(template)


@pytest.mark.parametrize(
    "template", ["{{", "{{ if .X }}", "{{ end }}", "{{ else }}", "a {{ .B", "{{ if .X }}{{ end }}{{ end }}"]
)
def test_a_template_that_does_not_close_is_refused(template: str) -> None:
    with pytest.raises(Refused, match="template error"):
        check_template(template)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (7, "7"),
        (1500, "2K"),
        (1_370_624, "1.37M"),
        (494_032_768, "494.03M"),
        (8_030_261_248, "8.0B"),
        (7 * 10**9, "7B"),
    ],
)
def test_sizes_read_as_ollamas(count: int, text: str) -> None:
    assert parameter_size(count) == text


@pytest.mark.parametrize(
    "host", [None, "localhost", "localhost:11434", "127.0.0.1:1", "[::1]:1", "10.0.0.5", "box.local:1", "a.localhost"]
)
def test_hosts_of_this_machine_pass(host: str | None) -> None:
    assert host_allowed(host)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:11434", "8.8.8.8", "127.0.0.1.evil.example"])
def test_other_hosts_do_not(host: str) -> None:
    assert not host_allowed(host)


@given(st.text())
def test_no_header_crashes_the_guard(text: str) -> None:
    host_allowed(text)
    origin_allowed(text, text)


def test_origins() -> None:
    assert origin_allowed(None, "localhost") and origin_allowed("app://obsidian.md", "localhost")
    assert origin_allowed("http://box:11435", "box:11435") and origin_allowed("https://127.0.0.1:9", "x")
    assert not origin_allowed("null", "localhost") and not origin_allowed("http://evil.example", "localhost")


@given(st.text())
def test_any_text_is_a_name_or_a_400(text: str) -> None:
    for reader in (read_name, read_digest):
        try:
            reader(text)
        except Refused as error:
            assert error.status == 400
