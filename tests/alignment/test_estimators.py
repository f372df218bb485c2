"""Patcher's sampled estimator and the factor of its attack vector: whose mean, drawn how, in which runs."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from peft import LoraConfig

import reference
from helpers import (
    Gradients,
    Weights,
    golden_batch,
    golden_model,
    golden_rows,
    golden_vector,
    gradients,
    logged_updates,
    run_to_resume,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.draws import draws
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.trainer import DefenseTrainer
from methods import MODELS, noted_windows


def patcher(settings, model=None, rows=None, callbacks=(), peft_config=None, **changes):
    return PatcherTrainer(
        model if model is not None else tiny_llama(),
        PatcherConfig(**{**settings, **changes}),
        rows if rows is not None else word_rows(16),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def both_outcomes(trainer, batch):
    """The gradients of an update by its coin's outcome, whether δ is in it."""
    found = {}
    for trainer.state.global_step in range(40):
        trainer._metrics["train"].clear()
        trainer.training_step(trainer.model, dict(batch))
        attacked = "attacked_loss" in trainer._metrics["train"]
        assert ("safe_loss" in trainer._metrics["train"]) is not attacked
        found[attacked] = {name: g.clone() for name, g in gradients(trainer.model).items()}
        if len(found) == 2:
            return found
    raise AssertionError("one of the two outcomes never came")


def mean(outcomes, alpha):
    return reference.combined((1 - alpha, outcomes[False]), (alpha, outcomes[True]))


def test_mean_over_the_coin_is_the_golden_gradient(settings):
    trainer = patcher(settings, golden_model(), estimator="sampled")
    trainer.attack_vector = golden_vector("attack_vector")
    assert worst_entry(mean(both_outcomes(trainer, golden_batch("safe")), 0.5), golden_vector("patcher")) < 1e-4


