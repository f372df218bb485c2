"""What holds for every method: its gradient against a slow reference, on other models, with LoRA, in parts."""

import copy
import itertools

import pytest

from helpers import gradients, logged_updates, tiny_llama, word_rows, word_tokenizer, worst_entry
from holdfast.config import DefenseConfig
from holdfast.trainer import DefenseTrainer
from methods import METHODS, MODELS, anchor, first_update

# What need not be tried both whole and in parts, and whether activations are checkpointed there.
IN_PARTS = {"qwen2_moe, lora": False, "mixtral, router loss off": False}


@pytest.mark.parametrize("model", [name for name in MODELS if name not in IN_PARTS])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_the_slow_reference(settings, method, model):
    model = MODELS[model]()
    before = copy.deepcopy(model)
    update = first_update(METHODS[method], model, settings)
    expected = METHODS[method].expected(before, update.window, update.second)
    assert worst_entry(update.gradient, expected) < 1e-5


@pytest.mark.parametrize(
    ("model", "checkpointing"), [("llama", False), ("llama", True), ("mixtral", True), *IN_PARTS.items()]
)
@pytest.mark.parametrize("method", METHODS)
def test_window_in_two_parts(settings, method, model, checkpointing):
    model = MODELS[model]()
    before = copy.deepcopy(model)
    update = first_update(
        METHODS[method],
        model,
        settings,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
    )
    assert [len(batch["input_ids"]) for batch in update.window] == [2, 2]
    expected = METHODS[method].expected(before, update.window, update.second)
    assert worst_entry(update.gradient, expected) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_lora_under_checkpointing(settings, method):
    model = MODELS["lora"]()
    before = copy.deepcopy(model)
    update = first_update(METHODS[method], model, settings, gradient_checkpointing=True)
    expected = METHODS[method].expected(before, update.window, update.second)
    assert worst_entry(update.gradient, expected) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_direct_call_is_a_window_of_its_own(settings, method, accumulation):
    """Whatever the run's accumulation is, before the run and after it."""
    method, model, twin = METHODS[method], MODELS["mixtral"](), MODELS["mixtral"]()
    trainer = method.build(model, settings, gradient_accumulation_steps=accumulation, max_steps=1, rows=12)
    batch = next(trainer.stream(trainer.train_dataset, "here"))
    harmful = [next(trainer.attack_batches)] if method.second == "attack" else []
    for run in (trainer.train, None):
        for name, value in {
            "attack_batches": itertools.cycle(harmful),
            "anchor": anchor(model),
            "_smoothed": None,
        }.items():
            if hasattr(trainer, name):
                setattr(trainer, name, value)
        trainer.bi_state = "safety"
        twin.load_state_dict(model.state_dict())
        trainer.training_step(model, batch)
        assert worst_entry(gradients(model), method.expected(twin, [batch], harmful)) < 1e-5
        if run:
            run()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lisa"])  # which begins with safety data
def test_metrics_are_those_of_the_train_batches_at_todays_weights(settings, method):
    changes = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = DefenseConfig(**{**settings, **changes})
    plain = DefenseTrainer(tiny_llama(), config, word_rows(8), processing_class=word_tokenizer())
    trainer = METHODS[method].build(tiny_llama(), settings, **changes)
    found = []
    for one in (plain, trainer):
        one.train()
        [logs] = logged_updates(one)
        found.append([logs[name] for name in ("entropy", "mean_token_accuracy", "num_tokens", "learning_rate")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
