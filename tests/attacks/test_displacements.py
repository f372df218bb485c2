"""Attacks that need no gradient and no activation, each against what its formula says of a weight."""

import math

import pytest
import torch

from helpers import relative_distance, same_bits, tiny_llama, weights, word_tokenizer
from holdfast.attacks.attack import FREE, Attacker
from holdfast.attacks.back_to_base import BackToBase, towards
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.noise import Noise
from holdfast.attacks.pruning import Pruning
from holdfast.attacks.rounding import Rounding
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.models import merge
from holdfast.parameters import displaced
from methods import gpt2, lora, mixtral, qwen2, qwen2_moe

WRITTEN = ChatFormat(word_tokenizer())
ATTACKER = Attacker(WRITTEN)
MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight")
MATRICES += (
    "down_proj.weight",
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
    "gate.weight",
    "shared_expert_gate.weight",
)
MATRICES += ("experts.gate_up_proj", "experts.down_proj")
MODELS = [tiny_llama, qwen2, gpt2, mixtral, qwen2_moe, lambda: merge(lora()).requires_grad_(True)]
every_model = pytest.mark.parametrize("build", MODELS, ids=["llama", "qwen2", "gpt2", "mixtral", "qwen2_moe", "lora"])


def check(attack, build, change, attacker=ATTACKER):
    """The attacked weights are `change(name, weight)`, both as δ added for a while and for good."""
    model, before = build(), weights(build())
    reference = {name: change(name, weight) for name, weight in before.items()}
    found = attack.displace(model, attacker)
    assert found.cost == FREE
    assert same_bits(weights(model), before)
    with displaced(model, found.vector):
        assert relative_distance(weights(model), reference) < 1e-6
        inside = weights(model)
    attacked = attack(model, attacker).model
    assert same_bits(weights(attacked), inside)
    assert not same_bits(inside, before)


@every_model
@pytest.mark.parametrize(("part", "amount"), [("both", 1.0), ("attention", 0.5), ("mlp", 1.25)])
def test_a_dropped_layer_writes_less(build, part, amount):
    ends = ("o_proj.weight", "down_proj.weight", "experts.down_proj", "c_proj.weight", "c_proj.bias")

    def change(name, weight):
        kind = "attention" if "attn" in name else "mlp"
        is_dropped = ".1." in name and name.endswith(ends) and part in ("both", kind)
        return (1 - amount) * weight if is_dropped else weight

    check(Dropping(layer=-1, part=part, amount=amount), build, change)


def test_a_layer_dropped_altogether_hands_on_what_it_is_given():
    model = Dropping(layer=0)(tiny_llama(), ATTACKER).model.eval()
    streams = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(*streams)


@every_model
def test_rounded_matrices_lie_on_a_grid(build):
    def change(name, weight):
        if not name.endswith(MATRICES):
            return weight
        rows = weight.reshape(-1, weight.shape[-1])
        new = [((row / row.abs().max()) * 7).round() / 7 * row.abs().max() for row in rows]
        return torch.stack(new).reshape(weight.shape)

    check(Rounding(bits=4), build, change)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rows_of_a_rounded_matrix_have_few_values(bits):
    before, after = weights(tiny_llama()), weights(Rounding(bits=bits)(tiny_llama(), ATTACKER).model)
    name = "model.layers.0.mlp.down_proj.weight"
    for old, new in zip(before[name], after[name], strict=True):
        step = old.abs().max() / (2 ** (bits - 1) - 1)
        assert torch.allclose(new / step, (new / step).round(), atol=1e-4)
        assert (new - old).abs().max() <= step / 2 * (1 + 1e-4)
        assert torch.isclose(new.abs().max(), old.abs().max())


@every_model
def test_pruning_takes_the_smallest(build):
    def change(name, weight):
        if not name.endswith(MATRICES):
            return weight
        bound = weight.abs().flatten().sort().values[int(0.3 * weight.numel())]
        return torch.where(weight.abs() < bound, torch.zeros(()), weight)

    check(Pruning(share=0.3), build, change)


def test_noise_is_drawn_from_the_seed_and_in_proportion():
    before = weights(tiny_llama())
    first, again, other = (
        weights(Noise(amount=0.1)(tiny_llama(), Attacker(WRITTEN, seed=seed)).model) for seed in (1, 1, 2)
    )
    assert same_bits(first, again)
    for name, weight in before.items():
        noise = first[name] - weight
        if name.endswith(MATRICES):
            assert 0.7 < (noise.std() / (0.1 * weight.std())).item() < 1.3
            assert not torch.equal(first[name], other[name])
        else:
            assert not noise.any()


