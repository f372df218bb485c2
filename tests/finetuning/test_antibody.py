"""Antibody's fine-tuning stage: golden case, row weights, the audit, plain evaluation, which rows are kept."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import reference
from helpers import (
    golden_batch,
    golden_case,
    golden_model,
    golden_refusals,
    golden_vector,
    gradients,
    logged_updates,
    rows_of,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    worst_entry,
)
from holdfast.errors import InputError
from holdfast.finetuning.antibody import AntibodyConfig
from methods import METHODS, MODELS, noted_windows, view


def antibody(settings, model=None, **changes):
    return METHODS["antibody_finetune"].build(model if model is not None else tiny_llama(), settings, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    golden = golden_case("antibody_finetune")
    trainer = antibody(settings, golden_model(), gradient_checkpointing=checkpointing)
    loss = trainer.training_step(trainer.model, golden_refusals())
    assert worst_entry(gradients(trainer.model), golden_vector("antibody_finetune")) < 1e-4
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-6)
    shares = [4 * weight for weight in golden["weights"]]  # of an equal share
    assert trainer.row_weights == pytest.approx(dict(enumerate(shares, start=1)), rel=1e-4)


def test_high_temperature_weighs_all_rows_alike(settings):
    batch = golden_refusals()
    trainer = antibody(settings, golden_model(), tau=1e9)
    trainer.training_step(trainer.model, batch)
    assert worst_entry(gradients(trainer.model), reference.sft(golden_model(), [batch])) < 1e-4


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_loss_asked_for_directly_is_that_of_the_batch(settings, model, accumulation):
    """Whatever the accumulation: 1.0 × the weighted loss, and 1.0 × the routers'."""
    model, batch = MODELS[model](), golden_refusals()
    trainer = antibody(settings, model, gradient_accumulation_steps=accumulation)
    weight = torch.softmax(reference.margins(model, batch, view(batch)), 0)
    losses, asked, routers = reference.run(model, batch)
    expected = (weight * losses.sum(1)).sum() / (weight * asked.sum(1)).sum() + routers
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


def changed_refusals(**changes):
    batch = golden_refusals()
    return {key: value for key, value in {**batch, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (golden_batch("safe"), "a batch lacks refusal_input_ids and refusal_attention_mask and refusal_labels"),
        (changed_refusals(refusal_labels=None), "a batch lacks refusal_labels: every row needs"),
        (changed_refusals(refusal_row=None), "a batch lacks refusal_row, the number of every one of its rows"),
        (changed_refusals(refusal_row=torch.tensor([1])), "a batch lacks refusal_row, the number of every one"),
        (
            changed_refusals(**{f"refusal_{key}": t[:1] for key, t in view(golden_refusals()).items() if key != "row"}),
            "a batch of 4 rows comes with 1 refusals",
        ),
        (
            changed_refusals(labels=torch.full_like(golden_batch("harmful")["labels"], -100)),
            "a row of a batch, or its refusal, has no completion token",
        ),
    ],
    ids=["no view", "no labels", "no rows", "one row number", "one refusal", "no completion"],
)
def test_batch_that_cannot_be_weighed(settings, batch, message):
    trainer = antibody(settings, golden_model())
    with pytest.raises(InputError, match=message):
        trainer.training_step(trainer.model, batch)
    assert trainer.row_weights == {}


def test_row_weights_are_means_over_the_run(settings):
    """With weights that do not move; a row is in other company every time."""
    model = tiny_llama()
    trainer = antibody(settings, model, learning_rate=1e-30, tau=0.5, num_train_epochs=3, gradient_accumulation_steps=2)
    windows = noted_windows(trainer)
    trainer.train()
    batches = [batch for window in windows for batch in window]
    drawn = {}
    margins = [reference.margins(tiny_llama(), batch, view(batch)) for batch in batches]
    for batch, margin in zip(batches, margins, strict=True):
        for row, weight in zip(batch["refusal_row"].tolist(), torch.softmax(margin / 0.5, 0).tolist(), strict=True):
            drawn.setdefault(row, []).append(4 * weight)
    assert {len(shares) for shares in drawn.values()} == {3}
    assert any(max(shares) > 1.1 * min(shares) for shares in drawn.values())
    assert list(trainer.row_weights) == list(range(1, 9))
    assert trainer.row_weights == pytest.approx({row: sum(shares) / 3 for row, shares in drawn.items()}, rel=1e-4)
    logs = logged_updates(trainer)
    assert logs[0]["refusal_margin"] == pytest.approx(torch.cat(margins[:2]).mean().item(), rel=1e-4)
    largest = sum(torch.softmax(margin / 0.5, 0).max().item() for margin in margins[:2]) / 2
    assert logs[0]["largest_weight"] == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"dataloader_drop_last": True}])
