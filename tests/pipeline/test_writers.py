"""The census by GGUF names and shapes: what writes, through which norms, and what is refused."""

from __future__ import annotations

import pytest
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from abliterate.contract.errors import ModelError
from abliterated.pipeline.writers import gguf_census

WIDTH, INNER = 96, 160

# What writes, of all the names llama.cpp gives tensors.
WRITERS = {
    "attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps", "ffn_latent_up", "ssm_out",
    "shortconv.out_proj", "time_mix_output", "channel_mix_value", "vis_attn_output", "vis_down", "proj",
}  # fmt: skip


def llama(layers=2, **more):
    shapes = {"token_embd.weight": (100, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (100, WIDTH)}
    for layer in range(layers):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_norm.weight": (WIDTH,), f"{block}attn_q.weight": (WIDTH, WIDTH),
            f"{block}attn_output.weight": (WIDTH, WIDTH), f"{block}ffn_norm.weight": (WIDTH,),
            f"{block}ffn_up.weight": (INNER, WIDTH), f"{block}ffn_gate.weight": (INNER, WIDTH),
            f"{block}ffn_down.weight": (WIDTH, INNER),
        }  # fmt: skip
    for name, shape in more.items():
        shapes[name.replace("__", ".")] = shape
    return shapes


def names(census):
    return [writer.name for writer in census.writers]


def test_a_dense_model_has_two_writers_a_block():
    census = gguf_census("llama", WIDTH, 2, llama())
    assert names(census) == [f"blk.{n}.{part}.weight" for n in (0, 1) for part in ("attn_output", "ffn_down")]
    assert [writer.kind for writer in census.writers[:2]] == ["attention", "mlp"]
    assert not any(writer.gains for writer in census.writers)


def _shape(stem):
    if stem.endswith("norm") or "norm_" in stem:
        return (WIDTH,)
    if stem.endswith("_scale"):
        return (1,)
    if stem == "blk.0.ffn":  # MPT's activation scales
        return (INNER,)
    matrix = (WIDTH, INNER) if stem.rpartition("blk.0.")[2] in WRITERS else (INNER, WIDTH)
    return (4, *matrix) if stem.endswith(("_exps", "_chexps")) else matrix


@pytest.mark.parametrize("architecture", MODEL_TENSORS, ids=lambda architecture: MODEL_ARCH_NAMES[architecture])
def test_every_architecture_llama_cpp_names_is_placed_whole_or_refused(architecture):
    """Each of its tensors has a role; what is known to write is found, and nothing else is taken for a writer."""
    name = MODEL_ARCH_NAMES[architecture]
    stems = [TENSOR_NAMES[tensor].format(bid=0) for tensor in MODEL_TENSORS[architecture]]
    stems = [stem for stem in stems if not stem.startswith(("v.", "mm.", "a."))]
    shapes = {f"{stem}.weight": _shape(stem) for stem in stems}
    expected = {f"{stem}.weight" for stem in stems if stem.removeprefix("blk.0.") in WRITERS}
    try:
        census = gguf_census(name, WIDTH, 1, shapes)
    except ModelError as error:
        assert name in {
            "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
            "eurobert", "gemma-embedding", "llama-embed", "clip", "t5", "t5encoder", "wavtokenizer-dec", "gemma3n",
            "rwkv6", "rwkv6qwen2", "arwkv7",
        }, error  # fmt: skip
        return
    assert set(names(census)) == expected


def test_experts_shared_experts_biases_and_mixers_are_writers():
    more = {
        "blk__0__ffn_down_exps__weight": (4, WIDTH, 32), "blk__0__ffn_down_exps__bias": (4, WIDTH),
        "blk__0__ffn_down_shexp__weight": (WIDTH, 48), "blk__1__ssm_out__weight": (WIDTH, 64),
        "blk__1__shortconv__out_proj__weight": (WIDTH, WIDTH), "blk__1__attn_output__bias": (WIDTH,),
    }  # fmt: skip
    found = {writer.name: writer for writer in gguf_census("anything", WIDTH, 2, llama(**more)).writers}
    assert len(found) == 4 + len(more)
    assert found["blk.0.ffn_down_exps.bias"].bias
    assert found["blk.1.ssm_out.weight"].kind == "attention"


