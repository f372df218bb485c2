"""Lisa: golden case, the two states and the rows they use, the anchor, Bi-State Optimization, refused settings."""

import copy
import logging
import math

import pytest
import torch
from transformers import TrainerCallback

import reference
from helpers import (
    Gradients,
    Weights,
    golden_batch,
    golden_case,
    golden_model,
    golden_vector,
    gradients,
    logged_updates,
    rows_of,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.errors import InputError
from holdfast.finetuning.lisa import LisaConfig, LisaTrainer
from methods import METHODS, mixtral, noted_windows


def lisa(settings, model=None, **changes):
    """The proximal term is on from the first update."""
    return METHODS["lisa"].build(model if model is not None else tiny_llama(), settings, **changes)


def states(trainer):
    """The state that every update was made in, by its log."""
    logs = [entry.keys() & {"safety_loss", "user_loss"} for entry in logged_updates(trainer)]
    return "".join(name[0] for (name,) in logs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    trainer = lisa(settings, golden_model(), gradient_checkpointing=checkpointing)
    trainer.anchor = golden_vector("anchor")
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("lisa")) < 1e-4
    assert loss.item() == pytest.approx(golden_case("lisa")["loss"], rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"rho": 0.0}, {"proximal_start": 1.0}])
def test_gradient_without_an_anchor_or_a_proximal_term(settings, changes):
    trainer = lisa(settings, golden_model(), **changes)
    trainer.state.max_steps = 9
    trainer.anchor = golden_vector("anchor") if changes else None
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("state", ["safety", "user"])
def test_only_the_users_rows_train_the_routers_loss(settings, state, accumulation):
    model, noted = mixtral(), Gradients()
    before = copy.deepcopy(model)
    changes = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "rho": 0.0}
    trainer = lisa(settings, model, callbacks=[noted], **changes)
    trainer.bi_state = state
    windows = noted_windows(trainer)
    trainer.train()
    expected = (reference.plain if state == "safety" else reference.sft)(before, windows[0])
    assert worst_entry(noted.seen[0], expected) < 1e-5


def test_states_take_turns_with_their_own_rows(settings):
    trainer = lisa(settings, per_device_train_batch_size=3, safety_steps=2, user_steps=3, max_steps=12)
    assert trainer.bi_state == "safety"
    windows = noted_windows(trainer)
    trainer.train()
    assert states(trainer) == "ssuuussuuuss"
    theirs = {tuple(ids) for ids in trainer.train_dataset["input_ids"]}
    for state, [batch] in zip(states(trainer), windows, strict=True):
        assert len(batch["labels"]) == 3
        assert set(rows_of(batch)) <= theirs if state == "u" else theirs.isdisjoint(rows_of(batch))


def test_no_row_is_lost_or_repeated_out_of_turn(settings):
    """Neither by safety states nor where an epoch ends in the midst of a window."""
    trainer = lisa(
        settings,
        rows=9,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        safety_steps=1,
        user_steps=2,
        num_train_epochs=4,
    )
    windows = noted_windows(trainer)
    trainer.train()
    assert states(trainer) == "suu" * 4
    safety = trainer.batches_of(word_rows(6, seed=1), "all of it", 6)
    for state, everything in (("u", trainer.train_dataset["input_ids"]), ("s", rows_of(next(safety)))):
        drawn = [
            row
            for at, window in zip(states(trainer), windows, strict=True)
            for batch in window
            for row in rows_of(batch)
            if at == state
        ]
        cycles = [sorted(drawn[i : i + len(everything)]) for i in range(0, len(drawn), len(everything))]
        assert len(cycles) > 2
        assert all(cycle == sorted(map(tuple, everything)) for cycle in cycles[:-1])
        assert len(set(cycles[-1])) == len(cycles[-1])


