"""SPARD: golden projections, both rules against plain loops, the trust region, refused settings."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

import reference
from helpers import (
    golden_batch,
    golden_case,
    golden_model,
    golden_vector,
    gradients,
    logged_updates,
    relative_distance,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.errors import InputError
from holdfast.finetuning.spard import SpardConfig, SpardTrainer
from methods import METHODS, MODELS, Noted, mixtral, noted_windows

SAFETY_LOSS = 5.32571268081665  # of the golden model on its batch `safe`


def spard(settings, model=None, **changes):
    return METHODS["spard"].build(model if model is not None else tiny_llama(), settings, **changes)


def moved(after, before):
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["trust_region", "half_space", "satisfied"])
def test_golden_projection(settings, case, checkpointing):
    golden, expected = golden_case(f"spag_{case}"), golden_vector(f"spag_{case}")
    model = golden_model()
    before = weights(model)
    trainer = spard(settings, model, tau=golden["tau"], eta=golden["eta"], gradient_checkpointing=checkpointing)
    assert trainer.project(model, golden_batch("safe")) == pytest.approx(golden["step"], rel=1e-4)
    if case == "satisfied":
        assert same_bits(weights(model), expected)
    else:
        assert worst_entry(moved(weights(model), before), moved(expected, before)) < 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_the_users_step_is_plain(settings, checkpointing):
    trainer = spard(settings, golden_model(), gradient_checkpointing=checkpointing)
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4
    assert loss.item() == pytest.approx(golden_case("sft")["loss"], rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_projection_on_other_models(settings, model):
    model, batch = MODELS[model](), golden_batch("safe")
    before = weights(model)
    expected = reference.spag(model, batch, 0.2, 1e9)
    spard(settings, model, eta=1e9).project(model, batch)
    assert worst_entry(moved(weights(model), before), moved(expected, before)) < 1e-3


class Rates(TrainerCallback):
    """Notes the learning rate of every update."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **_):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_trust_region_is_the_rate_of_the_users_step(settings):
    noted = Rates()
    trainer = spard(settings, callbacks=[noted], lr_scheduler_type="cosine", warmup_steps=2, max_steps=6)
    trainer.train()
    assert noted.seen[0] == 0.0 < noted.seen[-1] < noted.seen[2] == 1e-3
    assert [entry["projection_step"] for entry in logged_updates(trainer)] == noted.seen


def test_eta_stands_above_the_rate(settings):
    trainer = spard(settings, eta=0.01, lr_scheduler_type="cosine", max_steps=3)
    trainer.train()
    assert [entry["projection_step"] for entry in logged_updates(trainer)] == [0.01] * 3


def test_projection_follows_the_users_step(settings):
    """By hand: θ⁺ = θ − lr · g(θ; B), then the projection of θ⁺, three times over."""
    model = tiny_llama()
    expected = copy.deepcopy(model)
    changes = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05, "max_grad_norm": 0.0}
    trainer = spard(
        settings, model, rows=12, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, **changes
    )
    windows, safety = noted_windows(trainer), Noted(trainer.safety_batches)
    trainer.safety_batches = safety
    trainer.train()
    logs = logged_updates(trainer)
    for window, batch, entry in zip(windows, safety.seen, logs, strict=True):
        assert len(batch["labels"]) == 1
        expected = reference.moved(expected, reference.sft(expected, window), -0.05)
        assert entry["safety_loss"] == pytest.approx(reference.plain_loss(expected, [batch]).item(), rel=1e-4)
        expected.load_state_dict(reference.spag(expected, batch, 0.2, 0.05), strict=False)
    assert all(entry["projection_step"] > 0 for entry in logs)
    assert relative_distance(weights(model), weights(expected)) < 1e-5


