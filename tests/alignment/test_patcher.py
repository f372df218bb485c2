"""Patcher: golden cases, simulated attacks inside a run, the attack vector's life, bad settings."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

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
    relative_distance,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.attacks.simulated import simulate_attack
from holdfast.errors import InputError, TrainingError
from methods import MODELS, mixtral, noted_windows


def patcher(settings, model=None, rows=None, attack_rows=None, callbacks=(), peft_config=None, **changes):
    return PatcherTrainer(
        model if model is not None else tiny_llama(),
        PatcherConfig(**{**settings, **changes}),
        rows if rows is not None else word_rows(16),
        attack_rows if attack_rows is not None else word_rows(12, seed=1),
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    trainer = patcher(settings, golden_model(), gradient_checkpointing=checkpointing)
    trainer.attack_vector = golden_vector("attack_vector")
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("patcher")) < 1e-4
    assert loss.item() == pytest.approx(5.32571268081665, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_golden_gradient_inside_training(settings, accumulation, checkpointing):
    noted = Gradients()
    trainer = patcher(
        settings,
        golden_model(),
        golden_rows("safe"),
        callbacks=[noted],
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        gradient_checkpointing=checkpointing,
        max_grad_norm=0.0,
        max_steps=1,
    )
    trainer.attack_vector = golden_vector("attack_vector")
    trainer.train()
    assert worst_entry(noted.seen[0], golden_vector("patcher")) < 1e-4
    logs = trainer.state.log_history[0]
    assert logs["safe_loss"] == pytest.approx(5.32571268081665, rel=1e-5)
    assert logs["attacked_loss"] == pytest.approx(5.254823207855225, rel=1e-5)
    assert logs["loss_gap"] == pytest.approx(5.254823207855225 - 5.32571268081665, rel=1e-3)
    assert logs["loss"] == pytest.approx(logs["safe_loss"], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_formula_on_other_models(settings, model, accumulation):
    """Tied embeddings, grouped heads, experts, adapters; the window whole or in two parts."""
    model, noted = MODELS[model](), Gradients()
    before = copy.deepcopy(model)
    torch.manual_seed(2)
    vector = {name: 0.02 * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    changes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = patcher(
        settings,
        model,
        golden_rows("safe"),
        callbacks=[noted],
        alpha=0.3,
        max_grad_norm=0.0,
        max_steps=1,
        **changes,
    )
    trainer.attack_vector = vector
    windows = noted_windows(trainer)
    trainer.train()
    assert worst_entry(noted.seen[0], reference.patcher(before, windows[0], vector, 0.3)) < 1e-5


def test_logged_losses_are_cross_entropies(settings):
    """On a model whose routers' auxiliary loss is trained, too."""
    model, batch = mixtral(), golden_batch("safe")
    vector = {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}
    safe, attacked = (reference.plain_loss(m, [batch]).item() for m in (model, reference.moved(model, vector, 1)))
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    for set_by_hand in (None, vector):
        trainer = patcher(settings, model, golden_rows("safe"), learning_rate=1e-30, **changes)
        trainer.attack_vector = set_by_hand
        trainer.train()
        [logs] = logged_updates(trainer)
        assert logs["safe_loss"] == pytest.approx(safe, rel=1e-5)
        assert logs["loss"] == pytest.approx(safe + 0.5 * logs["aux_loss"], rel=1e-5)
    assert logs["attacked_loss"] == pytest.approx(attacked, rel=1e-5)
    assert logs["loss_gap"] == pytest.approx(attacked - safe, rel=1e-3)


def test_alpha_weighs_the_two_gradients(settings):
    vector = golden_vector("attack_vector")
    taken = {}
    for alpha in (0.0, 0.25, 1.0):
        trainer = patcher(settings, golden_model(), alpha=alpha)
        trainer.attack_vector = vector
        trainer.training_step(trainer.model, golden_batch("safe"))
        taken[alpha] = gradients(trainer.model)
    assert worst_entry(taken[0.0], golden_vector("sft")) < 1e-4
    mixed = {name: 0.75 * taken[0.0][name] + 0.25 * taken[1.0][name] for name in taken[0.0]}
    assert worst_entry(taken[0.25], mixed) < 1e-6
    assert worst_entry(taken[1.0], taken[0.0]) > 1e-2

    moved = golden_model()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter += vector[name]
    trainer = patcher(settings, moved, alpha=0.0)
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(taken[1.0], gradients(moved)) < 1e-6