class Anchors(TrainerCallback):
    """Notes the anchor of every update."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []

    def on_pre_optimizer_step(self, *_, **__):
        self.seen.append({name: anchor.clone() for name, anchor in self.trainer.anchor.items()})


def test_anchor_is_where_the_other_state_ended(settings):
    noted = Weights()
    trainer = lisa(settings, callbacks=[noted], safety_steps=2, user_steps=3, max_steps=8)
    anchors = Anchors(trainer)
    trainer.add_callback(anchors)
    start = weights(trainer.model)
    trainer.train()
    ends = {0: start, **dict(enumerate(noted.seen, start=1))}
    for anchor, end in zip(anchors.seen, [0, 0, 2, 2, 2, 5, 5, 7], strict=True):
        assert same_bits(anchor, ends[end])


@pytest.mark.parametrize(("start", "plain"), [(0.0, 1), (0.5, 4), (0.6, 5), (1.0, 8)])
def test_proximal_term_comes_in_after_its_share_of_the_run(settings, start, plain):
    """`plain`: how many updates go by as with ρ = 0; the very first is made at the anchor itself."""
    runs = []
    for changes in ({"rho": 100.0, "proximal_start": start}, {"rho": 0.0}):
        runs.append(Weights())
        lisa(settings, callbacks=runs[-1:], safety_steps=3, user_steps=3, max_steps=8, **changes).train()
    alike = [same_bits(*seen) for seen in zip(*(run.seen for run in runs), strict=True)]
    assert alike == [True] * plain + [False] * (8 - plain)


def test_bi_state_optimization_keeps_no_anchor(settings):
    trainer = lisa(settings, rho=0.0, safety_steps=1, user_steps=1, max_steps=4)
    trainer.train()
    assert states(trainer) == "susu"
    assert trainer.anchor is None


def test_state_may_be_set(settings):
    class Again(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                trainer.bi_state = "user"  # as many user updates as if none had been

    trainer = lisa(settings, callbacks=[Again()], safety_steps=1, user_steps=2, max_steps=6)
    trainer.bi_state = "user"
    trainer.train()
    assert states(trainer) == "uuusuu"
    with pytest.raises(InputError, match="bi_state must be safety or user, got 'usr'"):
        trainer.bi_state = "usr"


def test_safety_batches_may_be_set(settings):
    trainer = lisa(settings, safety_steps=2, user_steps=2, max_steps=3)
    windows = noted_windows(trainer)
    trainer.safety_batches = iter([golden_batch("safe"), golden_batch("refusal")])
    trainer.train()
    assert [rows_of(batch) for [batch] in windows[:2]] == [rows_of(golden_batch(name)) for name in ("safe", "refusal")]


def test_safety_batches_that_end_too_early(settings):
    trainer = lisa(settings, safety_steps=2, user_steps=2, max_steps=3)
    trainer.safety_batches = iter([golden_batch("safe")])
    with pytest.raises(InputError, match="come to an end: LisaTrainer needs 1 for an update, 0 were left"):
        trainer.train()


def test_anchor_that_does_not_fit(settings):
    trainer = lisa(settings, golden_model())
    good = golden_vector("anchor")
    name = "model.norm.weight"
    for bad, message in (
        ({key: tensor for key, tensor in good.items() if key != name}, r"fails at model\.norm\.weight"),
        ({**good, name: torch.zeros(3)}, r"anchor\['model\.norm\.weight'\] has shape \(3,\), expected"),
        ({**good, name: torch.full_like(good[name], torch.inf)}, "anchor holds a number that is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            trainer.anchor = bad
    assert trainer.anchor is None


def test_safety_data_is_required(settings):
    with pytest.raises(InputError, match="--safety_data"):
        LisaTrainer(tiny_llama(), LisaConfig(**settings), word_rows(4), processing_class=word_tokenizer())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", -0.1),
        ("rho", math.nan),
        ("safety_steps", 0),
        ("user_steps", -1),
        ("proximal_start", -0.1),
        ("proximal_start", 1.1),
        ("proximal_start", math.nan),
    ],
)
def test_settings_out_of_range_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        LisaConfig(**settings, **{name: value})


def test_defaults_are_those_of_the_paper(tmp_path):
    config = LisaConfig(output_dir=str(tmp_path))
    assert (config.rho, config.safety_steps, config.user_steps, config.proximal_start) == (1.0, 100, 900, 0.1)


@pytest.mark.parametrize(("safety_steps", "told"), [(2, True), (1, False)])
def test_a_run_that_ends_before_the_users_turn_says_so(settings, caplog, safety_steps, told):
    with caplog.at_level(logging.WARNING, "holdfast"):
        lisa(settings, max_steps=2, safety_steps=safety_steps, user_steps=1).train()
    assert ("the run ends before the user's data are trained on (--safety_steps 2, 2 updates)" in caplog.text) is told
