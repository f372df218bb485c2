"""Booster: golden case, its harmful batches, a harmful gradient of zero, logs, refused settings."""

import math

import pytest

import reference
from helpers import (
    golden_batch,
    golden_case,
    golden_model,
    golden_rows,
    golden_vector,
    gradients,
    logged_updates,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.booster import BoosterConfig, BoosterTrainer
from holdfast.errors import InputError
from methods import METHODS


def booster(settings, model=None, harmful=None, **changes):
    trainer = METHODS["booster"].build(model if model is not None else tiny_llama(), settings, **changes)
    if harmful is not None:
        trainer.attack_batches = iter(harmful)
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    model = golden_model()
    before = weights(model)
    trainer = booster(settings, model, [golden_batch("harmful")], gradient_checkpointing=checkpointing)
    loss = trainer.training_step(model, golden_batch("safe"))
    assert worst_entry(gradients(model), golden_vector("booster")) < 1e-4
    assert loss.item() == pytest.approx(golden_case("booster")["loss"], rel=1e-6)
    assert same_bits(before, weights(model))


def test_attack_batches_that_end_too_early(settings):
    trainer = booster(settings, harmful=[])
    with pytest.raises(InputError, match="come to an end: BoosterTrainer needs 1 for an update, 0 were left"):
        trainer.training_step(trainer.model, golden_batch("safe"))


def test_logs(settings):
    model, harmful = golden_model(), golden_batch("harmful")
    g = reference.sft(model, [harmful])
    before, after = (
        reference.plain_loss(m, [harmful]).item() for m in (model, reference.moved(model, g, -0.1 / reference.size(g)))
    )
    trainer = booster(settings, model, [harmful], rows=golden_rows("safe"), max_steps=1)
    trainer.train()
    [logs] = logged_updates(trainer)
    assert logs["loss"] == pytest.approx(golden_case("booster")["loss"], rel=1e-5)
    assert logs["harmful_loss"] == pytest.approx(before, rel=1e-5)
    assert logs["harmful_gain"] == pytest.approx(before - after, rel=1e-3)


def test_a_harmful_batch_is_drawn_for_every_train_batch(settings):
    trainer = booster(settings, rows=12, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    assert trainer.attack_batches.drawn == 6


def test_harmful_gradient_of_zero(settings):
    """Harmful rows that are learned by heart, or have nothing to learn, leave the plain gradient."""
    harmful = golden_batch("harmful")
    harmful["labels"].fill_(-100)
    trainer = booster(settings, golden_model(), [harmful])
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert math.isfinite(loss.item())
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_harmful_passes_share_their_dropout_masks(settings, checkpointing):
    """A step too short to change a bit gains nothing."""
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = booster(settings, tiny_llama(attention_dropout=0.4), rows=16, alpha=1e-30, **changes)
    trainer.train()
    assert [entry["harmful_gain"] for entry in logged_updates(trainer)] == [0.0, 0.0]
    losses = [trainer.training_step(trainer.model, golden_batch("safe")).item() for _ in range(2)]
    assert losses[0] != losses[1]  # dropout is on


def test_attack_data_is_required(settings):
    with pytest.raises(InputError, match="--attack_data"):
        BoosterTrainer(tiny_llama(), BoosterConfig(**settings), word_rows(4), processing_class=word_tokenizer())


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.0), ("alpha", -1.0), ("alpha", math.nan), ("lam", -0.1), ("lam", math.nan)]
)
def test_settings_out_of_range_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        BoosterConfig(**settings, **{name: value})


def test_defaults_are_those_of_the_paper(tmp_path):
    config = BoosterConfig(output_dir=str(tmp_path))
    assert (config.lam, config.alpha) == (5.0, 0.1)