def test_first_updates_are_plain_sft_and_then_attacks_come_in_turn(settings):
    runs = {}
    for every in (2, 100):
        noted = Weights()
        trainer = patcher(settings, callbacks=[noted], attack_every=every, attack_steps=3, max_steps=6)
        trainer.train()
        runs[every] = noted.seen, trainer
    defended, trainer = runs[2]
    plain, sft = runs[100]
    assert all(same_bits(defended[i], plain[i]) for i in (0, 1))
    assert not same_bits(defended[2], plain[2])
    assert sft.attack_vector is None
    steps = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, entry in steps.items() if "attack_vector_norm" in entry] == [3, 5]
    assert [step for step, entry in steps.items() if "attacked_loss" in entry] == [3, 4, 5, 6]
    assert all(
        entry["loss_gap"] == pytest.approx(entry["attacked_loss"] - entry["safe_loss"], abs=1e-5)
        for step, entry in steps.items()
        if step > 2
    )
    norm = math.sqrt(sum(t.square().sum().item() for t in trainer.attack_vector.values()))
    assert steps[5]["attack_vector_norm"] == pytest.approx(norm, rel=1e-5)
    assert all({"attacker_first_loss", "attacker_last_loss"} <= steps[step].keys() for step in (3, 5))
    assert not any("attack" in key for entry in sft.state.log_history for key in entry)


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_simulated_attack_is_the_one_of_its_definition(settings, model):
    """θ_att − θ, computed by hand: AdamW at a constant rate on the clipped mean loss of the stream's batches."""
    trainer = patcher(settings, MODELS[model](), attack_steps=4, attack_learning_rate=3e-3)
    trainer.attack(trainer.model)
    twin = MODELS[model]()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-3, weight_decay=0.01)
    start = weights(twin)
    stream = patcher(settings).attack_batches
    for _ in range(4):
        batch = next(stream)
        logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    expected = {name: parameter.detach() - start[name] for name, parameter in twin.named_parameters()}
    assert relative_distance(trainer.attack_vector, expected) < 1e-3


def test_attacker_does_not_follow_the_defenders_optimizer(settings):
    defender = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.01}
    vectors = []
    for changes in ({}, {**defender, "lr_scheduler_type": "cosine", "warmup_steps": 5, "optim": "sgd"}):
        trainer = patcher(settings, attack_steps=3, **changes)
        trainer.attack(trainer.model)
        vectors.append(trainer.attack_vector)
    assert same_bits(*vectors)


def test_attack_rate_defaults_to_the_defenders(settings):
    vectors = []
    for changes in ({"learning_rate": 2e-3}, {"attack_learning_rate": 2e-3}, {}):
        trainer = patcher(settings, attack_steps=2, **changes)
        trainer.attack(trainer.model)
        vectors.append(trainer.attack_vector)
    assert same_bits(vectors[0], vectors[1])
    assert not same_bits(vectors[0], vectors[2])


def test_attack_weight_decay_reaches_the_attacker(settings):
    norms = []
    for decay in (0.0, 50.0):
        trainer = patcher(settings, attack_steps=2, attack_weight_decay=decay)
        trainer.attack(trainer.model)
        norms.append(sum(t.square().sum().item() for t in trainer.attack_vector.values()))
    assert norms[1] > 2 * norms[0]