def test_a_post_norm_is_one_only_where_another_norm_stands_before_the_mlp():
    shapes = llama(blk__0__post_attention_norm__weight=(WIDTH,), blk__0__post_ffw_norm__weight=(WIDTH,))
    found = {writer.name: writer.gains for writer in gguf_census("gemma2", WIDTH, 2, shapes).writers}
    assert found["blk.0.attn_output.weight"] == ("blk.0.post_attention_norm.weight",)
    assert found["blk.0.ffn_down.weight"] == ("blk.0.post_ffw_norm.weight",)
    assert found["blk.1.ffn_down.weight"] == ()
    before_mlp = llama(1, blk__0__post_attention_norm__weight=(WIDTH,))
    del before_mlp["blk.0.ffn_norm.weight"]
    assert not gguf_census("gpt-oss", WIDTH, 1, before_mlp).writers[0].gains
    off = gguf_census("gemma2", WIDTH, 2, shapes, post_norm=False)
    assert [writer.unheeded for writer in off.writers] == [True, True, False, False]


def test_a_norm_behind_the_embedding_is_heeded_with_its_bias():
    """BLOOM's; only where the embedding is edited at all."""
    shapes = llama(token_embd_norm__weight=(WIDTH,), token_embd_norm__bias=(WIDTH,))
    found = {writer.name: writer for writer in gguf_census("bloom", WIDTH, 2, shapes, embeddings=True).writers}
    assert found["token_embd.weight"].gains == ("token_embd_norm.weight",)
    assert found["token_embd.weight"].centred
    assert (found["token_embd_norm.bias"].kind, found["token_embd_norm.bias"].bias) == ("embedding", True)
    assert len(gguf_census("bloom", WIDTH, 2, shapes).writers) == 4


def test_nested_gains_are_composed_and_a_layer_norm_is_centred():
    shapes = llama(
        1,
        blk__0__post_ffw_norm__weight=(WIDTH,),
        blk__0__post_ffw_norm_1__weight=(WIDTH,),
        blk__0__post_ffw_norm_2__weight=(WIDTH,),
        blk__0__post_ffw_norm__bias=(WIDTH,),
        blk__0__ffn_down_exps__weight=(4, WIDTH, 32),
    )
    found = {writer.name: writer for writer in gguf_census("gemma4", WIDTH, 1, shapes).writers}
    assert found["blk.0.ffn_down.weight"].gains == ("blk.0.post_ffw_norm.weight", "blk.0.post_ffw_norm_1.weight")
    assert found["blk.0.ffn_down_exps.weight"].gains[1] == "blk.0.post_ffw_norm_2.weight"
    assert found["blk.0.ffn_down.weight"].centred
    assert found["blk.0.post_ffw_norm.bias"].bias


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.1.novel.weight", (WIDTH, 7)),
        ("blk.1.novel.weight", (7, WIDTH)),
        ("blk.1.novel_norm.weight", (WIDTH,)),
        ("novel_adapter.weight", (WIDTH, WIDTH)),
        ("blk.1.ffn_down_shexp.weight", (WIDTH + 1, 7)),
    ],
)
def test_what_cannot_be_placed_is_named(name, shape):
    shapes = llama() | {name: shape}
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        gguf_census("llama", WIDTH, 2, shapes)
    assert gguf_census("llama", WIDTH, 2, shapes, allow_partial=True).unknown == (name,)


def test_projectors_and_small_vectors_beside_the_model_are_left_alone():
    shapes = llama() | {
        "v.blk.0.attn_out.weight": (WIDTH, WIDTH), "mm.0.weight": (WIDTH, 50), "rope_freqs.weight": (16,),
        "blk.0.attn_output.scale": (1,), "blk.0.attn_sinks.weight": (4,),
    }  # fmt: skip
    assert len(gguf_census("llama", WIDTH, 2, shapes).writers) == 4


def test_a_block_that_is_missing_or_writes_nothing_is_an_error():
    with pytest.raises(ModelError, match="no block 2"):
        gguf_census("llama", WIDTH, 3, llama(2))
    idle = {name: shape for name, shape in llama(2).items() if name not in ("blk.1.ffn_down.weight",)}
    with pytest.raises(ModelError, match="block 1 has an MLP"):
        gguf_census("llama", WIDTH, 2, idle)


def test_latent_experts_do_not_write_to_the_stream():
    shapes = llama(blk__0__ffn_down_exps__weight=(4, 24, 32), blk__0__ffn_latent_up__weight=(WIDTH, 24))
    found = names(gguf_census("nemotron_h_moe", WIDTH, 2, shapes))
    assert "blk.0.ffn_latent_up.weight" in found
    assert "blk.0.ffn_down_exps.weight" not in found
