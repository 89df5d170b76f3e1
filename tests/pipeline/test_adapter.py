"""The adapter against the plain edit: numbers, engine, size, and what it refuses to hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from abliterate.contract.errors import Cancelled, ModelError, RecipeError
from abliterate.contract.recipe import Edit
from abliterated.pipeline.adapter import export_adapter
from abliterated.pipeline.direction_files import write_direction
from abliterated.pipeline.directions import RefusalDirection, direction
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.gguf_edit import edit_gguf
from abliterated.refuser import files, held_out, is_refusal
from pipeline import tiny_gguf

PLAIN = Edit(norm="none")
ONE = direction(np.random.default_rng(0).standard_normal(tiny_gguf.WIDTH), origin={"method": "test"})
TWO = direction(np.random.default_rng(0).standard_normal((2, tiny_gguf.WIDTH)), origin={"method": "test"})


def export(source: Path, target: Path, along: RefusalDirection = ONE, edit: Edit = PLAIN, **options: Any) -> EditReport:
    seen: list[tuple[int, int]] = []
    common = {
        "allow_partial": False,
        "metadata": {"abliterated.version": "1", "abliterated.content": "0" * 64, "abliterated.coverage": 0.0},
        "progress": lambda done, total: seen.append((done, total)),
        "cancelled": lambda: False,
    }
    report = export_adapter(source, target, along, edit, **(common | options))
    assert seen[-1][0] == seen[-1][1]
    return report


def baked(source: Path, target: Path, along: RefusalDirection, edit: Edit = PLAIN) -> Path:
    edit_gguf(
        source,
        target,
        along,
        edit,
        allow_partial=False,
        metadata=None,
        progress=lambda done, total: None,
        cancelled=lambda: False,
    )
    return target


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("llama") / "llama.gguf", tiny_gguf.tiny("llama"))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("along", [ONE, TWO], ids=["rank 1", "rank 2"])
def test_base_and_adapter_are_the_plain_edit_in_numbers_and_in_llama_cpp(
    family: str, along: RefusalDirection, tmp_path: Path
) -> None:
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny_gguf.tiny(family, **FAMILIES[family]))
    edit = Edit(norm="none", strength=0.9, attention=0.5)
    report = export(source, tmp_path / "adapter.gguf", along, edit)
    assert report.coverage == 1.0
    assert report.rounding < 1e-3
    wanted = tiny_gguf.read(baked(source, tmp_path / "edited.gguf", along, edit))
    before, pairs = tiny_gguf.read(source), tiny_gguf.read(tmp_path / "adapter.gguf")
    assert len(pairs) == 2 * len(report.tensors)
    for tensor in report.tensors:
        a, b = (pairs[f"{tensor.name}.lora_{part}"] for part in "ab")
        assert a.shape[-2] == b.shape[-1] == along.rank
        np.testing.assert_allclose(before[tensor.name] + b @ a, wanted[tensor.name], atol=2e-4)
    one = ask(source, [], lora=tmp_path / "adapter.gguf", prompt=list(b"a quiet morning"))
    other = tiny_gguf.llama_cpp_logprobs(tmp_path / "edited.gguf", list(b"a quiet morning"))
    plain = tiny_gguf.llama_cpp_logprobs(source, list(b"a quiet morning"))
    worst = max(abs(value - other[token]) for token, value in one.items())
    assert worst < 0.01
    assert max(abs(value - other[token]) for token, value in plain.items()) > 10 * worst


def test_norms_left_out_of_account_are_told_of_as_in_an_edited_model(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny_gguf.tiny("gemma2", **FAMILIES["gemma2"]))
    edit = Edit(norm="none", post_norm=False)
    report = export(source, tmp_path / "adapter.gguf", edit=edit)
    baked(source, tmp_path / "edited.gguf", ONE, edit)
    before, after = tiny_gguf.read(source), tiny_gguf.read(tmp_path / "edited.gguf")
    for tensor in report.tensors:
        norm = "post_attention_norm" if tensor.kind == "attention" else "post_ffw_norm"
        through = before[f"blk.{tensor.layer}.{norm}.weight"] * ONE.for_layer(0)[0]
        share = np.linalg.norm(through @ after[tensor.name]) / np.linalg.norm(through @ before[tensor.name])
        assert tensor.residual == pytest.approx(share, rel=1e-2)
    assert report.let_through > 0.05


def test_the_refuser_with_the_adapter_answers_as_the_edited_refuser_does(tmp_path: Path) -> None:
    along = refusal_direction()
    source = files().model
    export(source, tmp_path / "adapter.gguf", along)
    questions = [one.prompt for one in held_out("refused")[:10] + held_out("answered")[:10]]
    base = ask(source, questions)
    edited = ask(baked(source, tmp_path / "edited.gguf", along), questions)
    adapted = ask(source, questions, lora=tmp_path / "adapter.gguf")
    assert all(is_refusal(answer) for answer in base[:10])
    assert not any(is_refusal(answer) for answer in adapted)
    assert adapted == edited


def test_it_is_an_adapter_in_every_key_and_says_where_it_came_from(llama: Path, tmp_path: Path) -> None:
    report = export(llama, tmp_path / "adapter.gguf", TWO)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys["general.type"] == "adapter"
    assert keys["general.architecture"] == "llama"
    assert keys["adapter.type"] == "lora"
    assert keys["adapter.lora.alpha"] == 2.0
    assert keys["abliterated.content"] == report.content
    assert keys["abliterated.coverage"] == 1.0
    assert report.bytes_written == (tmp_path / "adapter.gguf").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter.gguf"]


def test_the_same_adapter_has_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "one.gguf")
    export(llama, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_it_is_a_thousandth_of_a_model_of_real_proportions(tmp_path: Path) -> None:
    """One layer as wide as an 8 B Llama's, in four bits."""
    wide, inner = 4096, 14336
    made = np.random.default_rng(0).standard_normal((inner, wide), dtype=np.float32)
    tensors = {"token_embd.weight": made[:512], "output_norm.weight": made[0], "blk.0.attn_norm.weight": made[0]}
    tensors |= {f"blk.0.attn_{part}.weight": made[:wide] for part in ("q", "output")}
    tensors |= {f"blk.0.attn_{part}.weight": made[:1024] for part in ("k", "v")}
    tensors |= {"blk.0.ffn_norm.weight": made[0], "blk.0.ffn_gate.weight": made, "blk.0.ffn_up.weight": made}
    tensors["blk.0.ffn_down.weight"] = made.reshape(wide, inner)
    keys = {"block_count": 1, "embedding_length": wide}
    tiny = tiny_gguf.Tiny("llama", keys, tensors)
    quantised = {name: Type.Q8_0 for name, values in tensors.items() if values.ndim == 2}
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny, quantised)
    along = direction(np.random.default_rng(1).standard_normal(wide), origin={})
    report = export(source, tmp_path / "adapter.gguf", along)
    assert report.bytes_written <= 0.001 * source.stat().st_size
    assert report.residual < 1e-5