def test_attacker_draws_a_whole_window_unless_told(settings):
    vectors = {}
    for name, changes in {
        "whole": {"per_device_train_batch_size": 4},
        "split": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "given": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "attack_batch_size": 4},
        "smaller": {"per_device_train_batch_size": 4, "attack_batch_size": 3},
    }.items():
        trainer = patcher(settings, attack_steps=3, **changes)
        trainer.attack(trainer.model)
        vectors[name] = trainer.attack_vector
    assert same_bits(vectors["whole"], vectors["given"])
    assert relative_distance(vectors["split"], vectors["whole"]) < 1e-3
    assert relative_distance(vectors["smaller"], vectors["whole"]) > 1e-1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attack_leaves_the_weights_bit_identical(settings, dtype):
    trainer = patcher(settings, tiny_llama(tie_word_embeddings=True).to(dtype), attack_steps=3, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.attack(trainer.model)
    assert same_bits(before, weights(trainer.model))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert "lm_head.weight" not in trainer.attack_vector


def test_no_attacker_state_is_left_behind(settings):
    """A second attack from the same weights and batches finds the same vector."""
    trainer = patcher(settings, attack_steps=3)
    batches = [next(trainer.attack_batches) for _ in range(3)]
    vectors = []
    for _ in range(2):
        trainer.attack_batches = iter(batches)
        trainer.attack(trainer.model)
        vectors.append(trainer.attack_vector)
    assert same_bits(*vectors)


def test_attack_batches_may_be_set(settings):
    trainer = patcher(settings, golden_model(), attack_steps=5)
    trainer.attack_batches = iter([golden_batch(str(i), "attack_steps") for i in range(5)])
    trainer.attack(trainer.model)
    assert relative_distance(trainer.attack_vector, golden_vector("simulated_attack_vector")) < 1e-4


def test_interrupted_attack_gives_the_weights_back(settings):
    trainer = patcher(settings, attack_steps=5)
    before = weights(trainer.model)

    def two_batches():
        yield from (golden_batch("harmful"), golden_batch("harmful"))
        raise KeyboardInterrupt

    trainer.attack_batches = two_batches()
    with pytest.raises(KeyboardInterrupt):
        trainer.attack(trainer.model)
    assert same_bits(before, weights(trainer.model))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_non_finite_attack_is_discarded_and_training_goes_on(settings, caplog):
    broken = patcher(settings, attack_every=2, attack_steps=4, attack_learning_rate=1e30, max_steps=5)
    plain = patcher(settings, attack_every=100, max_steps=5)
    with caplog.at_level(logging.WARNING, "holdfast"):
        broken.train()
    plain.train()
    messages = [record.getMessage() for record in caplog.records if "discarded" in record.getMessage()]
    assert [f"after update {step} is discarded" in text for step, text in zip((2, 4), messages, strict=True)] == [
        True
    ] * 2
    assert broken.attack_vector is None
    assert same_bits(weights(broken.model), weights(plain.model))


def test_attack_whose_last_step_overflows_is_discarded(settings):
    """Every loss is finite, the vector is not."""
    trainer = patcher(settings)
    before = weights(trainer.model)
    found = simulate_attack(trainer, trainer.model, trainer.attack_batches, steps=1, learning_rate=1e39)
    assert found.vector is None
    assert "not finite" in found.discarded
    assert same_bits(before, weights(trainer.model))


def test_discarded_attack_drops_the_previous_vector(settings):
    trainer = patcher(settings, attack_steps=3)
    trainer.attack(trainer.model)
    assert trainer.attack_vector is not None
    trainer.args.attack_learning_rate = 1e30
    trainer.attack(trainer.model)
    assert trainer.attack_vector is None


def test_vector_set_by_hand_defends_every_step(settings):
    trainer = patcher(settings, attack_every=1, attack_steps=2, max_steps=3)
    vector = {name: torch.full_like(p, 0.01) for name, p in trainer.model.named_parameters()}
    trainer.attack_vector = vector
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("attacked_loss" in entry for entry in logs)
    assert not any("attack_vector_norm" in entry for entry in logs)
    assert same_bits(trainer.attack_vector, vector)
    assert trainer.attack_batches.drawn == 0
    trainer.attack_vector = None
    assert trainer.attack_vector is None


def test_vector_set_by_hand_is_checked(settings):
    trainer = patcher(settings)
    good = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    name = "model.norm.weight"
    for odd in ([1], dict.fromkeys(good, 1.0)):
        with pytest.raises(InputError, match="attack_vector must hold one tensor per trainable parameter, by name"):
            trainer.attack_vector = odd
    with pytest.raises(InputError, match=r"fails at model\.norm\.weight"):
        trainer.attack_vector = {key: t for key, t in good.items() if key != name}
    with pytest.raises(InputError, match="fails at extra"):
        trainer.attack_vector = {**good, "extra": torch.zeros(1)}
    with pytest.raises(InputError, match=r"'model\.norm\.weight'\] has shape \(3,\), expected \(16,\)"):
        trainer.attack_vector = {**good, name: torch.zeros(3)}
    with pytest.raises(InputError, match="not finite"):
        trainer.attack_vector = {**good, name: torch.full((16,), torch.nan)}
    assert trainer.attack_vector is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_paired_passes_share_their_dropout_masks(settings, checkpointing):
    """Under a zero attack vector both passes must find the very same gradient."""
    trainer = patcher(settings, tiny_llama(attention_dropout=0.4), alpha=1.0, gradient_checkpointing=checkpointing)
    trainer.attack_vector = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    taken, losses = [], []
    for alpha in (0.0, 1.0):
        trainer.args.alpha = alpha
        torch.manual_seed(5)
        losses.append(trainer.training_step(trainer.model, golden_batch("safe")).item())
        taken.append({name: g.clone() for name, g in gradients(trainer.model).items()})
    assert same_bits(*taken)
    assert losses[0] == losses[1]
    assert trainer._metrics["train"]["loss_gap"] == [0.0, 0.0]
    torch.manual_seed(6)
    assert trainer.training_step(trainer.model, golden_batch("safe")).item() != losses[0]  # dropout is on


def test_lora_vector_holds_the_adapter_and_shares_its_dropout(settings):
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = patcher(settings, peft_config=lora, attack_every=2, attack_steps=3, max_steps=4)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.attack_vector.keys() == trained
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    trainer.attack_vector = {name: torch.zeros_like(t) for name, t in trainer.attack_vector.items()}
    trainer._metrics["train"].clear()
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert trainer._metrics["train"]["loss_gap"] == [0.0]


def test_tied_embeddings(settings):
    trainer = patcher(settings, tiny_llama(tie_word_embeddings=True), attack_every=1, attack_steps=2, max_steps=3)
    trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    assert trainer.attack_vector.keys() == dict(trainer.model.named_parameters()).keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_autocast(settings, checkpointing):
    """Gradients are those of float32 but for bf16's rounding, and the simulated attack runs in the same precision."""
    noted = Gradients()
    trainer = patcher(
        settings,
        golden_model(),
        golden_rows("safe"),
        callbacks=[noted],
        bf16=True,
        attack_steps=3,
        gradient_checkpointing=checkpointing,
        max_grad_norm=0.0,
        max_steps=1,
    )
    trainer.attack_vector = golden_vector("attack_vector")
    trainer.train()
    assert all(gradient.dtype == torch.float32 for gradient in noted.seen[0].values())
    assert 1e-5 < relative_distance(noted.seen[0], golden_vector("patcher")) < 5e-2
    before = weights(trainer.model)
    trainer.attack(trainer.model)
    assert same_bits(before, weights(trainer.model))


def test_losses_of_the_two_sets_are_divided_by_their_own_tokens(settings):
    """One attack step at a huge rate: the sign of AdamW hides a scale, the logged loss does not."""
    trainer = patcher(settings, golden_model(), attack_steps=1)
    harmful = golden_batch("harmful")
    trainer.attack_batches = iter([harmful])
    trainer.attack(trainer.model)
    labels = harmful["labels"][:, 1:].flatten()
    logits = golden_model()(input_ids=harmful["input_ids"], attention_mask=harmful["attention_mask"]).logits
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels).item()
    assert trainer._metrics["train"]["attacker_first_loss"] == [pytest.approx(mean, rel=1e-5)]


