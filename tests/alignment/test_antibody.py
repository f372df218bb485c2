"""Antibody's alignment stage: golden cases, the moving average, zero gradients, logs, refused settings."""

import math

import pytest

import reference
from helpers import (
    golden_batch,
    golden_case,
    golden_model,
    golden_refusals,
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
from holdfast.alignment.antibody import AntibodyAlignmentConfig, AntibodyAlignmentTrainer
from holdfast.errors import InputError
from methods import METHODS, REFUSAL, view

RULES = ["kkt", "cosine"]
RHO, REFUSAL_WEIGHT = 0.1, 0.05


def antibody(settings, rule="cosine", model=None, harmful=None, **changes):
    method = METHODS[f"antibody_align_{rule}"]
    trainer = method.build(model if model is not None else tiny_llama(), settings, **changes)
    if harmful is not None:
        trainer.attack_batches = iter(harmful)
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_golden_gradient(settings, rule, checkpointing):
    model = golden_model()
    before = weights(model)
    trainer = antibody(settings, rule, model, [golden_refusals()], gradient_checkpointing=checkpointing)
    loss = trainer.training_step(model, golden_batch("safe"))
    assert worst_entry(gradients(model), golden_vector(f"antibody_align_{rule}")) < 1e-4
    assert loss.item() == pytest.approx(golden_case(f"antibody_align_{rule}")["loss"], rel=1e-6)
    assert same_bits(before, weights(model))


@pytest.mark.parametrize(
    ("harmful", "message"),
    [
        ([golden_batch("harmful")], "a batch lacks refusal_input_ids and refusal_attention_mask and refusal_labels"),
        ([], "come to an end: AntibodyAlignmentTrainer needs 1 for an update, 0 were left"),
    ],
    ids=["no refusals", "ended"],
)
def test_attack_batches_that_cannot_be_used(settings, harmful, message):
    trainer = antibody(settings, harmful=harmful)
    with pytest.raises(InputError, match=message):
        trainer.training_step(trainer.model, golden_batch("safe"))


@pytest.mark.parametrize("rule", RULES)
def test_logs(settings, rule):
    model, harmful = golden_model(), golden_refusals()
    g = reference.sft(model, [harmful])
    after = reference.moved(model, g, -RHO / reference.size(g))
    passes = [(model, [harmful]), (after, [harmful]), (after, [view(harmful)])]
    losses = [reference.plain_loss(*one).item() for one in passes]
    trainer = antibody(settings, rule, model, [harmful], rows=golden_rows("safe"), max_steps=1)
    trainer.train()
    [logs] = logged_updates(trainer)
    golden = golden_case(f"antibody_align_{rule}")
    assert logs["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    assert logs["flatness_weight"] == pytest.approx(golden["lambda_t"], rel=1e-4)
    assert logs["harmful_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert logs["harmful_gain"] == pytest.approx(losses[0] - losses[1], rel=1e-3)
    assert logs["refusal_loss"] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_moving_average_belongs_to_the_cosine_rule(settings, rule):
    """Two updates of the same weights by hand: λ₂ = 0.99 λ₁ + 0.01 · (what λ₂ would be by itself), or just that."""
    model, harmful = golden_model(), golden_refusals()
    strength = 0.1 if rule == "kkt" else 0.5
    g_harmful = reference.sft(model, [harmful])
    after = reference.moved(model, g_harmful, -RHO / reference.size(g_harmful))
    flatness = reference.combined((1, g_harmful), (-1, reference.sft(after, [harmful])))
    refusing = reference.sft(after, [view(harmful)])
    updates = [reference.sft(model, [golden_batch(name)]) for name in ("safe", "refusal")]

    def alone(g):
        over = reference.size(flatness) * (reference.size(flatness) if rule == "kkt" else reference.size(g))
        return max(0, strength - reference.product(flatness, g) / over)

    first, second = (alone(g) for g in updates)
    assert abs(second - first) > 0.05 * first
    expected = second if rule == "kkt" else 0.99 * first + 0.01 * second

    trainer = antibody(settings, rule, model, [harmful] * 2, strength=strength)
    for name in ("safe", "refusal"):
        trainer.training_step(model, golden_batch(name))
    terms = (1, updates[1]), (expected, flatness), (REFUSAL_WEIGHT, refusing)
    assert worst_entry(gradients(model), reference.combined(*terms)) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_harmful_gradient_of_zero(settings, rule):
    harmful = golden_refusals()
    harmful["labels"].fill_(-100)
    model = golden_model()
    terms = (1, golden_vector("sft")), (REFUSAL_WEIGHT, reference.sft(model, [view(harmful)]))
    trainer = antibody(settings, rule, model, [harmful])
    assert math.isfinite(trainer.training_step(model, golden_batch("safe")).item())
    assert worst_entry(gradients(model), reference.combined(*terms)) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_harmful_passes_share_their_dropout_masks(settings, checkpointing):
    """A step too short to change a bit gains nothing."""
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = antibody(settings, model=tiny_llama(attention_dropout=0.4), rows=16, rho=1e-30, **changes)
    trainer.train()
    assert [entry["harmful_gain"] for entry in logged_updates(trainer)] == [0.0, 0.0]
    losses = [trainer.training_step(trainer.model, golden_batch("safe")).item() for _ in range(2)]
    assert losses[0] != losses[1]  # dropout is on


def test_every_train_batch_comes_with_a_harmful_one_and_its_refusals(settings):
    trainer = antibody(settings, rows=12, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    assert trainer.attack_batches.drawn == 6
    refused = view(next(trainer.attack_batches))
    asked = refused["input_ids"][refused["labels"] != -100]
    assert word_tokenizer().decode(asked) == " ".join([f"{REFUSAL} t2"] * 2)


def test_attack_data_is_required(settings):
    with pytest.raises(InputError, match="--attack_data"):
        AntibodyAlignmentTrainer(
            tiny_llama(), AntibodyAlignmentConfig(**settings), word_rows(4), processing_class=word_tokenizer()
        )


def test_refusal_without_a_token(settings):
    with pytest.raises(InputError, match="--refusal ' ' comes to no token"):
        antibody(settings, refusal=" ")


def test_kkt_has_no_strength_of_its_own(settings):
    with pytest.raises(InputError, match="--strength must be given with --flatness_rule kkt"):
        AntibodyAlignmentConfig(**settings, flatness_rule="kkt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", 0.0),
        ("rho", math.nan),
        ("refusal_weight", -0.1),
        ("strength", -1.0),
        ("strength", math.nan),
        ("flatness_rule", "sine"),
        ("packing", True),
        ("padding_free", True),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        AntibodyAlignmentConfig(**settings, **{name: value})


def test_defaults_are_published_ones(tmp_path):
    config = AntibodyAlignmentConfig(output_dir=str(tmp_path))
    assert (config.rho, config.refusal_weight, config.flatness_rule, config.strength) == (0.1, 0.05, "cosine", 5.0)