def adamw_projection(model, optimizer, batches, tau):
    """The released code's, by hand."""
    loss = reference.plain_loss(model, batches)
    optimizer.zero_grad()
    if loss.item() <= tau + 0.1:
        return
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for parameter in model.parameters():
        parameter.grad *= min((loss.item() - tau) / parameter.grad.norm().item(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("tau", [0.2, 4.5])
def test_adamw_rule_steps_with_the_users_moments(settings, tau):
    """At the larger τ parts of the gradient are scaled down, and some updates are left alone."""
    model = tiny_llama()
    twin = copy.deepcopy(model)
    changes = {"lr_scheduler_type": "constant", "adam_epsilon": 1e-4, "max_steps": 4}
    trainer = spard(settings, model, rows=16, projection="adamw", tau=tau, **changes)
    windows, safety = noted_windows(trainer), Noted(trainer.safety_batches)
    trainer.safety_batches = safety
    trainer.train()
    assert len(safety.seen) == 4 * 4
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.0)
    for update, window in enumerate(windows):
        optimizer.zero_grad()
        reference.plain_loss(twin, window).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        adamw_projection(twin, optimizer, safety.seen[4 * update : 4 * update + 4], tau)
    assert {entry["projection_step"] > 0 for entry in logged_updates(trainer)} == ({True} if tau < 1 else {True, False})
    before = weights(tiny_llama())
    assert relative_distance(moved(weights(model), before), moved(weights(twin), before)) < 1e-3


@pytest.mark.parametrize(
    ("projection", "excess", "steps"),
    [("euclidean", 0.01, True), ("euclidean", -0.01, False), ("adamw", 0.11, True), ("adamw", 0.09, False)],
)
def test_what_it_takes_to_be_projected(settings, projection, excess, steps):
    model = golden_model()
    before = weights(model)
    trainer = spard(settings, model, projection=projection, tau=SAFETY_LOSS - excess)
    trainer.create_optimizer_and_scheduler(1)
    step = trainer.project(model, golden_batch("safe"))
    assert (step > 0) is steps
    assert same_bits(weights(model), before) is not steps
    assert bool(trainer.optimizer.state_dict()["state"]) is (steps and projection == "adamw")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("changes", "batches"), [({"safety_batch_size": 3}, 1), ({"projection": "adamw"}, 4)])
def test_safety_batches_of_an_update(settings, changes, batches):
    trainer = spard(settings, max_steps=2, **changes)
    safety = trainer.safety_batches = Noted(trainer.safety_batches)
    trainer.train()
    assert [len(batch["labels"]) for batch in safety.seen] == [changes.get("safety_batch_size", 1)] * 2 * batches


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("projection", ["euclidean", "adamw"])
def test_routers_loss_is_not_part_of_the_safety_loss(settings, projection, accumulation):
    """Directly, and whatever the accumulation: a large coefficient must not keep the loss above τ for ever."""
    model, batch = mixtral(router_loss=100.0), golden_batch("safe")
    loss = reference.plain_loss(model, [batch]).item()
    expected = reference.spag(model, batch, 0.2, 1e9)
    changes = {"projection": projection, "gradient_accumulation_steps": accumulation}
    satisfied = spard(settings, model, tau=loss + 0.01, **changes)
    satisfied.create_optimizer_and_scheduler(1)
    assert satisfied.project(model, batch) == 0.0
    assert satisfied._metrics["train"]["safety_loss"] == [pytest.approx(loss, rel=1e-5)]
    if projection == "euclidean":
        before = weights(model)
        spard(settings, model, eta=1e9, **changes).project(model, batch)
        assert worst_entry(moved(weights(model), before), moved(expected, before)) < 1e-3


@pytest.mark.parametrize(
    ("projection", "batches", "message"),
    [
        ("euclidean", [], "a loss needs a batch, got none"),
        ("euclidean", ["safe", "refusal"], "--projection euclidean projects on one safety batch, got 2"),
        ("adamw", [], "a loss needs a batch, got none"),
        ("adamw", ["safe"], "--projection adamw takes a step of the optimizer, which is there once training has begun"),
    ],
)
def test_projection_that_cannot_be_made(settings, projection, batches, message):
    model = golden_model()
    with pytest.raises(InputError, match=message):
        spard(settings, model, projection=projection).project(model, *map(golden_batch, batches))
    assert same_bits(weights(model), weights(golden_model()))


def test_safety_batches_that_end_too_early(settings):
    trainer = spard(settings, projection="adamw", max_steps=1)
    trainer.safety_batches = iter([golden_batch("safe")] * 3)
    with pytest.raises(InputError, match="come to an end: SpardTrainer needs 4 for an update, 3 were left"):
        trainer.train()


def test_safety_data_is_required(settings):
    with pytest.raises(InputError, match="--safety_data"):
        SpardTrainer(tiny_llama(), SpardConfig(**settings), word_rows(4), processing_class=word_tokenizer())


def test_released_code_has_no_trust_region(settings):
    with pytest.raises(InputError, match="--eta belongs to --projection euclidean"):
        SpardConfig(**settings, eta=0.1, projection="adamw")


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", 0.0), ("tau", math.nan), ("eta", 0.0), ("eta", -1.0), ("safety_batch_size", 0), ("projection", "sgd")],
)
def test_settings_that_cannot_be_used_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        SpardConfig(**settings, **{name: value})


def test_defaults_are_those_of_the_paper(tmp_path):
    config = SpardConfig(output_dir=str(tmp_path))
    assert (config.tau, config.eta, config.projection, config.safety_batch_size) == (0.2, None, "euclidean", 1)
