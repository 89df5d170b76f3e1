"""A modelfile keeps every word: as people write it, as Ollama prints it, as we print it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError
from abliterated.ollama.modelfile import Message, Modelfile, from_show, parse, write
from fake_ollama import show_answer

# Quotes, line breaks and the words of the language, mixed with any text at all.
nasty = st.lists(
    st.one_of(
        st.sampled_from(
            ['"', '"""', "\n", "\r", " ", "\t", "FROM x", "PARAMETER stop ", "#", "{{ .Prompt }}", "\\", "\x00"]
        ),
        st.text(max_size=6),
    ),
    max_size=8,
).map("".join)
text = st.one_of(nasty, st.text(max_size=40))
words = st.text(alphabet="abcdefghijklmnop/._-0123456789:", min_size=1, max_size=20)
parameters = st.lists(
    st.one_of(
        st.tuples(st.just("stop"), text),
        st.tuples(st.sampled_from(["num_ctx", "top_k", "seed"]), st.integers(-(2**31), 2**31)),
        st.tuples(st.sampled_from(["temperature", "top_p"]), st.floats(-1e6, 1e6, allow_nan=False)),
        st.tuples(st.just("use_mmap"), st.booleans()),
    ),
    max_size=5,
).map(tuple)
said = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), text)
modelfiles = st.builds(
    Modelfile,
    models=st.lists(words, min_size=1, max_size=2).map(tuple),
    template=st.none() | text,
    system=text,
    renderer=words | st.just(""),
    parser=words | st.just(""),
    requires=words | st.just(""),
    parameters=parameters,
    licenses=st.lists(text, max_size=2).map(tuple),
    messages=st.lists(said, max_size=3).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(modelfiles)
def test_what_is_written_reads_back_as_the_same_or_is_refused(modelfile: Modelfile) -> None:
    try:
        written = write(modelfile)
    except ModelError:
        texts = [modelfile.template or "", modelfile.system, *modelfile.licenses]
        texts += [said.content for said in modelfile.messages] + [str(value) for _, value in modelfile.parameters]
        assert any('"' in value and "\n" in value for value in texts), "only what needs triple quotes may be refused"
        return
    assert parse(written) == modelfile


@settings(max_examples=150, deadline=None)
@given(modelfiles)
def test_what_ollama_shows_is_read_exactly_whatever_it_holds(modelfile: Modelfile) -> None:
    # An empty TEMPLATE, SYSTEM or MESSAGE is as good as none; the joined field gives one licence exactly.
    keep = Modelfile(
        **{
            **modelfile.__dict__,
            "template": modelfile.template or None,
            "licenses": tuple(value for value in modelfile.licenses[:1] if value),
            "messages": tuple(said for said in modelfile.messages if said.content),
        }
    )
    assert from_show(show_answer(keep)) == keep


def test_a_persons_modelfile_is_read_as_ollama_reads_it() -> None:
    modelfile = parse(
        '# mine\nfrom llama3:8b\nTEMPLATE """{{ if .System }}\n"{{ .System }}"\n{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop <|im_start|>\nPARAMETER num_ctx 8192\nPARAMETER temperature 0.7\n'
        'SYSTEM   You are terse.  \nMESSAGE user hello\nMESSAGE assistant "hi\nthere"\n'
        "RENDERER qwen3-coder\nPARSER qwen3-coder\n"
        "REQUIRES 0.14.0\nADAPTER ./lora.gguf\nLICENSE one line"
    )
    assert modelfile.template == '{{ if .System }}\n"{{ .System }}"\n{{ end }}'
    assert modelfile.parameter_map() == {"stop": ["<|im_end|>", "<|im_start|>"], "num_ctx": 8192, "temperature": 0.7}
    assert modelfile.system == "You are terse."
    assert modelfile.messages == (Message("user", "hello"), Message("assistant", "hi\nthere"))
    assert (modelfile.renderer, modelfile.parser, modelfile.requires) == ("qwen3-coder", "qwen3-coder", "0.14.0")
    assert modelfile.adapters == ("./lora.gguf",) and modelfile.licenses == ("one line",)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("FROM x\nSTEP y\n", "line 2: 'STEP' is no command"),
        ('FROM x\nSYSTEM """never\n', "never closed"),
        ("MESSAGE tool x\n", "is no role"),
    ],
)
def test_what_is_no_modelfile_is_refused_with_its_line(bad: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        parse(bad)


def test_a_stop_string_that_is_one_quote_survives_ollamas_own_printing() -> None:
    modelfile = Modelfile(models=("/m",), parameters=(("stop", '"'), ("stop", "end"), ("stop", '"end"')))
    assert from_show(show_answer(modelfile)) == modelfile
