"""Checkpoints as the hub has them: what lies in them beside the model that transformers builds, and the switches and
quantisations under which an edit of writers would not be what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.contract.errors import ModelError
from abliterate.contract.recipe import Edit
from abliterated.pipeline.checkpoint_writers import checkpoint_census
from abliterated.pipeline.edit import seen_through_norms
from abliterated.pipeline.run import run
from pipeline import architectures
from pipeline.folders import listed, planted_folder, task
from pipeline.test_checkpoint import DIRECTION, edit, movement, saved

WIDTH = 1024


def shapes(layers: int = 2, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A plain decoder's tensors, and others: `__` for a point."""
    found = {"model.embed_tokens.weight": (99, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        found |= {
            f"{block}input_layernorm.weight": (WIDTH,), f"{block}self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{block}self_attn.o_proj.weight": (WIDTH, WIDTH), f"{block}mlp.up_proj.weight": (2 * WIDTH, WIDTH),
            f"{block}mlp.down_proj.weight": (WIDTH, 2 * WIDTH),
        }  # fmt: skip
    return found | {name.replace("__", "."): shape for name, shape in more.items()}


def census(family: str, tensors: dict[str, tuple[int, ...]], **more: Any) -> list[str]:
    config = {"model_type": family, "hidden_size": WIDTH, "num_hidden_layers": 2, **more}
    return [writer.name for writer in checkpoint_census(config, tensors).census.writers]


def test_a_causal_mask_as_wide_as_the_stream_writes_nothing() -> None:
    """GPT-2 medium is 1024 wide and its context 1024 long, Pythia 1B 2048 and 2048."""
    block = "gpt_neox.layers.0.attention."
    tensors = {
        "gpt_neox.embed_in.weight": (99, WIDTH), f"{block}bias": (1, 1, WIDTH, WIDTH), f"{block}masked_bias": (),
        f"{block}query_key_value.weight": (3 * WIDTH, WIDTH), f"{block}dense.weight": (WIDTH, WIDTH),
        f"{block}dense.bias": (WIDTH,), "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (WIDTH, 64),
    }  # fmt: skip
    found = census("gpt_neox", tensors, num_hidden_layers=1)
    assert found == [f"{block}dense.weight", f"{block}dense.bias", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"]
    masked = {"h.0.attn.bias": (1, 1, WIDTH, WIDTH), "h.0.attn.c_proj.weight": (WIDTH, WIDTH)}
    assert census("gpt2", masked, num_hidden_layers=1) == ["h.0.attn.c_proj.weight"]


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_the_layer_that_guesses_tokens_further_on_is_edited_like_the_last(family: str) -> None:
    ahead = "model.layers.2."
    more = {
        f"{ahead}embed_tokens.weight": (99, WIDTH), f"{ahead}enorm.weight": (WIDTH,), f"{ahead}hnorm.weight": (WIDTH,),
        f"{ahead}eh_proj.weight": (WIDTH, 2 * WIDTH), f"{ahead}shared_head.norm.weight": (WIDTH,),
        f"{ahead}shared_head.head.weight": (99, WIDTH),
    }  # fmt: skip
    found = census(family, shapes(3) | more)
    assert found[-2:] == [f"{ahead}self_attn.o_proj.weight", f"{ahead}mlp.down_proj.weight"]
    assert len(found) == 6
    with pytest.raises(ModelError, match=r"layers\.1\.eh_proj\.weight"):
        census(family, shapes() | {"model.layers.1.eh_proj.weight": (WIDTH, 2 * WIDTH)})


def test_ernies_guessing_block_stands_beside_the_model() -> None:
    more = {"model.mtp_block.0.mlp.down_proj.weight": (WIDTH, 64), "model.mtp_linear_proj.0.weight": (WIDTH, 2 * WIDTH)}
    assert len(census("ernie4_5_moe", shapes() | more)) == 4


@pytest.mark.parametrize(
    ("family", "switch"),
    [("opt", {"do_layer_norm_before": False}), ("bloom", {"apply_residual_connection_post_layernorm": True})],
)
def test_a_switch_that_norms_the_stream_itself_is_refused(
    family: str, switch: dict[str, bool], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT 350M: every writer could be edited, and three quarters of the movement would stay."""
    monkeypatch.setitem(architectures.SPECIAL, family, architectures.SPECIAL[family] | switch)
    saved(family, tmp_path / "base")
    with pytest.raises(ModelError, match=rf"{family} can't be edited with {next(iter(switch))} = .*its norms act on"):
        edit(tmp_path / "base", tmp_path / "edited")
    assert listed(tmp_path) == ["base"]


def test_a_quantised_checkpoint_is_told_from_an_unknown_architecture() -> None:
    quantised = shapes() | {"model.layers.0.mlp.experts.down_proj_blocks": (4, WIDTH, 90, 16)}
    with pytest.raises(ModelError, match=r"gpt_oss is quantised \(mxfp4\): .*down_proj_blocks") as error:
        census("gpt_oss", quantised, quantization_config={"quant_method": "mxfp4"})
    assert "BF16 or F16 weights, or its GGUF" in error.value.remedy
    assert len(census("bitnet", shapes())) == 4
    with pytest.raises(ModelError, match=r"bitnet is quantised \(bitnet\): its weights are rounded to three values"):
        census("bitnet", shapes(), quantization_config={"quant_method": "bitnet"})


def test_writers_in_eight_bits_are_found_before_anything_is_measured(tmp_path: Any) -> None:
    planted = planted_folder(tmp_path)
    file = planted.path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    stages = []
    with pytest.raises(ModelError, match="holds F8_E4M3"):
        run(task(planted, export={"format": "safetensors"}), lambda progress: stages.append(progress.stage), bool)
    assert set(stages) <= {"load"}


def test_a_norm_behind_the_embedding_is_heeded_with_its_bias(tmp_path: Any) -> None:
    """BLOOM's: the stream that enters the first layer has nothing of the direction."""
    saved("bloom", tmp_path / "base")
    report = edit(tmp_path / "base", tmp_path / "edited", what=Edit(embeddings=True))
    embedding = [tensor.name for tensor in report.tensors if tensor.kind == "embedding"]
    stem = "transformer.word_embeddings"
    assert embedding == [f"{stem}.weight", f"{stem}_layernorm.bias"]
    tensors = {name: value.numpy() for name, value in load_file(tmp_path / "edited" / "model.safetensors").items()}
    vector = DIRECTION.for_layer(0)
    seen = seen_through_norms(vector, (tensors[f"{stem}_layernorm.weight"],), centred=True)
    assert abs(tensors[f"{stem}.weight"] @ seen.T).max() < 1e-5
    assert abs(tensors[f"{stem}_layernorm.bias"] @ vector.T).max() < 1e-5
    assert (movement(tmp_path / "edited") <= 1e-5 * movement(tmp_path / "base")).all()


def test_experts_stored_turned_are_known_where_no_shape_tells(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss's are as wide as its stream: 2880 and 2880."""
    square = architectures.SPECIAL["gpt_oss"] | {"intermediate_size": architectures.WIDTH}
    monkeypatch.setitem(architectures.SPECIAL, "gpt_oss", square)
    saved("gpt_oss", tmp_path / "base")
    assert edit(tmp_path / "base", tmp_path / "edited").coverage == 1.0
    assert (movement(tmp_path / "edited") <= 1e-5 * movement(tmp_path / "base")).all()