@pytest.mark.parametrize("model", ["llama", "qwen2", "lora", "mixtral", "qwen2_moe"])
def test_mean_over_the_coin_is_the_exact_gradient(settings, model):
    """Of a Mixture-of-Experts model with the routers' loss at θ alone."""
    model = MODELS[model]()
    before = copy.deepcopy(model)
    torch.manual_seed(2)
    vector = {name: 0.02 * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    batch = golden_batch("safe")
    taken = {}
    for estimator in ("exact", "sampled"):
        trainer = patcher(settings, model, alpha=0.3, estimator=estimator)
        trainer.attack_vector = vector
        if estimator == "sampled":
            taken[estimator] = mean(both_outcomes(trainer, batch), 0.3)
        else:
            trainer.training_step(model, dict(batch))
            taken[estimator] = {name: g.clone() for name, g in gradients(model).items()}
    assert worst_entry(taken["sampled"], taken["exact"]) < 1e-6
    assert worst_entry(taken["sampled"], reference.patcher(before, [batch], vector, 0.3)) < 1e-5


@property_settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_coin_comes_up_as_often_as_its_probability_says(seed, alpha):
    count = 2000
    shown = sum(draws(seed, "coin", update).random() < alpha for update in range(count))
    assert abs(shown / count - alpha) < 6 * (alpha * (1 - alpha) / count) ** 0.5


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_purposes_and_neighbours_draw_independently(seed, update):
    same = draws(seed, "coin", update).random(4)
    assert np.array_equal(same, draws(seed, "coin", update).random(4))
    for other in (draws(seed, "scale", update), draws(seed, "coin", update + 1), draws(seed + 1, "coin", update)):
        assert not np.array_equal(same, other.random(4))


def drawn(trainer, vector=0.01):
    """Which updates of a run took the attacked gradient, and δ's factor in each of them."""
    trainer.attack_vector = {
        name: torch.full_like(p, vector) for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    trainer.train()
    return [entry.get("attack_scale") for entry in logged_updates(trainer)]


def test_coin_and_factor_hang_on_seed_and_update_alone(settings):
    """Not on how a window is split, on dropout, on the length of a run, nor on any random state."""
    sampled = {"estimator": "sampled", "attack_scale": [0.3, 1.5], "max_steps": 12, "per_device_train_batch_size": 2}
    whole = drawn(patcher(settings, **sampled))
    assert {scale is None for scale in whole} == {True, False}
    scales = [scale for scale in whole if scale is not None]
    assert len(set(scales)) == len(scales)
    assert all(0.3 <= scale <= 1.5 for scale in scales)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert drawn(patcher(settings, **{**sampled, **split})) == whole
    trainer = patcher(settings, tiny_llama(attention_dropout=0.3), **{**sampled, "max_steps": 5})
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert drawn(trainer) == whole[:5]
    assert drawn(patcher(settings, **{**sampled, "seed": 4})) != whole


def test_factor_is_the_vectors(settings):
    """Under both estimators; at 1, the paper's, without a rounding error."""
    batch, vector, taken = golden_batch("safe"), golden_vector("attack_vector"), {}
    for name, changes in {
        "default": {},
        "one": {"attack_scale": [1.0, 1.0]},
        "longer": {"attack_scale": [1.5, 1.5]},
        "longer, sampled": {"attack_scale": [1.5, 1.5], "estimator": "sampled", "alpha": 1.0},
        "none": {"attack_scale": [0.0, 0.0]},
    }.items():
        trainer = patcher(settings, golden_model(), **changes)
        trainer.attack_vector = vector
        trainer.training_step(trainer.model, dict(batch))
        taken[name] = gradients(trainer.model)
    assert same_bits(taken["default"], taken["one"])
    longer = {name: 1.5 * tensor for name, tensor in vector.items()}
    assert worst_entry(taken["longer"], reference.patcher(golden_model(), [batch], longer, 0.5)) < 1e-5
    assert worst_entry(taken["longer, sampled"], reference.patcher(golden_model(), [batch], longer, 1.0)) < 1e-5
    assert worst_entry(taken["none"], golden_vector("sft")) < 1e-4


def test_exact_estimator_draws_the_factor_too(settings):
    scales = drawn(patcher(settings, attack_scale=[0.3, 1.5], max_steps=4))
    assert len(set(scales)) == 4
    assert drawn(patcher(settings, max_steps=3)) == [1.0] * 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_is_one_pass(settings, accumulation):
    trainer = patcher(settings, estimator="sampled", max_steps=8, gradient_accumulation_steps=accumulation)
    passes, backward = [], trainer.backward

    def counted(*arguments, **how):
        passes.append(trainer.state.global_step)
        return backward(*arguments, **how)

    trainer.backward = counted
    assert {scale is None for scale in drawn(trainer)} == {True, False}
    assert passes == list(range(8))


def test_updates_before_the_first_attack_are_plain_sft(settings):
    noted = {"sampled": Weights(), "sft": Weights()}
    changes = {"max_steps": 8, "per_device_train_batch_size": 2}
    trainer = patcher(
        settings, callbacks=[noted["sampled"]], estimator="sampled", attack_every=3, attack_steps=2, **changes
    )
    trainer.train()
    plain = DefenseTrainer(
        tiny_llama(),
        DefenseConfig(**{**settings, **changes}),
        word_rows(16),
        processing_class=word_tokenizer(),
        callbacks=[noted["sft"]],
    )
    plain.train()
    assert [same_bits(*pair) for pair in zip(noted["sampled"].seen, noted["sft"].seen, strict=True)][:3] == [True] * 3
    logs = logged_updates(trainer)
    assert all("safe_loss" in entry for entry in logs[:3])
    assert all(("safe_loss" in entry) is not ("attacked_loss" in entry) for entry in logs)
    assert any("attacked_loss" in entry for entry in logs[3:])
    assert all(entry["loss"] == pytest.approx(entry.get("safe_loss", entry.get("attacked_loss"))) for entry in logs)
    assert not any("loss_gap" in entry for entry in logs)
    tokens = [[entry["num_tokens"] for entry in logged_updates(run)] for run in (trainer, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_inside_training(settings, accumulation):
    noted, model = Gradients(), golden_model()
    before = copy.deepcopy(model)
    trainer = patcher(
        settings,
        model,
        golden_rows("safe"),
        [noted],
        estimator="sampled",
        alpha=1.0,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        max_grad_norm=0.0,
        max_steps=1,
    )
    trainer.attack_vector = golden_vector("attack_vector")
    windows = noted_windows(trainer)
    trainer.train()
    assert worst_entry(noted.seen[0], reference.patcher(before, windows[0], golden_vector("attack_vector"), 1.0)) < 1e-4


def test_resumed_run_ends_with_the_same_bits(tmp_path):
    """The coin of every update left, and its factor, are those of the run that went through."""
    through = run_to_resume("sampled", str(tmp_path))
    through.train()
    logs = logged_updates(through)
    assert {"attack_scale" in entry for entry in logs[3:]} == {True, False}
    resumed = run_to_resume("sampled", str(tmp_path), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(weights(resumed.model), weights(through.model))
    assert logged_updates(resumed)[4:] == logs[4:]


def test_adapter_is_displaced_alone(settings):
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = patcher(
        settings, peft_config=lora, estimator="sampled", attack_scale=[0.5, 2.0], attack_every=1, attack_steps=2
    )
    trainer.args.max_steps = 8
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert any("attacked_loss" in entry for entry in logged_updates(trainer))
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"estimator": "both"}, "--estimator must be exact or sampled, got both"),
        ({"attack_scale": [-0.1, 1.0]}, r"--attack_scale takes two numbers, .* not below 0 .*; got -0\.1 1\.0"),
        ({"attack_scale": [1.5, 0.3]}, "not above the greatest; got 1.5 0.3"),
        ({"attack_scale": [1.0]}, "takes two numbers"),
        ({"attack_scale": [0.0, 1.0, 2.0]}, "takes two numbers"),
        ({"attack_scale": [float("nan"), 1.0]}, "got nan 1.0"),
        ({"attack_scale": [0.0, float("inf")]}, "got 0.0 inf"),
        ({"attack_scale": 0.5}, "takes two numbers, .*; got 0.5"),
        ({"attack_scale": ["low", "high"]}, "takes two numbers, .*; got low high"),
        ({"attack_scale": None}, "takes two numbers, .*; got None"),
    ],
)
def test_settings_out_of_range(settings, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        PatcherConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attack_every": 9}, [1, 2, 3, 4, 5]),
        ({"attack_batch_size": 2}, [1, 2, 5.5, 7.5, 11]),  # two passes, and 3 attacker steps of half as many rows
        ({"estimator": "sampled"}, [1, 2, 6, 7, 11]),
        ({"padding_free": True, "max_length": None}, [1, 2, 7, 9, 14]),
    ],
)
def test_a_run_counts_its_passes(settings, changes, expected):
    trainer = patcher(settings, **{"attack_every": 2, "attack_steps": 3, "max_steps": 5, **changes})
    trainer.train()
    assert [entry["passes"] for entry in logged_updates(trainer)] == expected
