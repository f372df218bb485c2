"""What holds for every method: its gradient against a slow reference, on other models, with LoRA, in parts."""

import copy

import pytest

from helpers import logged_updates, tiny_llama, word_rows, word_tokenizer, worst_entry
from holdfast.config import DefenseConfig
from holdfast.trainer import DefenseTrainer
from methods import METHODS, MODELS, first_update


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_the_slow_reference(settings, method, model):
    model = MODELS[model]()
    before = copy.deepcopy(model)
    update = first_update(METHODS[method], model, settings)
    expected = METHODS[method].expected(before, update.window, update.second)
    assert worst_entry(update.gradient, expected) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_window_in_two_parts(settings, method, checkpointing):
    model = MODELS["llama"]()
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
    assert worst_entry(update.gradient, expected) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_lora_under_checkpointing(settings, method):
    model = MODELS["lora"]()
    before = copy.deepcopy(model)
    update = first_update(METHODS[method], model, settings, gradient_checkpointing=True)
    expected = METHODS[method].expected(before, update.window, update.second)
    assert worst_entry(update.gradient, expected) < 1e-4


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
