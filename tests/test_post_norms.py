"""Norms behind what writes to the residual stream: found, and reckoned with by ablation and dropping."""

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForCausalLM

from helpers import same_bits, tiny_llama, weights, word_tokenizer
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.dropping import Dropping
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.post_norms import left_along, post_norms
from holdfast.residual import writers
from methods import HYBRIDS, bloom, gemma2, gpt2, mixtral, olmo2, qwen2, qwen2_moe, shaken

HARMFUL, HARMLESS = ["t5 t6 t7", "t8", "t9 t60", "t64 t6"], ["t40 t41", "t42 t43", "t46"]
ATTACKER = Attacker(ChatFormat(word_tokenizer()), HARMFUL, harmless_prompts=HARMLESS)
IDS = torch.tensor([[5, 6, 7, 8]])
BEHIND = {"self_attn.o_proj.weight": "post_attention_layernorm", "mlp.down_proj.weight": "post_feedforward_layernorm"}


def layers(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def streams(model):
    """What the first layer is given and every layer hands on."""
    seen = []
    hooks = [layers(model)[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
    hooks += [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers(model)
    ]
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def parts(model, layer):
    """What attention and MLP of a layer add to the stream, each behind its norm."""
    seen = {}
    norms = {name: getattr(layers(model)[layer], name) for name in BEHIND.values()}
    hooks = [m.register_forward_hook(lambda _, __, out, n=n: seen.update({n: out})) for n, m in norms.items()]
    streams(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("build", "offset"), [(gemma2, 1.0), (olmo2, 0.0)], ids=["gemma2", "olmo2"])
def test_norms_are_found_with_their_gain(build, offset):
    model, before = build(), weights(build())
    found = post_norms(model, writers(model))
    assert same_bits(weights(model), before)
    expected = {
        f"model.layers.{number}.{writer}": f"model.layers.{number}.{norm}"
        for number in range(2)
        for writer, norm in BEHIND.items()
    }
    assert {name: norm.path for name, norm in found.items()} == expected
    for norm in found.values():
        assert (norm.centred, norm.offset) == (False, offset)
        assert torch.allclose(norm.gain, before[f"{norm.path}.weight"] + offset, atol=1e-4)


@pytest.mark.parametrize(
    "build", [tiny_llama, qwen2, gpt2, mixtral, qwen2_moe, *(build for build, _ in HYBRIDS.values())]
)
def test_others_have_none(build):
    model = build()
    assert post_norms(model, writers(model)) == {}


def test_embeddings_may_have_one():
    model = bloom()
    [(name, norm)] = post_norms(model, writers(model)).items()
    assert (name, norm.path) == ("transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm")
    assert norm.centred
    assert torch.equal(norm.gain, weights(bloom())[f"{norm.path}.weight"])


@pytest.mark.parametrize("build", [gemma2, olmo2, bloom])
@pytest.mark.parametrize("rank", [1, 2])
def test_after_ablation_the_stream_has_no_part_along_the_directions(build, rank):
    """From the embeddings on, at every token, though norms stand between."""
    attack, model = Ablation(layer=0, rank=rank), build()
    left = []
    for prompts in (HARMFUL, HARMLESS):
        rows = []
        for prompt in prompts:
            seen = []
            hook = layers(model)[0].register_forward_hook(
                lambda _, __, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[int(word[1:]) for word in prompt.split()]]))
            hook.remove()
            rows += seen
        left.append(torch.stack(rows))
    rows = left[0] - left[1].mean(0)
    directions = nn.functional.normalize(rows.mean(0), dim=0)[None]
    if rank == 2:
        rest = rows - (rows @ directions[0])[:, None] * directions
        directions = torch.cat([directions, torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -1:].T])
    before = streams(build()) @ directions.T
    after = streams(attack(build(), ATTACKER).model)
    assert (after @ directions.T).abs().max() < 1e-4 * after.abs().max()
    assert before.abs().max() > 0.1


@pytest.mark.parametrize("build", [gemma2, olmo2])
def test_a_matrix_behind_a_norm_changes_as_little_as_it_has_to(build):
    """W ← W − s·q qᵀW, q along g ⊙ r."""
    model = build()
    norms = post_norms(model, writers(model))
    r = nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    for norm in norms.values():
        q = nn.functional.normalize(norm.gain * r, dim=0)
        [found] = norm.before(r[None])
        assert torch.allclose(torch.outer(found, found), torch.outer(q, q), atol=1e-5)


@pytest.mark.parametrize("build", [gemma2, olmo2])
@pytest.mark.parametrize("amount", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("part", ["both", "mlp"])
def test_a_dropped_layer_writes_less_behind_its_norms(build, amount, part):
    model = build()
    before = parts(model, 0)
    after = parts(Dropping(layer=0, part=part, amount=amount)(build(), ATTACKER).model, 0)
    attention, mlp = BEHIND.values()
    assert torch.allclose(after[attention], (1 - amount if part == "both" else 1) * before[attention], atol=1e-5)
    if part == "mlp":  # what it is given has not changed
        assert torch.allclose(after[mlp], (1 - amount) * before[mlp], atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [tiny_llama, qwen2, gpt2, mixtral, qwen2_moe, gemma2, olmo2, bloom, *(build for build, _ in HYBRIDS.values())],
)
def test_nothing_else_writes_to_the_stream(build, caplog):
    model, before = build(), weights(build())
    found = writers(model)
    assert left_along(model, found, post_norms(model, found)) < 1e-4
    assert same_bits(weights(model), before)
    unknown = [writer for writer in found if writer.layer != 0]
    assert left_along(model, unknown, post_norms(model, found)) > 0.05
    Ablation()(model, ATTACKER)
    assert "stays in the residual stream" not in caplog.text


def test_a_stream_that_is_not_only_added_to_is_told_of(caplog):
    """BART normalises it in every layer; what is left is that of the ablated model."""
    shape = {"vocab_size": 97, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    model = shaken(BartForCausalLM(BartConfig(**shape, is_decoder=True, pad_token_id=0)))
    found = writers(model)
    assert left_along(model, found, post_norms(model, found)) > 0.25
    Ablation()(model, ATTACKER)
    assert "of a direction stays in the residual stream of a BartForCausalLM when it is taken out of all" in caplog.text


def test_a_norm_of_another_kind_is_refused():
    class OddNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.weight * x.tanh()

    model = olmo2()
    model.model.layers[1].post_attention_layernorm = OddNorm()
    with pytest.raises(InputError, match=r"an? OddNorm, stands between .* neither an RMS norm nor a LayerNorm"):
        Ablation()(model, ATTACKER)
    assert weights(model)


def test_a_norm_without_weights_undoes_what_is_scaled_before_it():
    class BareNorm(nn.Module):
        def forward(self, x):
            return nn.functional.rms_norm(x, [16])

    model = olmo2()
    model.model.layers[1].post_attention_layernorm = BareNorm()
    with pytest.raises(
        InputError, match=r"a norm without weights, stands behind what is to be scaled; expected --amount 1"
    ):
        Dropping(amount=0.5)(model, ATTACKER)
    Dropping(amount=1.0)(model, ATTACKER)
