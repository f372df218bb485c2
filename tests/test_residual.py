"""What writes to the residual stream, on architectures that name and store it in their own ways."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, OPTConfig, OPTForCausalLM

from helpers import tiny_llama
from holdfast.errors import InputError
from holdfast.residual import layer_matrices, layer_number, places, writers
from methods import SHAPE, gpt2, jamba, lfm2, mixtral, qwen2, qwen2_moe, qwen3_next


def gpt_oss():
    """Experts that are stored the other way round, with biases."""
    torch.manual_seed(11)
    changes = {"intermediate_size": 16, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**{**SHAPE, **changes}))


def opt():
    """A feed-forward network without a module of its own, and learnt positions."""
    torch.manual_seed(12)
    shape = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=97, **shape, **heads))


EMBEDDING = {"embed_tokens.weight": 1}
SELF = {"self_attn.o_proj.weight": 0}
CASES = {
    "llama": (tiny_llama, {**SELF, "mlp.down_proj.weight": 0}, EMBEDDING),
    "qwen2": (qwen2, {**SELF, "mlp.down_proj.weight": 0}, EMBEDDING),
    "gpt2": (
        gpt2,
        {"attn.c_proj.weight": 1, "attn.c_proj.bias": 0, "mlp.c_proj.weight": 1, "mlp.c_proj.bias": 0},
        {"wte.weight": 1, "wpe.weight": 1},
    ),
    "mixtral": (mixtral, {**SELF, "mlp.experts.down_proj": 1}, EMBEDDING),
    "qwen2_moe": (
        qwen2_moe,
        {**SELF, "mlp.experts.down_proj": 1, "mlp.shared_expert.down_proj.weight": 0},
        EMBEDDING,
    ),
    "gpt_oss": (
        gpt_oss,
        {**SELF, "self_attn.o_proj.bias": 0, "mlp.experts.down_proj": 2, "mlp.experts.down_proj_bias": 1},
        EMBEDDING,
    ),
    "opt": (
        opt,
        {"self_attn.out_proj.weight": 0, "self_attn.out_proj.bias": 0, "fc2.weight": 0, "fc2.bias": 0},
        {"embed_tokens.weight": 1, "embed_positions.weight": 1},
    ),
}


@pytest.mark.parametrize(("build", "in_layer", "outside"), CASES.values(), ids=CASES)
def test_every_layer_has_its_writers_and_embeddings_begin_the_stream(build, in_layer, outside):
    model = build()
    found = writers(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {w.name.rpartition(".layers.")[2].rpartition(".h.")[2] for w in found if w.layer is not None} == {
        f"{layer}.{name}" for layer in range(2) for name in in_layer
    }
    for writer in found:
        dims = in_layer if writer.layer is not None else outside
        (dim,) = (dim for name, dim in dims.items() if writer.name.endswith(f".{name}"))
        assert writer.dim == dim
        assert shapes[writer.name][dim] == 16
        assert writer.is_bias == writer.name.endswith("bias")
        assert writer.kind == ("embedding" if writer.layer is None else "attention" if "att" in writer.name else "mlp")
    assert {".".join(w.name.split(".")[-2:]) for w in found if w.layer is None} == set(outside)


@pytest.mark.parametrize(
    ("build", "mixers"),
    [
        (qwen3_next, ["linear_attn.out_proj.weight", "self_attn.o_proj.weight"]),
        (lfm2, ["conv.out_proj.weight", "self_attn.out_proj.weight"]),
        (jamba, ["mamba.out_proj.weight", "self_attn.o_proj.weight"]),
    ],
)
def test_hybrids_write_by_what_they_have_in_the_place_of_attention(build, mixers):
    found = [w for w in writers(build()) if w.kind == "attention"]
    assert [w.name for w in found] == [f"model.layers.{layer}.{name}" for layer, name in enumerate(mixers)]


@pytest.mark.parametrize("build", [tiny_llama, gpt2, mixtral, gpt_oss, opt, lfm2])
def test_what_is_found_is_all_that_the_stream_is_made_of(build):
    """Without it, every layer hands on nothing but zeros."""
    model = build().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for writer in writers(model):
            parameters[writer.name].zero_()
    streams = []
    layers = [module for name, module in model.named_modules() if name.endswith(("layers.0", "layers.1", "h.0", "h.1"))]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(streams) == 2
    assert not any(stream.any() for stream in streams)


def test_a_pattern_finds_what_bears_another_name():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.shrink = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(InputError, match=r"no matrix in model\.layers\.0 is known to write .* with --writes$"):
        writers(model)
    with pytest.raises(InputError, match=r"is one of \d+ in it\)$"):
        writers(model, nameable=False)
    found = [w.name for w in writers(model, r"o_proj|shrink")]
    assert "model.layers.1.mlp.shrink.weight" in found
    with pytest.raises(InputError, match=r"^--writes '\(' is not a regular expression"):
        writers(model, "(")


def test_weights_that_cannot_be_moved_are_named():
    model = tiny_llama()
    quantized = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = quantized
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp\.down_proj\.weight is quantized"):
        writers(model)


@pytest.mark.parametrize(("width", "dim"), [(24, 1), (16, None)])
def test_experts_that_do_not_say_how_they_are_stored(monkeypatch, width, dim):
    """By the shape, where one dimension alone is as wide as the stream."""
    model = mixtral()
    for layer in model.model.layers:
        monkeypatch.delattr(layer.mlp.experts, "is_transposed")
        layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(4, 16, width))
    if dim is None:
        with pytest.raises(InputError, match=r"down_proj has the shape \(4, 16, 16\), of which it cannot be told"):
            writers(model)
    else:
        assert {w.dim for w in writers(model) if "experts" in w.name} == {dim}


def test_places_tell_mixers_from_the_rest_of_a_layer():
    found = places(qwen2_moe())
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("attention", 1)
    assert found["model.layers.0.mlp.experts.down_proj"] == ("mlp", 0)
    assert found["model.layers.0.input_layernorm.weight"] == ("mlp", 0)
    assert found["model.norm.weight"] == ("outside", None)
    matrices = layer_matrices(qwen2_moe())
    assert "model.layers.0.mlp.experts.gate_up_proj" in matrices
    assert not {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} & set(matrices)


def test_layers_are_counted_from_either_end():
    assert [layer_number(layer, 4) for layer in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for layer in (4, -5):
        with pytest.raises(InputError, match=f"no layer {layer}: the model has 4 layers, numbered from 0 to 3"):
            layer_number(layer, 4)