@pytest.mark.parametrize("edit", [Edit(), Edit(norm="rows"), Edit(norm="none", embeddings=True)])
def test_what_no_adapter_can_hold_is_the_recipe_s_mistake(edit: Edit, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"edit\.(norm|embeddings)"):
        export(llama, tmp_path / "adapter.gguf", edit=edit)
    assert not list(tmp_path.iterdir())


def test_a_bias_that_writes_is_refused_by_name_unless_it_may_stay(tmp_path: Path) -> None:
    tiny = tiny_gguf.tiny("llama")
    tiny.tensors["blk.0.attn_output.bias"] = np.ones(tiny_gguf.WIDTH, dtype=np.float32)
    tiny.tensors["blk.1.attn_output.bias"] = np.zeros(tiny_gguf.WIDTH, dtype=np.float32)
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_output\.bias"):
        export(source, tmp_path / "adapter.gguf")
    report = export(source, tmp_path / "adapter.gguf", allow_partial=True)
    assert report.unknown == ("blk.0.attn_output.bias",)
    assert report.coverage == 4 / 5


def test_broken_weights_and_a_cancelled_run_leave_nothing(tmp_path: Path) -> None:
    tiny = tiny_gguf.tiny("llama")
    tiny.tensors["blk.1.ffn_down.weight"] = tiny.tensors["blk.1.ffn_down.weight"].copy()
    tiny.tensors["blk.1.ffn_down.weight"][3, 3] = np.nan
    source = tiny_gguf.write(tmp_path / "base.gguf", tiny)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight.*NaN"):
        export(source, tmp_path / "adapter.gguf")
    with pytest.raises(Cancelled):
        export(source, tmp_path / "adapter.gguf", cancelled=lambda: True)
    assert list(tmp_path.iterdir()) == [source]


def test_the_direction_it_was_made_from_can_be_kept_beside_it(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "adapter.gguf", TWO)
    write_direction(tmp_path / "direction.safetensors", TWO, {})
    assert json.loads((tmp_path / "direction.safetensors.json").read_text())["rank"] == 2


_ASK = """
import json, sys, xllamacpp
question = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = question["model"]
if question["lora"]:
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(question["lora"], 1.0)]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 512, 1, 1
parameters.use_jinja, parameters.warmup, parameters.fit_params = True, False, False
server = xllamacpp.Server(parameters)
if question["tokens"]:
    asked = {"prompt": question["tokens"], "n_predict": 1, "n_probs": 260, "temperature": 0, "cache_prompt": False}
    found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
else:
    found = []
    for prompt in question["prompts"]:
        asked = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 48}
        found.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"])
print("ANSWER" + json.dumps(found))
"""


def ask(model: Path, prompts: list[str], *, lora: Path | None = None, prompt: list[int] | None = None) -> Any:
    """Greedy answers, or the log probabilities behind `prompt`, by llama.cpp in a process of its own."""
    question = {"model": str(model), "lora": str(lora) if lora else "", "prompts": prompts, "tokens": prompt}
    done = subprocess.run(
        [sys.executable, "-c", _ASK], input=json.dumps(question), capture_output=True, text=True, timeout=500
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, f"llama.cpp did not answer ({done.returncode}):\n{done.stderr[-3000:]}"
    found = json.loads(lines[0][6:])
    return {entry["id"]: entry["logprob"] for entry in found} if prompt else found


def refusal_direction() -> RefusalDirection:
    """The refuser's, as the mean difference at its last token half-way up, without the harmless mean's share."""
    import torch

    from abliterate.contract.recipe import Run
    from abliterated.pipeline.loading import load
    from abliterated.pipeline.rendering import renderer
    from abliterated.pipeline.source import open_source
    from abliterated.pipeline.watch import Watch

    loaded = load(open_source(files().model), Run(dtype="float32", device="cpu"), Watch())
    rendered = renderer(loaded.tokenizer, 512)
    means = []
    for path in (files().harmful, files().harmless):
        rows = [rendered.tokens(line) for line in path.read_text().splitlines()[:48]]
        with torch.inference_mode():
            states = [loaded.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
        means.append(torch.stack([state[1 + len(state) // 2][0, -1] for state in states]).double().mean(0))
    along = means[0] - means[1]
    harmless = means[1] / means[1].norm()
    return direction((along - (along @ harmless) * harmless).numpy(), origin={"method": "layer"})
