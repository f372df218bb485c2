"""Vaccine: golden case, which modules are shifted on which architecture, the clean pass, refused settings."""

import pytest
import torch
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import reference
from helpers import (
    WORDS,
    golden_batch,
    golden_case,
    golden_model,
    golden_rows,
    golden_vector,
    gradients,
    logged_updates,
    same_bits,
    tiny_llama,
    worst_entry,
)
from holdfast.alignment.vaccine import VaccineConfig, modules_to_shift
from holdfast.errors import InputError
from methods import HYBRIDS, METHODS, gpt2, lora, mixtral, qwen2, qwen3_5

SHAPE = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SHAPE, "intermediate_size": 32, "num_key_value_heads": 2, "initializer_range": 0.2}


def opt():
    shape = {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.2}
    return OPTForCausalLM(OPTConfig(**shape, dropout=0.0, attention_dropout=0.0))


def each_layer(pattern):
    return [pattern.format(layer) for layer in range(2)]


ARCHITECTURES = {
    "llama": (tiny_llama, each_layer("model.layers.{}.self_attn")),
    "qwen2": (qwen2, each_layer("model.layers.{}.self_attn")),
    "gpt2": (gpt2, each_layer("transformer.h.{}.attn")),
    "gpt-neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=32, initializer_range=0.2)),
        each_layer("gpt_neox.layers.{}.attention"),
    ),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=4)), each_layer("model.layers.{}.self_attn")),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**GATED)), each_layer("model.layers.{}.self_attn")),
    "opt": (opt, each_layer("model.decoder.layers.{}.self_attn")),
    "mixtral": (mixtral, each_layer("model.layers.{}.self_attn")),
    "lora": (lora, each_layer("base_model.model.model.layers.{}.self_attn")),
    "lora on qwen3_5": (
        lambda: lora(qwen3_5),
        ["base_model.model.model.layers.0.linear_attn", "base_model.model.model.layers.1.self_attn"],
    ),
    **HYBRIDS,
}


def vaccine(settings, model=None, **changes):
    return METHODS["vaccine"].build(model if model is not None else tiny_llama(), settings, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    trainer = vaccine(settings, golden_model(), gradient_checkpointing=checkpointing)
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("vaccine")) < 1e-4
    assert loss.item() == pytest.approx(golden_case("vaccine")["loss"], rel=1e-5)


def test_loss_is_that_of_the_shifted_pass(settings):
    trainer = vaccine(settings, golden_model(), rows=golden_rows("safe"), max_steps=1)
    trainer.train()
    [logs] = logged_updates(trainer)
    clean, shifted = golden_case("sft")["loss"], golden_case("vaccine")["loss"]
    assert logs["loss"] == pytest.approx(shifted, rel=1e-5)
    assert logs["safe_loss"] == pytest.approx(clean, rel=1e-5)
    assert logs["perturbation_gap"] == pytest.approx(shifted - clean, rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_decoder_layer_is_shifted(settings, name):
    build, names = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build()
    assert modules_to_shift(model) == [model.get_submodule(module) for module in names]
    batch = golden_batch("safe")
    expected = reference.vaccine(model, [batch], 2.0, names)
    vaccine(settings, model).training_step(model, batch)
    assert worst_entry(gradients(model), expected) < 1e-5


def test_pattern_names_the_modules_to_shift(settings):
    model, batch = tiny_llama(), golden_batch("safe")
    expected = reference.vaccine(model, [batch], 2.0, ["model.layers.1.self_attn"])
    vaccine(settings, model, attention_pattern=r".*\.1\.self_attn").training_step(model, batch)
    assert worst_entry(gradients(model), expected) < 1e-4
    # A pattern matches whole names: not what is inside the module.
    assert modules_to_shift(model, "self_attn|.*mlp") == [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_trained_before_the_first_attention(settings, checkpointing):
    """What is shifted need not depend on a parameter that is trained."""
    model, batch = tiny_llama(), golden_batch("safe")
    _, names = ARCHITECTURES["llama"]
    expected = reference.vaccine(model, [batch], 2.0, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    vaccine(settings, model, gradient_checkpointing=checkpointing).training_step(model, batch)
    taken = gradients(model)
    assert worst_entry(taken, {name: expected[name] for name in taken}) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_share_their_dropout_masks(settings, checkpointing):
    """Without a shift both passes must find the very same loss."""
    model = tiny_llama(attention_dropout=0.4)
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = vaccine(settings, model, rows=16, rho=0.0, **changes)
    trainer.train()
    assert [entry["perturbation_gap"] for entry in logged_updates(trainer)] == [0.0, 0.0]
    losses = [trainer.training_step(trainer.model, golden_batch("safe")).item() for _ in range(2)]
    assert losses[0] != losses[1]  # dropout is on


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_hook_is_left_behind(settings, checkpointing):
    trainer = vaccine(settings, golden_model(), gradient_checkpointing=checkpointing)
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert not any(module._forward_hooks for module in modules_to_shift(trainer.model))
    trainer.args.rho = 0.0
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4
    assert same_bits(dict(trainer.model.named_parameters()), dict(golden_model().named_parameters()))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "--attention_pattern nowhere matches no module"),
        ("layers", "--attention_pattern layers matches no module"),
        ("[", r"--attention_pattern \[ is not a regular expression"),
    ],
)
def test_pattern_that_cannot_be_used(settings, pattern, message):
    with pytest.raises(InputError, match=message):
        vaccine(settings, attention_pattern=pattern)