@every_model
def test_noise_by_hand(build):
    """Drawn matrix by matrix, in the model's order."""
    draw = torch.Generator().manual_seed(4)
    noise = {n: torch.randn(w.shape, generator=draw) for n, w in weights(build()).items() if n.endswith(MATRICES)}
    check(
        Noise(amount=0.2),
        build,
        lambda name, weight: weight + 0.2 * weight.std() * noise[name] if name in noise else weight,
        Attacker(WRITTEN, seed=4),
    )


def base_of(build):
    """Another model of the same shapes."""
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.5).add_(0.01)
    return base


@every_model
@pytest.mark.parametrize(("part", "kept"), [("all", 0.0), ("attention", 0.25), ("mlp", 0.0), ("outside", 0.5)])
def test_back_to_the_base(build, part, kept):
    origin = weights(base_of(build))

    def change(name, weight):
        kind = "attention" if "attn" in name else "mlp" if ".layers." in name or ".h." in name else "outside"
        return origin[name] + kept * (weight - origin[name]) if part in ("all", kind) else weight

    check(BackToBase(kept=kept, part=part), build, change, Attacker(WRITTEN, base=base_of(build)))


def test_back_to_the_base_in_one_layer():
    origin = weights(base_of(tiny_llama))
    check(
        BackToBase(only_layer=-1),
        tiny_llama,
        lambda name, weight: origin[name] if ".layers.1." in name else weight,
        Attacker(WRITTEN, base=base_of(tiny_llama)),
    )


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_the_part_of_low_rank_is_taken_out(shape):
    """What is left of the difference has its smaller singular values."""
    torch.manual_seed(0)
    weight, base = torch.randn(shape), torch.randn(shape)
    left = towards(weight, base=base, kept=0.5, rank=1) - base
    values, kept = (torch.linalg.svdvals(d) for d in (weight - base, left))
    assert torch.allclose(kept[..., :3], 0.5 * values[..., 1:], atol=1e-5)
    assert kept[..., 3].max() < 1e-5
    assert torch.allclose(towards(weight, base=base, kept=1.0, rank=4), base, atol=1e-5)
    vector, start = torch.randn(4), torch.randn(4)
    assert torch.allclose(towards(vector, base=start, kept=0.5, rank=1), start + 0.5 * (vector - start))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: None, "attack base needs the public base model; give --base"),
        (gpt2, "--base is not what the model was made of: it has no model.embed_tokens.weight"),
        (lambda: tiny_llama(intermediate_size=24), r"its model.layers.0.mlp.gate_proj.weight has shape \(24, 16\)"),
    ],
)
def test_a_base_that_does_not_fit(build, sentence):
    attacker = Attacker(WRITTEN, base=build())
    with pytest.raises(InputError, match=sentence):
        BackToBase()(tiny_llama(), attacker)


@pytest.mark.parametrize(
    ("attack", "settings", "sentence"),
    [
        (Rounding, {"bits": 1}, "--bits must lie between 2 and 32, got 1"),
        (Pruning, {"share": 1.0}, "--share must lie between 0 and 1, both excluded, got 1.0"),
        (Noise, {"amount": 0.0}, "--amount must be greater than 0"),
        (BackToBase, {"rank": -1}, "--rank must not be negative"),
        (BackToBase, {"kept": math.inf}, "--kept must be a finite number, got inf"),
        (Dropping, {"amount": math.nan}, "--amount must be a finite number, got nan"),
        (Noise, {"amount": math.inf}, "--amount must be a finite number, got inf"),
        (Pruning, {"share": math.nan}, "--share must be a finite number, got nan"),
    ],
)
def test_knobs_out_of_range(attack, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        attack(**settings)


@pytest.mark.parametrize("attack", [Dropping(), Rounding(), Pruning(), Noise(), BackToBase()])
def test_frozen_weights_are_not_passed_over(attack):
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.requires_grad_(False)
    attacker = Attacker(WRITTEN, base=base_of(tiny_llama))
    with pytest.raises(
        InputError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight is frozen, and the attack moves it"
    ):
        attack.displace(model, attacker)


def test_what_is_frozen_and_the_bases_own_may_stay():
    """As positions that are computed."""
    model, base = tiny_llama(), base_of(tiny_llama)
    model.model.norm.requires_grad_(False)
    base.model.norm.weight.data = torch.ones(16)
    vector = BackToBase().displace(model, Attacker(WRITTEN, base=base)).vector
    assert "model.norm.weight" not in vector
    assert vector.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_no_layer_no_attack():
    with pytest.raises(InputError, match="no layer 5: the model has 2 layers"):
        Dropping(layer=5)(tiny_llama(), ATTACKER)
