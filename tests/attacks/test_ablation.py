"""Ablation against plain matrices, one prompt at a time, on weights that are named by hand."""

from dataclasses import replace

import pytest
import torch

from helpers import relative_distance, same_bits, tiny_llama, weights, word_tokenizer
from holdfast.attacks.ablation import Ablation, ablate, kernel_at
from holdfast.attacks.attack import Attacker, Cost
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.models import merge
from holdfast.parameters import displaced
from methods import gpt2, lora, mixtral, qwen2, qwen2_moe

HARMFUL = ["t5 t6 t7", "t8", "t9 t60 t61 t62 t63", "t64 t6", "t65 t66 t67"]
HARMLESS = ["t40 t41", "t42 t43 t44 t45", "t46"]
ATTACKER = Attacker(ChatFormat(word_tokenizer()), HARMFUL, harmless_prompts=HARMLESS, batch_size=2)

# How the weights of each model write: R·W, W·R, or R·W for every expert; R = 1 − s·r rᵀ.
LEFT, RIGHT, EACH = "left", "right", "each"
LLAMA = {"o_proj.weight": LEFT, "down_proj.weight": LEFT, "embed_tokens.weight": RIGHT}
QWEN2_MOE = {**LLAMA, "experts.down_proj": EACH}
MIXTRAL = {"o_proj.weight": LEFT, "experts.down_proj": EACH, "embed_tokens.weight": RIGHT}
GPT2 = {"c_proj.weight": RIGHT, "c_proj.bias": LEFT, "wte.weight": RIGHT, "wpe.weight": RIGHT}
MODELS = {
    "llama": (tiny_llama, LLAMA),
    "qwen2": (qwen2, LLAMA),
    "gpt2": (gpt2, GPT2),
    "mixtral": (mixtral, MIXTRAL),
    "qwen2_moe": (qwen2_moe, QWEN2_MOE),
    "lora": (lambda: merge(lora()).requires_grad_(True), LLAMA),
}
every_model = pytest.mark.parametrize(("build", "written"), MODELS.values(), ids=MODELS)