def test_pattern_that_matches_no_layer_is_refused_at_the_first_step(settings):
    trainer = vaccine(settings, attention_pattern=".*")
    with pytest.raises(InputError, match="--attention_pattern matches a LlamaModel, which does not return a tensor"):
        trainer.training_step(trainer.model, golden_batch("safe"))


def falcon_h1():
    """Attention and a state-space mixer side by side in every layer."""
    heads = {"head_dim": 4, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4}
    return FalconH1ForCausalLM(FalconH1Config(**GATED, **heads, mamba_n_groups=1))


def nemotron_h():
    """Feed-forward layers without anything else."""
    heads = {"head_dim": 4, "mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 1}
    shape = {name: value for name, value in GATED.items() if name != "num_hidden_layers"}
    return NemotronHForCausalLM(NemotronHConfig(**shape, **heads, layer_types=["mamba", "mlp", "attention", "mlp"]))


@pytest.mark.parametrize(
    ("build", "layers", "modules"),
    [
        (falcon_h1, 2, 4),
        (nemotron_h, 4, 2),
        (lambda: CTRLLMHeadModel(CTRLConfig(vocab_size=WORDS, n_embd=16, n_head=4, n_layer=2, dff=32)), 0, 0),
    ],
    ids=["several", "none in some", "no layers"],
)
def test_where_it_cannot_be_told_what_to_shift(settings, build, layers, modules):
    message = f"{layers} decoder layers have {modules} modules that mix tokens, .* --attention_pattern"
    with pytest.raises(InputError, match=message):
        vaccine(settings, build())


def test_pattern_tells_what_to_shift_where_nothing_else_can(settings):
    model, batch = falcon_h1(), golden_batch("safe")
    names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in ("mamba", "self_attn")]
    expected = reference.vaccine(model, [batch], 2.0, names)
    vaccine(settings, model, attention_pattern=r".*\.(mamba|self_attn)").training_step(model, batch)
    assert worst_entry(gradients(model), expected) < 1e-5


def test_module_that_is_run_twice_is_refused(settings):
    model = tiny_llama()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    trainer = vaccine(settings, model, attention_pattern=r"model\.layers\.0\.self_attn")
    with pytest.raises(InputError, match="a LlamaAttention is run more than once in a pass"):
        trainer.training_step(model, golden_batch("safe"))


def test_module_that_is_never_run_is_refused(settings):
    model = tiny_llama()
    model.unused = torch.nn.Linear(1, 1)
    trainer = vaccine(settings, model, attention_pattern="unused")
    with pytest.raises(InputError, match="none of the modules to shift is run"):
        trainer.training_step(model, golden_batch("safe"))


def test_router_loss_is_part_of_both_passes_and_of_no_logged_cross_entropy(settings):
    model, batch = mixtral(), golden_batch("safe")
    expected = reference.plain_loss(model, [batch]).item()
    trainer = vaccine(settings, model, rows=golden_rows("safe"), max_steps=1)
    trainer.train()
    [logs] = logged_updates(trainer)
    assert logs["safe_loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == pytest.approx(expected + 0.5 * logs["aux_loss"] + logs["perturbation_gap"], rel=1e-5)


def test_reentrant_checkpointing_is_refused(settings):
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="--gradient_checkpointing_kwargs"):
        VaccineConfig(**{**settings, **reentrant, "gradient_checkpointing": True})
    VaccineConfig(**settings, **reentrant)  # without checkpointing it says nothing


@pytest.mark.parametrize("rho", [-0.1, float("nan")])
def test_length_out_of_range_is_named(settings, rho):
    with pytest.raises(InputError, match="--rho"):
        VaccineConfig(**settings, rho=rho)


def test_defaults_are_those_of_the_paper(tmp_path):
    config = VaccineConfig(output_dir=str(tmp_path))
    assert (config.rho, config.attention_pattern) == (2.0, None)
