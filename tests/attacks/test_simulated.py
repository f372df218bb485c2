"""The simulated attack against its golden case, and what it leaves behind."""

import pytest
import torch

from helpers import (
    golden_batch,
    golden_model,
    golden_vector,
    relative_distance,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.attacks.simulated import simulate_attack
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.parameters import displaced
from holdfast.trainer import DefenseTrainer


def trainer_of(settings, model, **changes):
    return DefenseTrainer(
        model, DefenseConfig(**{**settings, **changes}), word_rows(8), processing_class=word_tokenizer()
    )


def mean_loss(model, batch):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def golden_batches():
    return iter([golden_batch(str(i), "attack_steps") for i in range(5)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_vector(settings, checkpointing):
    trainer = trainer_of(settings, golden_model(), gradient_checkpointing=checkpointing)
    before = weights(trainer.model)
    found = simulate_attack(trainer, trainer.model, golden_batches(), steps=5, learning_rate=1e-3)
    expected = golden_vector("simulated_attack_vector")
    assert relative_distance(found.vector, expected) < 1e-4
    assert worst_entry(found.vector, expected) < 5e-3
    assert found.norm == pytest.approx(sum(t.square().sum().item() for t in expected.values()) ** 0.5, rel=1e-4)
    assert found.discarded is None
    assert same_bits(before, weights(trainer.model))


def test_losses_are_those_before_the_first_and_the_last_step(settings):
    trainer = trainer_of(settings, golden_model())
    whole = simulate_attack(trainer, trainer.model, golden_batches(), steps=5, learning_rate=1e-3)
    shorter = simulate_attack(trainer, trainer.model, golden_batches(), steps=4, learning_rate=1e-3)
    assert whole.first_loss == shorter.first_loss
    assert whole.first_loss == pytest.approx(mean_loss(golden_model(), golden_batch("0", "attack_steps")), rel=1e-5)
    with displaced(trainer.model, shorter.vector):
        at_last = mean_loss(trainer.model, golden_batch("4", "attack_steps"))
    assert whole.last_loss == pytest.approx(at_last, rel=1e-4)


def test_batches_that_end_before_the_attack_does(settings):
    trainer = trainer_of(settings, golden_model())
    before = weights(trainer.model)
    with pytest.raises(InputError, match="come to an end: DefenseTrainer needs 2 for an update, 1 were left"):
        simulate_attack(trainer, trainer.model, golden_batches(), steps=5, learning_rate=1e-3, window_size=2)
    assert same_bits(before, weights(trainer.model))


def test_attack_without_a_step(settings):
    trainer = trainer_of(settings, golden_model())
    with pytest.raises(InputError, match="at least one step, got 0"):
        simulate_attack(trainer, trainer.model, golden_batches(), steps=0, learning_rate=1e-3)


def test_window_of_two_halves_is_the_whole_batch(settings):
    halves = []
    for batch in golden_batches():
        halves += [{key: t[:2] for key, t in batch.items()}, {key: t[2:] for key, t in batch.items()}]
    trainer = trainer_of(settings, golden_model())
    found = simulate_attack(trainer, trainer.model, iter(halves), steps=5, learning_rate=1e-3, window_size=2)
    assert relative_distance(found.vector, golden_vector("simulated_attack_vector")) < 1e-3


def test_frozen_parameters_are_not_attacked(settings):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    trainer = trainer_of(settings, model)
    found = simulate_attack(trainer, model, golden_batches(), steps=2, learning_rate=1e-3)
    assert "model.embed_tokens.weight" not in found.vector
    assert "lm_head.weight" in found.vector


def test_metrics_are_left_alone(settings):
    trainer = trainer_of(settings, tiny_llama())
    simulate_attack(trainer, trainer.model, golden_batches(), steps=2, learning_rate=1e-3)
    assert not trainer._metrics["train"]
    assert trainer._total_train_tokens == 0


def test_global_random_state_is_left_alone_without_dropout(settings):
    trainer = trainer_of(settings, tiny_llama())
    state = torch.get_rng_state()
    simulate_attack(trainer, trainer.model, golden_batches(), steps=2, learning_rate=1e-3)
    assert torch.equal(state, torch.get_rng_state())
