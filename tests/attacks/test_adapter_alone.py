"""An adapter displaced alone: what it adds itself is attacked, and its frozen base stays; called, an attack merges."""

import pytest
import torch

from helpers import relative_distance, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.back_to_base import BackToBase
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.finetuning import FineTuning
from holdfast.attacks.noise import Noise
from holdfast.attacks.pruning import Pruning, pruned
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.attacks.rounding import Rounding, rounded
from holdfast.attacks.rows import mixed
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.models import merge
from holdfast.parameters import displaced
from holdfast.residual import writers
from methods import gemma2, lora, mixtral, qwen2

HARMFUL, HARMLESS = ["t5 t6 t7", "t8", "t9 t60"], ["t40 t41", "t42 t43"]
ATTACKER = Attacker(ChatFormat(word_tokenizer()), HARMFUL, word_rows(8, seed=1), HARMLESS, seed=3)
WRITES = ("o_proj.lora_B.default.weight", "down_proj.lora_B.default.weight")
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
BUILDS = {"llama": lora, "qwen2": lambda: lora(qwen2), "mixtral": lambda: lora(mixtral, **ATTENTION)}


def direction(model, layer):
    """The difference of means, found prompt by prompt."""
    found = []
    for prompts in (HARMFUL, HARMLESS):
        seen = []
        hook = (
            model.get_base_model()
            .model.layers[layer]
            .register_forward_hook(
                lambda _, __, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
        )
        for prompt in prompts:
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[int(word[1:]) for word in prompt.split()]]))
        hook.remove()
        found.append(torch.stack(seen).mean(0))
    return torch.nn.functional.normalize(found[0] - found[1], dim=0)


def check(attack, build, change):
    """The vector has the adapter's own parameters, and changes them so, and nothing else."""
    model, before = build(), weights(build())
    vector = attack.displace(model, ATTACKER).vector
    assert set(vector) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert same_bits(weights(model), before)
    with displaced(model, vector):
        after = weights(model)
    assert relative_distance(after, {name: change(name, weight) for name, weight in before.items()}) < 1e-6
    assert not same_bits(after, before)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_ablation_takes_the_direction_out_of_what_the_adapter_writes(build):
    r = direction(build(), 1)
    matrix = torch.eye(16) - 0.7 * torch.outer(r, r)
    attack = Ablation(layer=1, attention_scale=[0.7], mlp_scale=[0.7])
    check(attack, build, lambda name, weight: matrix @ weight if name.endswith(WRITES) else weight)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_layer_of_the_adapter_is_dropped(build):
    check(
        Dropping(layer=0, amount=0.5),
        build,
        lambda name, weight: 0.5 * weight if ".layers.0." in name and name.endswith(WRITES) else weight,
    )


@pytest.mark.parametrize(
    ("attack", "change"),
    [
        (Rounding(bits=3), lambda weight: rounded(weight, bits=3)),
        (Pruning(share=0.3), lambda weight: pruned(weight, share=0.3)),
    ],
)
def test_the_adapters_matrices_are_rounded_and_pruned(attack, change):
    check(attack, lora, lambda name, weight: change(weight) if ".lora_" in name else weight)


def test_noise_lies_on_the_adapter():
    vector = Noise(amount=0.5).displace(lora(), ATTACKER).vector
    for name, weight in weights(lora()).items():
        if ".lora_" in name:
            assert 0.2 < vector[name].std() / weight.std() < 0.8


def test_fine_tuning_trains_the_adapter_itself(settings):
    """As a service would that goes on with it."""
    attack = FineTuning(learning_rate=1e-2, steps=3, batch_size=4)
    model = lora()
    vector = attack.displace(model, ATTACKER).vector
    assert same_bits(weights(model), weights(lora()))
    rows = mixed(ATTACKER.harmful_rows, None, ATTACKER.written, poison_ratio=1, num_samples=None, seed=3)
    config = {"learning_rate": 1e-2, "max_steps": 3, "lr_scheduler_type": "constant"}
    trainer = AttackTrainer(lora(), AttackConfig(**{**settings, **config}), rows, word_tokenizer(), adapter_alone=True)
    trainer.train()
    moved = {name: weight - weights(lora())[name] for name, weight in weights(trainer.model).items()}
    assert relative_distance(vector, {name: moved[name] for name in vector}) < 1e-5
    assert all(".lora_" in name for name in vector)
    assert all(not moved[name].any() for name in moved if ".lora_" not in name)


@pytest.mark.parametrize(
    "attack", [Ablation(layer=0), Dropping(), Rounding(), Pruning(), Noise(), FineTuning(1e-2, 2)], ids=lambda a: a.name
)
def test_a_call_attacks_the_whole_model(attack):
    found = weights(attack(lora(), ATTACKER).model)
    whole = weights(attack(merge(lora()).requires_grad_(True), ATTACKER).model)
    assert same_bits(found, whole)
    assert not any("lora" in name for name in found)


@pytest.mark.parametrize(
    ("build", "attack", "sentence"),
    [
        (lora, BackToBase(), "an adapter has no weights in its base to be taken back to; merge it first"),
        (lora, FineTuning(lora_rank=2), "--lora_rank 2: an adapter cannot be put on another one; expected 0"),
        (lambda: lora(target_modules=["q_proj"]), Ablation(), "on other modules; expected one on those, too"),
        (lambda: lora(gemma2), Dropping(amount=0.5), r"post_attention_layernorm\.weight is frozen"),
    ],
)
def test_what_an_adapter_alone_has_no_place_for(build, attack, sentence):
    base = Attacker(ATTACKER.written, HARMFUL, ATTACKER.harmful_rows, HARMLESS, base=tiny_llama())
    with pytest.raises(InputError, match=sentence):
        attack.displace(build(), base)


def test_only_what_the_adapter_adds_is_found():
    found = writers(lora())
    assert [writer.name for writer in found] == [
        f"base_model.model.model.layers.{number}.{block}.lora_B.default.weight"
        for number in range(2)
        for block in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert {(writer.kind, writer.dim) for writer in found} == {("attention", 0), ("mlp", 0)}
