"""What holds for every method: its gradient against a slow reference, on other models, with LoRA, in parts."""

import copy

import pytest

from helpers import worst_entry
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