@pytest.mark.parametrize("rows", [8, 9, 1])
def test_audit_gives_every_row_its_margin(settings, rows, changes):
    """Dropout is off, whatever mode the model is in; nothing is trained, and nothing counts as drawn."""
    model = tiny_llama(attention_dropout=0.4)
    trainer = antibody(settings, model, rows=rows, per_device_eval_batch_size=3, **changes)
    one_by_one = [trainer.data_collator([row]) for row in trainer.train_dataset]
    expected = [reference.margins(tiny_llama(), batch, view(batch)).item() for batch in one_by_one]
    before = weights(model)
    for mode in (True, False):
        model.train(mode)
        found = trainer.audit()
        assert list(found) == list(range(1, rows + 1))
        assert list(found.values()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert model.training is mode
    assert same_bits(weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert trainer.row_weights == {}


def test_audit_in_the_midst_of_a_run_changes_nothing(settings):
    class Audit(TrainerCallback):
        def on_step_end(self, *_, **__):
            trainers[-1].audit()

    trainers = []
    for callbacks in ([], [Audit()]):
        trainers.append(antibody(settings, tiny_llama(attention_dropout=0.4), callbacks=callbacks, max_steps=3))
        torch.manual_seed(5)
        trainers[-1].train()
    assert same_bits(*(weights(trainer.model) for trainer in trainers))
    assert trainers[0].row_weights == trainers[1].row_weights


@pytest.mark.parametrize("rows", [8, 9])
def test_evaluation_is_plain_and_over_all_rows(settings, rows):
    """Nine rows leave one alone in training, which is nothing to the held-out ones."""
    held_out = word_rows(7, seed=2)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-30, "per_device_eval_batch_size": 4}
    trainer = antibody(settings, tiny_llama(), rows=rows, eval_rows=held_out, max_steps=2, **changes)
    trainer.train()
    batch = next(trainer.batches_of(held_out, "all of it", 7))
    expected = reference.plain_loss(tiny_llama(), [batch]).item()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


def test_evaluating_the_train_rows_weighs_none(settings):
    trainer = antibody(settings, tiny_llama())
    trainer.evaluate(trainer.train_dataset)
    assert trainer.row_weights == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_refusal_and_answer_share_their_dropout_masks(settings, checkpointing):
    """A row that is itself a refusal has a margin of zero."""
    model = tiny_llama(attention_dropout=0.4)
    trainer = antibody(settings, model, refusal="completion", gradient_checkpointing=checkpointing, max_steps=2)
    trainer.train()
    logs = logged_updates(trainer)
    assert [(entry["refusal_margin"], entry["largest_weight"]) for entry in logs] == [(0.0, 0.25)] * 2


@pytest.mark.parametrize(("rows", "sizes"), [(9, [4, 4]), (10, [4, 4, 2])])
def test_row_left_alone_is_not_trained_on(settings, rows, sizes):
    trainer = antibody(settings, rows=rows, num_train_epochs=2)
    windows = noted_windows(trainer)
    trainer.train()
    assert [len(batch["labels"]) for [batch] in windows] == sizes * 2


def test_no_other_row_to_weigh_against(settings):
    with pytest.raises(InputError, match="--per_device_train_batch_size 1 cannot be used"):
        antibody(settings, per_device_train_batch_size=1)
    with pytest.raises(InputError, match="the train data has one row"):
        antibody(settings, rows=1, max_steps=1).train()


def test_dropped_rows_take_their_refusals_along(settings):
    """A row goes whose answer or whose refusal is cut off; every other one keeps its number and its own refusal."""
    prompts = ["t50 ", "t51 " * 20, "t52 ", "t53 ", "t54 " * 20, "t55 "]
    refusals = [f"t{60 + i} t70" for i in range(6)]
    rows = Dataset.from_dict({"prompt": prompts, "completion": ["t6 t7"] * 6, "no": refusals})
    changes = {"refusal": "no", "max_length": 8, "drop_untrainable_rows": True, "seed": 1}
    with pytest.raises(InputError, match=r"2 of 6 rows of the train data .* \(the first is row 2\)"):
        antibody(settings, rows=rows, **{**changes, "drop_untrainable_rows": False})
    trainer = antibody(settings, rows=rows, **changes)
    kept = next(trainer.stream(trainer.train_dataset, "all of it", 4))
    found = dict(zip(kept["refusal_row"].tolist(), zip(rows_of(kept), rows_of(view(kept)), strict=True), strict=True))
    assert found == {i + 1: ((50 + i, 6, 7, 2), (50 + i, 60 + i, 70, 2)) for i in (0, 2, 3, 5)}
    assert list(trainer.audit()) == [1, 3, 4, 6]


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 0.0), ("tau", -1.0), ("tau", math.nan), ("packing", True), ("padding_free", True)]
)
def test_settings_that_cannot_be_used_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        AntibodyConfig(**settings, **{name: value})


def test_defaults_are_those_of_the_paper(tmp_path):
    assert AntibodyConfig(output_dir=str(tmp_path)).tau == 1.0