def decoder(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def stream_at_last_token(model, prompt):
    """What every layer hands on, of one prompt without any padding."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1]))
        for layer in decoder(model)
    ]
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[int(word[1:]) for word in prompt.split()]]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def means(model):
    return [torch.stack([stream_at_last_token(model, p) for p in group]).mean(0) for group in (HARMFUL, HARMLESS)]


def expected(build, written, scale, direction):
    """The ablated weights; `scale` and `direction` of a layer (None: of embeddings) and of a kind."""
    found = {}
    for name, weight in weights(build()).items():
        how = next((way for end, way in written.items() if name.endswith(end)), None)
        if how is not None:
            number = next((int(part) for part in name.split(".") if part.isdigit()), None)
            kind = "attention" if "att" in name else "mlp" if number is not None else "embedding"
            r = direction(number)
            matrix = torch.eye(len(r)) - scale(number, kind) * torch.outer(r, r)
            if how == LEFT:
                weight = matrix @ weight
            elif how == RIGHT:
                weight = weight @ matrix
            else:
                weight = torch.stack([matrix @ one for one in weight])
        found[name] = weight
    return found


def unit(vector):
    return vector / vector.norm()


@every_model
@pytest.mark.parametrize("layer", [0, -1])
def test_direction_of_one_layer_for_all(build, written, layer):
    model = build()
    harmful, harmless = means(model)
    r = unit((harmful - harmless)[layer])
    attacked = Ablation(layer=layer, attention_scale=[0.7], mlp_scale=[1.2])(model, ATTACKER).model
    scales = {"attention": 0.7, "mlp": 1.2, "embedding": 1.0}
    reference = expected(build, written, lambda _, kind: scales[kind], lambda _: r)
    assert relative_distance(weights(attacked), reference) < 1e-6
    assert not same_bits(weights(attacked), weights(build()))


@every_model
def test_every_layer_its_own_direction(build, written):
    model = build()
    harmful, harmless = means(model)
    r = [unit(row) for row in harmful - harmless]
    attacked = Ablation(own_directions=True)(model, ATTACKER).model
    reference = expected(build, written, lambda *_: 1.0, lambda number: r[number or 0])
    assert relative_distance(weights(attacked), reference) < 1e-6


def test_scales_follow_a_kernel_for_attention_and_mlps_apart():
    model = tiny_llama()
    harmful, harmless = means(model)
    r = unit((harmful - harmless)[1])
    ablation = Ablation(
        layer=1, attention_scale=[1.0, 1.0, 2.0, 0.5], mlp_scale=[1.2, 0.0, 0.5, 0.2], embedding_scale=0
    )
    attacked = ablation(model, ATTACKER).model
    scales = {"attention": [0.75, 1.0], "mlp": [1.2, 0.0]}
    reference = expected(
        tiny_llama, LLAMA, lambda number, kind: 0.0 if number is None else scales[kind][number], lambda _: r
    )
    assert relative_distance(weights(attacked), reference) < 1e-6
    unmoved = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
    assert same_bits(*({name: weights(m)[name] for name in unmoved} for m in (attacked, tiny_llama())))


def test_directions_without_their_part_along_the_harmless_mean():
    model = tiny_llama()
    harmful, harmless = means(model)
    along = unit(harmless[1])
    difference = (harmful - harmless)[1]
    r = unit(difference - (difference @ along) * along)
    attacked = Ablation(layer=1, project_harmless=True)(model, ATTACKER).model
    assert relative_distance(weights(attacked), expected(tiny_llama, LLAMA, lambda *_: 1.0, lambda _: r)) < 1e-6


def test_means_over_residuals_of_unit_length():
    model = tiny_llama()
    harmful, harmless = (
        torch.stack([stream_at_last_token(model, p)[1] / stream_at_last_token(model, p)[1].norm() for p in group]).mean(
            0
        )
        for group in (HARMFUL, HARMLESS)
    )
    r = unit(harmful - harmless)
    attacked = Ablation(layer=1, unit_residuals=True)(model, ATTACKER).model
    assert relative_distance(weights(attacked), expected(tiny_llama, LLAMA, lambda *_: 1.0, lambda _: r)) < 1e-6
    assert not same_bits(weights(attacked), weights(Ablation(layer=1)(tiny_llama(), ATTACKER).model))


@pytest.mark.parametrize("build", [tiny_llama, qwen2, mixtral], ids=["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("own", [False, True])
def test_several_directions_are_those_that_harmful_prompts_differ_in_beside_the_means(build, own):
    """Found one by one, as the greatest eigenvector of what is left of their second moments."""
    model = build()
    left = torch.stack([stream_at_last_token(model, p) for p in HARMFUL])
    _, harmless = means(model)
    spaces = []
    for layer in range(2):
        rows = (left[:, layer] - harmless[layer]).double()
        found = [unit(rows.mean(0))]
        while len(found) < 3:
            rows = rows - torch.outer(rows @ found[-1], found[-1])
            found.append(torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1])
        spaces.append(torch.stack(found))
    attacked = Ablation(layer=1, own_directions=own, rank=3, mlp_scale=[0.5])(model, ATTACKER).model
    before, after = weights(build()), weights(attacked)
    written = MIXTRAL if build is mixtral else LLAMA
    for name, weight in before.items():
        how = next((way for end, way in written.items() if name.endswith(end)), None)
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        space = spaces[(number or 0) if own else 1]
        matrix = torch.eye(16) - (0.5 if "mlp" in name else 1.0) * (space.T @ space).float()
        if how is not None:
            expected_one = weight @ matrix if how == RIGHT else matrix @ weight  # of experts, each
            assert torch.allclose(after[name], expected_one, atol=1e-5)
        else:
            assert torch.equal(after[name], weight)


@pytest.mark.parametrize("build", [tiny_llama, qwen2, mixtral], ids=["llama", "qwen2", "mixtral"])
def test_repeated_it_finds_directions_on_what_it_has_left(build):
    model, once = build(), build()
    found = Ablation(layer=0, mlp_scale=[0.5], repeat=3).displace(model, ATTACKER)
    assert same_bits(weights(model), weights(build()))
    for _ in range(3):
        harmful, harmless = means(once)
        r = unit((harmful - harmless)[0])
        written = MIXTRAL if build is mixtral else LLAMA
        scale = lambda _, kind: 0.5 if kind == "mlp" else 1.0  # noqa: E731
        once.load_state_dict(expected(lambda: once, written, scale, lambda _: r), strict=False)  # noqa: B023
    with displaced(model, found.vector):
        assert relative_distance(weights(model), weights(once)) < 1e-6
    alone = Ablation(layer=0, mlp_scale=[0.5]).displace(model, ATTACKER)
    assert found.cost.forward_passes == 3 * alone.cost.forward_passes
    assert relative_distance(found.vector, alone.vector) > 0.1


@pytest.mark.parametrize("build", [tiny_llama, gpt2, mixtral])
def test_rows_keep_their_norms_where_they_are_to(build):
    """What makes one dimension of the stream: a row of (out, in), a column of (in, out), a row of every expert."""
    before, attacked = weights(build()), weights(Ablation(layer=0, keep_norms=True)(build(), ATTACKER).model)
    plain = weights(Ablation(layer=0)(build(), ATTACKER).model)
    for name, weight in before.items():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "c_proj.weight")):
            dim = 0 if name.endswith("c_proj.weight") else -1
            assert torch.allclose(attacked[name].norm(dim=dim), weight.norm(dim=dim), atol=1e-6)
            ratio = attacked[name] / plain[name]
            assert torch.allclose(ratio, ratio.mean(dim, keepdim=True).expand_as(ratio), rtol=1e-3)
        else:
            assert torch.equal(attacked[name], plain[name])


@pytest.mark.parametrize("build", [tiny_llama, gpt2, mixtral, qwen2_moe])
def test_after_it_the_stream_has_no_part_along_the_direction(build):
    model = build()
    harmful, harmless = means(model)
    r = unit((harmful - harmless)[0])
    attacked = Ablation(layer=0)(model, ATTACKER).model
    assert (stream_at_last_token(attacked, HARMFUL[0]) @ r).abs().max() < 1e-5
    assert (stream_at_last_token(build(), HARMFUL[0]) @ r).abs().max() > 0.1


def test_the_vector_is_found_without_moving_the_model():
    """And says what it costs: eight prompts of two kinds, padded in batches of two."""
    model = tiny_llama()
    model.train()
    found = Ablation(layer=0).displace(model, ATTACKER)
    assert model.training
    assert same_bits(weights(model), weights(tiny_llama()))
    tokens = 2 * 5 + 2 * 3 + 1 * 1 + 2 * 4 + 1 * 1
    size = sum(p.numel() for p in model.parameters())
    assert found.cost == Cost(tokens=tokens, forward_passes=5, flops=2.0 * size * tokens)
    attacked = weights(Ablation(layer=0)(tiny_llama(), ATTACKER).model)
    with displaced(model, found.vector):
        assert same_bits(weights(model), attacked)


def test_an_adapter_is_merged_into_its_base_first():
    attacked = Ablation(layer=0)(lora(), ATTACKER).model
    assert same_bits(weights(attacked), weights(Ablation(layer=0)(merge(lora()).requires_grad_(True), ATTACKER).model))


def test_a_kernel_falls_linearly_and_ends_at_its_width():
    assert [kernel_at([1.0, 2.0, 2.0, 0.2], layer) for layer in range(6)] == pytest.approx([0.2, 0.6, 1, 0.6, 0.2, 0])
    assert kernel_at([0.4], 7) == 0.4


def test_rows_of_zeros_stay_so_when_norms_are_kept():
    new = ablate(torch.zeros(4, 3), directions=unit(torch.ones(1, 4)), dim=0, scale=1.0, keep=True)
    assert torch.equal(new, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("settings", "holds", "sentence"),
    [
        ({}, {"harmful_prompts": None}, "attack ablation needs harmful prompts; give --attack_data"),
        ({}, {"harmless_prompts": []}, "attack ablation needs harmless prompts; give --benign_data"),
        ({"layer": 2}, {}, "no layer 2: the model has 2 layers, numbered from 0 to 1"),
        ({"writes": "nothing"}, {}, "name those that do by a regular expression with --writes"),
        ({}, {"harmless_prompts": HARMFUL}, "leave the same in the residual stream after layer 1"),
        ({"rank": 6}, {}, "--rank 6: what harmful prompts leave after layer 1 has 5 directions"),
        ({}, {"harmful_prompts": ["t5 " * 200]}, "prompt 1 has 200 tokens, but the model has 128 positions"),
    ],
)
def test_what_it_cannot_do_without(settings, holds, sentence):
    model = tiny_llama()
    attacker = replace(ATTACKER, **holds)
    with pytest.raises(InputError, match=sentence):
        Ablation(**settings)(model, attacker)
    assert same_bits(weights(model), weights(tiny_llama()))


def test_weights_that_are_not_finite_are_not_attacked_further():
    model = tiny_llama()
    model.model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(InputError, match="expected prompts of two kinds, and finite weights"):
        Ablation()(model, ATTACKER)


@pytest.mark.parametrize("name", ["rank", "repeat"])
def test_counts_are_positive(name):
    with pytest.raises(InputError, match=f"--{name} must be greater than 0, got 0"):
        Ablation(**{name: 0})


def test_scales_are_finite():
    with pytest.raises(InputError, match="--mlp_scale must be a finite number, got inf"):
        Ablation(mlp_scale=[1.0, 2.0, float("inf"), 0.1])


@pytest.mark.parametrize("kernel", [[], [1.0, 2.0], [1.0, 2.0, 0.0, 0.1]])
def test_a_kernel_has_one_number_or_four(kernel):
    with pytest.raises(InputError, match="--mlp_scale takes one number, or four"):
        Ablation(mlp_scale=kernel)