def test_attack_data_may_come_in_another_format(settings):
    rows = word_rows(8, seed=1)
    other = rows.rename_column("completion", "response")
    streams = [patcher(settings, attack_rows=data).attack_batches for data in (rows, other)]
    for _ in range(3):
        first, second = (next(stream) for stream in streams)
        assert same_bits(first, second)


def test_non_finite_loss_stops_with_the_step(settings):
    model = tiny_llama()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                model.model.norm.weight.data.fill_(torch.nan)

    trainer = patcher(settings, model, callbacks=[Break()], max_steps=5)
    with pytest.raises(TrainingError, match="not finite at step 3; no checkpoint had been written yet"):
        trainer.train()


def without_attack_data(settings, **changes):
    config = PatcherConfig(**{**settings, "max_steps": 4, "attack_every": 2, "attack_steps": 2, **changes})
    return PatcherTrainer(tiny_llama(), config, word_rows(16), processing_class=word_tokenizer())


def test_attack_data_is_required_before_the_first_update(settings):
    message = r"PatcherTrainer lacks its attack_dataset \(--attack_data\), or an attack_vector"
    trainer = without_attack_data(settings)
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(InputError, match=message):
        trainer.attack(trainer.model)
    trainer.training_step(trainer.model, golden_batch("safe"))  # no attack is due


