"""What is trained is float32, whatever the model comes in; half precision is for what is frozen, and for computing."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from helpers import same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.parameters import share_moved
from holdfast.trainer import DefenseTrainer
from methods import METHODS

SMALL = {"max_steps": 3, "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
HALF = [torch.bfloat16, torch.float16]


def lora(**changes):
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)


def sft(settings, model, **more):
    changes = {name: more.pop(name) for name in list(more) if name != "peft_config"}
    config = DefenseConfig(**{**settings, **SMALL, **changes})
    return DefenseTrainer(model, config, word_rows(12), processing_class=word_tokenizer(), **more)


def attack(settings, model, *, peft_config=None, evaluator=None, **changes):
    config = AttackConfig(**{**settings, **SMALL, **changes})
    rows = word_rows(12, seed=1)
    return AttackTrainer(model, config, rows, word_tokenizer(), evaluator=evaluator, peft_config=peft_config)


@pytest.mark.parametrize("dtype", HALF)
def test_small_rate_moves_a_model_that_comes_in_half_precision(settings, tmp_path, dtype, caplog):
    """By the sentence that says so, in training, in a real and in a simulated attack, and as it is saved."""
    caplog.set_level(logging.INFO, logger="holdfast")
    trainer = sft(settings, tiny_llama().to(dtype))
    assert [r.message for r in caplog.records] == [
        f"weights are {str(dtype)[6:]}: they are computed on in bf16; what is trained is kept and saved in float32"
    ]
    before = weights(trainer.model)
    trainer.train()
    assert trainer.args.bf16 is True
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert share_moved(dict(trainer.model.named_parameters()), before) > 0.8  # the rest: words that no row has
    trainer.save_model(tmp_path / "saved")
    assert same_bits(
        weights(LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")), weights(trainer.model)
    )

    real = attack(settings, tiny_llama().to(dtype))
    real.train()
    assert real.weights_moved > 0.8

    patcher = PatcherTrainer(
        tiny_llama().to(dtype),
        PatcherConfig(**{**settings, **SMALL}, attack_every=1, attack_steps=3),
        word_rows(12),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
    )
    patcher.train()
    logged = [entry["attack_weights_moved"] for entry in patcher.state.log_history if "attack_weights_moved" in entry]
    assert len(logged) == 2
    assert min(logged) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_such_a_model(settings, method):
    changes = {**SMALL, "max_steps": 2, "weight_decay": 0.01}
    trainer = METHODS[method].build(tiny_llama().bfloat16(), {**settings, **changes})
    before = weights(trainer.model)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert share_moved(dict(trainer.model.named_parameters()), before) > 0.8


def test_such_a_run_resumes_with_the_same_bits(settings):
    """Its checkpoints hold the float32 weights, not those that the model comes in."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = sft(settings, tiny_llama().bfloat16(), **changes)
    through.train()
    resumed = sft(settings, tiny_llama().bfloat16(), **changes)
    resumed.train(resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-2")
    assert same_bits(weights(resumed.model), weights(through.model))


def test_a_folder_and_its_own_precision(settings, tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    word_tokenizer().save_pretrained(tmp_path / "half")
    for kind, config in ((DefenseTrainer, DefenseConfig), (AttackTrainer, AttackConfig)):
        arguments = config(**{**settings, **SMALL}, model_init_kwargs={"dtype": "auto"})
        trainer = kind(str(tmp_path / "half"), arguments, word_rows(8))
        assert trainer.args.bf16 is True
        assert trainer.model.dtype == torch.float32


def test_trainers_of_one_process_compute_each_as_its_model_needs(settings):
    """Whatever the order in which configurations and trainers are made."""
    configs = [DefenseConfig(**{**settings, **SMALL}) for _ in range(3)]
    models = [tiny_llama(), tiny_llama().bfloat16(), tiny_llama()]
    for config, model, precision in zip(configs, models, ("no", "bf16", "no"), strict=True):
        trainer = DefenseTrainer(model, config, word_rows(8), processing_class=word_tokenizer())
        assert trainer.accelerator.mixed_precision == precision
        trainer.train()


def test_float32_weights_are_computed_on_as_asked(settings):
    assert sft(settings, tiny_llama()).args.bf16 is False
    assert sft(settings, tiny_llama(), bf16=True).args.bf16 is True


@pytest.mark.parametrize("trainer", [sft, attack])
def test_bf16_ruled_out_for_weights_that_need_it(settings, trainer):
    with pytest.raises(InputError, match=r"--bf16 false cannot be used with weights in bfloat16"):
        trainer(settings, tiny_llama().bfloat16(), bf16=False)
    assert trainer(settings, tiny_llama(), bf16=False).args.bf16 is False


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fresh", [True, False])
def test_adapter_is_float32_on_a_frozen_base_that_is_not(settings, dtype, fresh):
    """Also whole modules that it holds, and one that was loaded to be trained on."""
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    base = tiny_llama().to(dtype)
    model = base if fresh else get_peft_model(base, config, autocast_adapter_dtype=False)
    trainer = sft(settings, model, peft_config=config if fresh else None)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
        assert (name in moved) == parameter.requires_grad, name
    assert any("embed_tokens.modules_to_save" in name for name in moved)


def test_adapter_on_such_a_base_is_measured_and_attacked(settings):
    def answers(model, tokenizer):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        return SimpleNamespace(flat=dict)

    config = lora(modules_to_save=["lm_head"])
    trainer = attack(settings, tiny_llama().bfloat16(), peft_config=config, evaluator=answers)
    trainer.train()
    assert [point["steps"] for point in trainer.measurements] == [0, 3]
    assert [point["weights_moved"] > 0.9 for point in trainer.measurements] == [False, True]


def test_adapter_on_such_a_base_is_merged_without_rounding(settings):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data * (1e-3 if "lora_" in name else 1.0)
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    exact = PeftModel(tiny_llama(), model.peft_config["default"])
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    trainer = attack(settings, model)
    assert trainer.args.bf16 is True
    assert same_bits(weights(trainer.model), weights(exact.merge_and_unload()))


def test_what_passes_in_bf16_see_of_an_attack(settings):
    """At a small rate all weights move, by less than half of their last digit in bf16."""
    small = {"learning_rate": 1e-6, "weight_decay": 0.0}
    real = attack(settings, tiny_llama().bfloat16(), **small)
    real.train()
    assert real.weights_moved > 0.8
    assert real.weights_moved_in_bf16 < 0.3
    whole = attack(settings, tiny_llama(), **small)
    whole.train()
    assert whole.weights_moved_in_bf16 is None


def test_attack_that_hardly_moves_the_weights_is_told_of(settings, caplog):
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    real = attack(settings, tiny_llama(), **still)
    real.train()
    assert real.weights_moved < 0.5
    arguments = PatcherConfig(**{**settings, **SMALL, "learning_rate": 1e-12}, attack_weight_decay=0.0)
    patcher = PatcherTrainer(
        tiny_llama(), arguments, word_rows(12), word_rows(12, seed=1), processing_class=word_tokenizer()
    )
    patcher.attack(patcher.model)
    told = [record.message for record in caplog.records if "of the weights that it trains" in record.message]
    assert [message.partition(" moved ")[0] for message in told] == [
        "the attack",
        "the simulated attack after update 0",
    ]