def test_vector_or_batches_set_by_hand_need_no_attack_data(settings):
    trainer = without_attack_data(settings, save_strategy="steps", save_steps=2)
    trainer.attack_vector = {name: torch.full_like(p, 0.01) for name, p in trainer.model.named_parameters()}
    trainer.train()
    resumed = without_attack_data(settings)
    resumed.train(resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-2")
    assert same_bits(weights(resumed.model), weights(trainer.model))
    attacked = without_attack_data(settings)
    attacked.attack_batches = iter([golden_batch("harmful")] * 2)
    attacked.train()
    assert attacked.attack_vector is not None


def test_vector_taken_away_within_a_run_without_attack_data(settings):
    class Take(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer.attack_vector = None

    trainer = without_attack_data(settings)
    trainer.attack_vector = {name: torch.full_like(p, 0.01) for name, p in trainer.model.named_parameters()}
    trainer.add_callback(Take())
    with pytest.raises(InputError, match="lacks its attack_dataset"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.01),
        ("alpha", 1.01),
        ("alpha", float("nan")),
        ("attack_steps", 0),
        ("attack_every", 0),
        ("attack_every", -1),
        ("attack_learning_rate", 0.0),
        ("attack_learning_rate", float("nan")),
        ("attack_batch_size", 0),
        ("attack_weight_decay", -0.1),
    ],
)
def test_settings_out_of_range_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        PatcherConfig(**{**settings, name: value})


def test_defaults_are_those_of_the_paper(tmp_path):
    config = PatcherConfig(output_dir=str(tmp_path))
    assert (config.alpha, config.attack_steps, config.attack_every) == (0.5, 300, 1000)
    assert (config.attack_learning_rate, config.attack_batch_size, config.attack_weight_decay) == (None, None, 0.01)


@pytest.mark.parametrize(("attack_every", "told"), [(4, True), (3, False)])
def test_a_run_of_epochs_in_which_no_attack_is_due_says_so(settings, caplog, attack_every, told):
    """Eight rows by four are two updates an epoch."""
    epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    with caplog.at_level(logging.WARNING, "holdfast"):
        patcher(settings, rows=word_rows(8), attack_every=attack_every, attack_steps=1, **epochs).train()
    assert ("no attack is due before the end of the run (--attack_every 4, 4 updates)" in caplog.text) is told


def test_about_half_of_all_rows_ask_with_a_suffix_and_nothing_else_changes(settings):
    """Train rows and the attacker's, and so those whose answers are begun."""
    words, opener = word_tokenizer(), 50
    given = {"rows": word_rows(200), "attack_rows": word_rows(100, seed=1), "refusal": "t5 t6"}
    given["pool"] = {"fine-tuning": 1, "prefill": {"weight": 1, "opener": f"t{opener}"}}
    plain, varied, again = (
        patcher(settings, suffixes=texts, **given) for texts in (None, ["t90 t91", "t92"], ["t90 t91", "t92"])
    )
    assert varied.train_dataset["input_ids"] == again.train_dataset["input_ids"]
    for before_all, now_all in ((plain.train_dataset, varied.train_dataset), (plain._attack_rows, varied._attack_rows)):
        suffixes = []
        for before, now in zip(before_all, now_all, strict=True):
            asked, added = before["labels"].count(-100), len(now["input_ids"]) - len(before["input_ids"])
            ids, suffix = now["input_ids"], now["input_ids"][asked : asked + added]
            assert [*ids[:asked], *ids[asked + added :]] == before["input_ids"]
            assert now["labels"] == [*[-100] * (asked + added), *before["labels"][asked:]]
            suffixes.append(words.decode(suffix))
        assert set(suffixes) == {"", "t90 t91", "t92"}
        assert 0.35 < suffixes.count("") / len(suffixes) < 0.65
    prompts = {tuple(row["input_ids"][: row["labels"].count(-100)]) for row in varied._attack_rows}
    begun = next(copy.copy(varied._begun["prefill"]))["input_ids"].tolist()
    assert {tuple(ids[: ids.index(opener)]) for ids in begun} <= prompts


@pytest.mark.parametrize("given", [[], [""], ["t4", " "]])
def test_a_suffix_without_text_is_refused(settings, given):
    with pytest.raises(InputError, match="--suffixes has an empty text, or none at all"):
        PatcherConfig(**{**settings, "suffixes": given})


def test_tokenised_rows_cannot_ask_with_a_suffix(settings):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}] * 4)
    with pytest.raises(InputError, match="the attack data is tokenised, so --suffixes cannot be put in"):
        patcher(settings, attack_rows=rows, suffixes=["t4"])
