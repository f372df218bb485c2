"""DefenseTrainer's contract: TRL's trainer bit for bit, one gradient per window, direct calls, data, refusals."""

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import reference
from helpers import (
    Gradients,
    golden_batch,
    golden_model,
    golden_rows,
    golden_vector,
    gradients,
    relative_distance,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.antibody import AntibodyAlignmentTrainer
from holdfast.alignment.booster import BoosterTrainer
from holdfast.alignment.parallel import ParallelPatcherConfig, PatcherDefenderTrainer
from holdfast.alignment.parallel_attacker import PatcherAttackerTrainer
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.vaccine import VaccineTrainer
from holdfast.attacks.real import AttackTrainer
from holdfast.config import DefenseConfig
from holdfast.errors import InputError, TrainingError
from holdfast.finetuning.antibody import AntibodyTrainer
from holdfast.finetuning.lisa import LisaTrainer
from holdfast.finetuning.spard import SpardTrainer
from holdfast.trainer import DefenseTrainer
from methods import MODELS, mixtral

SFT_LOSS = 5.32571268081665


def trainer_of(settings, model=None, rows=None, kind=DefenseTrainer, **changes):
    keywords = {name: changes.pop(name) for name in ("callbacks", "peft_config", "eval_dataset") if name in changes}
    return kind(
        model if model is not None else tiny_llama(),
        DefenseConfig(**{**settings, **changes}),
        rows if rows is not None else word_rows(14),
        processing_class=word_tokenizer(),
        **keywords,
    )


def logged(trainer):
    """The run's log without the clock, and without the passes, which TRL does not count and quiet ones come to."""
    left_out = ("runtime", "per_second", "passes")
    return [{k: v for k, v in e.items() if not any(word in k for word in left_out)} for e in trainer.state.log_history]


def summed_otherwise(log):
    """A log whose losses may have another last bit: TRL adds up micro-batches, ours the windows that they are in."""
    sums = ("loss", "train_loss")
    return [{k: pytest.approx(v, rel=3e-7) if k in sums else v for k, v in entry.items()} for entry in log]


# ---------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradient(settings, checkpointing):
    trainer = trainer_of(settings, golden_model(), gradient_checkpointing=checkpointing)
    loss = trainer.training_step(trainer.model, golden_batch("safe"))
    assert loss.item() == pytest.approx(SFT_LOSS, rel=1e-6)
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_golden_gradient_inside_training(settings, accumulation, checkpointing):
    noted = Gradients()
    trainer = trainer_of(
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
    trainer.train()
    assert worst_entry(noted.seen[0], golden_vector("sft")) < 1e-4
    assert trainer.state.log_history[0]["loss"] == pytest.approx(SFT_LOSS, rel=1e-5)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(6.984437225708583, rel=1e-5)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=4, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda name: name.split(",")[0])
def test_gradient_is_the_mean_over_completion_tokens(settings, architecture):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    batch = golden_batch("safe")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    trainer = trainer_of(settings, model)
    assert trainer.training_step(model, batch).item() == pytest.approx(loss.item(), rel=1e-5)
    assert worst_entry(gradients(model), expected) < 1e-4


def test_direct_calls_do_not_add_up(settings):
    trainer = trainer_of(settings, golden_model(), gradient_accumulation_steps=4)
    for _ in range(2):
        trainer.training_step(trainer.model, golden_batch("safe"))
        assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4


def test_direct_call_leaves_the_batch_and_other_gradients_be(settings):
    trainer = trainer_of(settings, golden_model())
    batch = golden_batch("safe")
    trainer.training_step(trainer.model, batch)
    taken = gradients(trainer.model)
    kept = {name: g.clone() for name, g in taken.items()}
    trainer.training_step(trainer.model, golden_batch("harmful"))
    assert same_bits(taken, kept)
    assert same_bits(batch, golden_batch("safe"))


def test_direct_call_with_a_token_count_divides_by_it(settings):
    trainer = trainer_of(settings, golden_model())
    tokens = int((golden_batch("safe")["labels"][:, 1:] != -100).sum())
    loss = trainer.training_step(trainer.model, golden_batch("safe"), torch.tensor(2 * tokens))
    assert loss.item() == pytest.approx(SFT_LOSS / 2, rel=1e-6)
    half = {name: g / 2 for name, g in golden_vector("sft").items()}
    assert worst_entry(gradients(trainer.model), half) < 1e-4


def test_direct_call_in_the_midst_of_training_is_its_own_window(settings):
    """From a callback between two micro-batches, with a batch that the loop did not draw."""
    found = []

    class Probe(TrainerCallback):
        def on_substep_end(self, args, state, control, *, model, **_):
            kept = {name: p.grad for name, p in model.named_parameters()}
            trainer.training_step(model, golden_batch("safe"))
            found.append({name: g.clone() for name, g in gradients(model).items()})
            for name, parameter in model.named_parameters():
                parameter.grad = kept[name]

    changes = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-30,
        "max_steps": 2,
    }
    trainer = trainer_of(settings, golden_model(), golden_rows("harmful"), callbacks=[Probe()], **changes)
    trainer.train()
    assert len(found) == 2
    assert all(worst_entry(gradient, golden_vector("sft")) < 1e-4 for gradient in found)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    undisturbed = trainer_of(settings, golden_model(), golden_rows("harmful"), **changes)
    undisturbed.train()
    assert losses == [entry["loss"] for entry in undisturbed.state.log_history if "loss" in entry]


# ---------------------------------------------------------------------- TRL's trainer, bit for bit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "logging_steps": 3},
        {"optim": "sgd", "max_grad_norm": 0.0, "max_length": 8, "drop_untrainable_rows": True},
    ],
    ids=["plain", "accumulation", "checkpointing", "bf16", "sgd"],
)
def test_identity_is_sft_bit_for_bit(settings, changes):
    """Weights and logs of two epochs, the last window of each smaller than the others."""
    trl_changes = {name: value for name, value in changes.items() if name != "drop_untrainable_rows"}
    common = {"num_train_epochs": 2, "eval_strategy": "epoch"}
    ours = trainer_of(settings, eval_dataset=word_rows(6, seed=9), **common, **changes)
    theirs = SFTTrainer(
        tiny_llama(),
        SFTConfig(**{**settings, "use_cpu": True, "bf16": False, **common, **trl_changes}),
        train_dataset=word_rows(14),
        eval_dataset=word_rows(6, seed=9),
        processing_class=word_tokenizer(),
    )
    for trainer in (theirs, ours):
        torch.manual_seed(1)
        trainer.train()
    assert same_bits(weights(ours.model), weights(theirs.model))
    assert logged(ours) == summed_otherwise(logged(theirs))
    first = next(entry for entry in logged(ours) if "loss" in entry)
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"} <= first.keys()
    assert not same_bits(weights(ours.model), weights(tiny_llama()))


@pytest.mark.parametrize(
    ("model", "accumulation", "changes"),
    [
        ("qwen2_moe", 1, {}),
        ("qwen2_moe", 2, {"gradient_checkpointing": True}),
        ("mixtral", 2, {}),
        ("mixtral", 2, {"router_aux_loss_coef": 0.0}),
        ("mixtral, router loss off", 1, {"router_aux_loss_coef": 0.02}),
    ],
)
def test_identity_is_sft_with_experts_and_their_routers_loss(settings, model, accumulation, changes):
    common = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3, "num_train_epochs": 1}
    ours = trainer_of(settings, MODELS[model](), eval_dataset=word_rows(6, seed=9), **common, **changes)
    theirs = SFTTrainer(
        MODELS[model](),
        SFTConfig(**{**settings, "use_cpu": True, "bf16": False, **common, **changes}),
        train_dataset=word_rows(14),
        eval_dataset=word_rows(6, seed=9),
        processing_class=word_tokenizer(),
    )
    for trainer in (theirs, ours):
        torch.manual_seed(1)
        trainer.train()
    assert same_bits(weights(ours.model), weights(theirs.model))
    assert logged(ours) == summed_otherwise(logged(theirs))
    assert ("aux_loss" in logged(ours)[0]) is (changes.get("router_aux_loss_coef") != 0.0)
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("model", ["qwen2_moe", "mixtral"])
def test_loss_asked_for_directly_is_that_of_the_batch(settings, model, accumulation):
    """Whatever the accumulation, with the auxiliary loss in full, before a run and after it."""
    model, batch = MODELS[model](), golden_batch("safe")
    trainer = trainer_of(settings, model, gradient_accumulation_steps=accumulation, max_steps=1)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for _ in range(2):
        expected = reference.train_loss(model, [batch], 0).item()
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-6)
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens).item()
        assert found == pytest.approx(expected, rel=1e-6)
        trainer.train()


def test_configuration_is_left_as_it_was(settings):
    """TRL has models output their routers' logits for good, with which none can generate."""
    model, twin, batch = mixtral(), mixtral(), golden_batch("safe")
    model.config.output_router_logits = False
    trainer = trainer_of(settings, model)
    trainer.training_step(model, batch)
    assert worst_entry(gradients(model), reference.sft(twin, [batch])) < 1e-5
    model.zero_grad()
    _, gradient = trainer.loss_and_gradient(model, trainer.as_window([batch]), quiet=True, router_loss=True)
    assert worst_entry(gradient, reference.sft(twin, [batch])) < 1e-5
    assert model.config.output_router_logits is False
    assert (
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False).shape[1]
        == 2 + batch["input_ids"].shape[1]
    )


@pytest.mark.parametrize("architecture", ["jamba", "doge"])
def test_architecture_of_experts_without_any(settings, architecture):
    """Its configuration asks for a loss of routers that it does not have."""
    torch.manual_seed(0)
    if architecture == "jamba":
        model = JambaForCausalLM(JambaConfig(**SHAPE, num_experts=1, attn_layer_period=1, attn_layer_offset=0))
    else:
        model = DogeForCausalLM(DogeConfig(**SHAPE))
    before, batch = copy.deepcopy(model), golden_batch("safe")
    trainer = trainer_of(settings, model)
    trainer.training_step(model, batch)
    assert worst_entry(gradients(model), reference.plain(before, [batch])) < 1e-5
    assert trainer.args.router_aux_loss_coef == 0.0
    with pytest.raises(InputError, match=r"--router_aux_loss_coef 0\.01: the model has no experts"):
        trainer_of(settings, before, router_aux_loss_coef=0.01)


def test_inner_passes_are_cross_entropy_alone(settings):
    model, halves = mixtral(), [{key: t[i : i + 2] for key, t in golden_batch("safe").items()} for i in (0, 2)]
    plain, routed = reference.plain(model, halves), reference.sft(model, halves)
    assert worst_entry(plain, routed) > 1e-2
    trainer = trainer_of(settings, model)
    window = trainer.as_window(halves)
    for arguments, expected in (
        ({"quiet": True}, plain),
        ({"quiet": True, "router_loss": True}, routed),
        ({"quiet": False}, routed),
        ({"quiet": False, "router_loss": False}, plain),
    ):
        trainer._metrics["train"].clear()
        _, gradient = trainer.loss_and_gradient(model, window, **arguments)
        assert worst_entry(gradient, expected) < 1e-5
        assert ("entropy" in trainer._metrics["train"]) is not arguments["quiet"]


def test_identity_is_sft_with_lora_and_its_dropout(settings):
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    ours = trainer_of(settings, peft_config=lora, max_steps=4)
    theirs = SFTTrainer(
        tiny_llama(),
        SFTConfig(**{**settings, "use_cpu": True, "bf16": False, "max_steps": 4}),
        train_dataset=word_rows(14),
        processing_class=word_tokenizer(),
        peft_config=lora,
    )
    for trainer in (theirs, ours):
        torch.manual_seed(1)
        trainer.train()
    assert same_bits(weights(ours.model), weights(theirs.model))
    assert logged(ours) == summed_otherwise(logged(theirs))


class Doubled(DefenseTrainer):
    """Takes inner passes over the window and over a second set before the one that counts."""

    def defended_gradient(self, model, window):
        self.loss_and_gradient(model, window, quiet=True)
        self.loss_and_gradient(model, self.draw(self.safety_batches, 2), quiet=True)
        return self.loss_and_gradient(model, window)


def test_inner_passes_are_quiet(settings):
    plain = trainer_of(settings, max_steps=4, gradient_accumulation_steps=2)
    doubled = trainer_of(settings, kind=Doubled, max_steps=4, gradient_accumulation_steps=2)
    doubled.safety_batches = doubled.batches_of(word_rows(5, seed=2), "safety")
    plain.train()
    doubled.train()
    assert logged(doubled) == logged(plain)
    assert same_bits(weights(doubled.model), weights(plain.model))
    assert doubled.safety_batches.drawn == 8


def test_inner_pass_computes_the_same_loss(settings):
    trainer = trainer_of(settings, golden_model())
    window = trainer.draw(iter([golden_batch("safe")]))
    loud, loud_gradient = trainer.loss_and_gradient(trainer.model, window)
    quiet, quiet_gradient = trainer.loss_and_gradient(trainer.model, window, quiet=True)
    assert loud.item() == quiet.item()
    assert same_bits(loud_gradient, quiet_gradient)


def test_logged_metric_is_the_mean_since_the_last_log(settings):
    class Counting(DefenseTrainer):
        def defended_gradient(self, model, window):
            self.log_metric("updates", float(self.state.global_step))
            self.log_metric("tensor", torch.tensor(2.0))
            return super().defended_gradient(model, window)

    trainer = trainer_of(settings, kind=Counting, max_steps=4, logging_steps=2)
    trainer.train()
    assert [entry["updates"] for entry in trainer.state.log_history if "updates" in entry] == [0.5, 2.5]
    assert [entry["tensor"] for entry in trainer.state.log_history if "tensor" in entry] == [2.0, 2.0]


def test_shared_randomness_gives_both_passes_the_same_masks(settings):
    trainer = trainer_of(settings, tiny_llama(attention_dropout=0.5))
    window = trainer.draw(iter([golden_batch("safe")]))
    with trainer.shared_randomness():
        inside = trainer.loss_and_gradient(trainer.model, window)[0]
    after = trainer.loss_and_gradient(trainer.model, window)[0]
    later = trainer.loss_and_gradient(trainer.model, window)[0]
    assert inside.item() == after.item() != later.item()


# ---------------------------------------------------------------------- second data sets


def test_stream_follows_the_runs_seed_and_batch_size(settings):
    def first(seed, **sizes):
        trainer = trainer_of(settings, seed=seed)
        return next(trainer.batches_of(word_rows(40, seed=2), "safety", **sizes))["input_ids"]

    assert torch.equal(first(0), first(0))
    assert first(0).shape[0] == 4
    assert first(0).tolist() != first(1).tolist()
    assert first(0, batch_size=7).shape[0] == 7


def test_stream_has_its_own_token_count(settings):
    trainer = trainer_of(settings)
    stream = trainer.batches_of(word_rows(9, seed=2), "safety")
    twin = trainer.batches_of(word_rows(9, seed=2), "safety")
    window = trainer.draw(stream, 3)
    batches = [next(twin) for _ in range(3)]
    assert len(window) == 3
    assert int(window.tokens) == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def test_stream_leaves_the_global_random_state_alone(settings):
    trainer = trainer_of(settings)
    stream = trainer.batches_of(word_rows(9, seed=2), "safety")
    state = torch.get_rng_state()
    trainer.draw(stream, 7)
    assert torch.equal(state, torch.get_rng_state())


def test_stream_prepares_rows_as_the_train_set_is(settings):
    trainer = trainer_of(settings, rows=word_rows(8), max_length=8)
    stream = trainer.batches_of(word_rows(8), "safety", batch_size=8)
    batch = next(stream)
    unpadded = lambda ids, mask: tuple(ids[mask.bool()].tolist())  # noqa: E731
    seen = sorted(unpadded(i, m) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True))
    assert seen == sorted(tuple(ids) for ids in trainer.train_dataset["input_ids"])
    assert max(map(len, seen)) == 8


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "come to an end: DefenseTrainer needs 2 for an update, 0 were left"),
        ([golden_batch("safe")], "come to an end: DefenseTrainer needs 2 for an update, 1 were left"),
        ([{"input_ids": 1}] * 2, "a batch lacks labels and attention_mask; it holds input_ids"),
        ([{}] * 2, "a batch lacks input_ids and labels and attention_mask; it holds nothing"),
        ([{"position_ids": 1, "input_ids": 1}] * 2, "a batch lacks labels; it holds position_ids, input_ids"),
        ([{key: t[0] for key, t in golden_batch("safe").items()} | {"labels": torch.ones(1)}] * 2, "of the same shape"),
        ([{key: t.tolist() for key, t in golden_batch("safe").items()}] * 2, "must be tensors of the same shape"),
        ([[golden_batch("safe")]] * 2, "a batch must hold input_ids, attention_mask and labels by name, got list"),
    ],
)
def test_batches_that_cannot_be_drawn(settings, batches, message):
    with pytest.raises(InputError, match=message):
        trainer_of(settings).draw(iter(batches), 2)


def test_batches_that_would_begin_anew_each_time(settings):
    with pytest.raises(InputError, match="must be an endless iterator, got a list"):
        trainer_of(settings).draw([golden_batch("safe")])


def test_direct_call_without_labels(settings):
    trainer = trainer_of(settings)
    batch = {key: tensor for key, tensor in golden_batch("safe").items() if key != "labels"}
    with pytest.raises(InputError, match="a batch lacks labels; it holds"):
        trainer.training_step(trainer.model, batch)


def test_missing_second_set_is_named(settings):
    with pytest.raises(InputError, match=r"lacks its safety_dataset \(--safety_data\)"):
        trainer_of(settings).batches_of(None, "safety")


TRAINERS = [
    DefenseTrainer,
    AntibodyAlignmentTrainer,
    BoosterTrainer,
    PatcherTrainer,
    PatcherDefenderTrainer,
    PatcherAttackerTrainer,
    VaccineTrainer,
    AntibodyTrainer,
    LisaTrainer,
    SpardTrainer,
    AttackTrainer,
]


@pytest.mark.parametrize("kind", TRAINERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "needs a model: one that is loaded, or a folder or Hub id to load it from; got nothing"),
        ({"model": Path("here")}, "or a folder or Hub id to load it from; got a PosixPath"),
        ({"processing_class": None}, "needs a processing_class, the model's tokenizer"),
        ({"processing_class": "gpt2"}, "must be a tokenizer, got a str"),
        ({"args": SFTConfig("here", use_cpu=True, bf16=False)}, r"needs a \w+Config, got a SFTConfig"),
        ({"model": "here", "args": "there"}, r"needs a \w+Config, got a str"),
    ],
)
def test_what_no_trainer_can_train(settings, kind, changes, message):
    more = {"exchange": "there", "role": "attacker"} if issubclass(kind.config_class, ParallelPatcherConfig) else {}
    given = {
        "model": tiny_llama(),
        "args": kind.config_class(**{**settings, **more}),
        "train_dataset": word_rows(3),
        "processing_class": word_tokenizer(),
        **changes,
    }
    with pytest.raises(InputError, match=message) as caught:
        kind(**given)
    assert kind.__name__ in str(caught.value)


# ---------------------------------------------------------------------- everything else keeps working


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packing_changes_nothing_but_the_batches(settings, strategy):
    """All rows in one update, packed into blocks or padded: the same gradient."""
    noted = {}
    rows = word_rows(8)
    for packing in (False, True):
        noted[packing] = Gradients()
        trainer = trainer_of(
            settings,
            rows=rows,
            callbacks=[noted[packing]],
            packing=packing,
            packing_strategy=strategy,
            max_length=24,
            per_device_train_batch_size=1 if packing else 8,
            gradient_accumulation_steps=100 if packing else 1,
            max_grad_norm=0.0,
            num_train_epochs=1,
        )
        trainer.train()
        if packing:
            assert 1 < len(trainer.train_dataset) < 8
    assert len(noted[True].seen) == len(noted[False].seen) == 1
    assert worst_entry(noted[True].seen[0], noted[False].seen[0]) < 1e-4


def test_evaluation_is_the_mean_over_completion_tokens(settings):
    rows = golden_rows("safe")
    trainer = trainer_of(settings, golden_model(), eval_dataset=rows, per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(SFT_LOSS, rel=1e-5)
    assert trainer.model.training is False
    trainer.training_step(trainer.model, golden_batch("safe"))
    assert worst_entry(gradients(trainer.model), golden_vector("sft")) < 1e-4


def test_model_may_be_a_folder_or_an_adapter_folder(settings, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = str(tmp_path / "model")
    trained = DefenseTrainer(folder, DefenseConfig(**{**settings, "max_steps": 2}), word_rows(8))
    by_object = trainer_of(settings, rows=word_rows(8), max_steps=2)
    for trainer in (trained, by_object):
        trainer.train()
    assert same_bits(weights(trained.model), weights(by_object.model))

    adapted = DefenseTrainer(folder, DefenseConfig(**{**settings, "max_steps": 2}), word_rows(8), peft_config=lora)
    adapted.train()
    adapted.save_model(tmp_path / "adapter")
    again = DefenseTrainer(str(tmp_path / "adapter"), DefenseConfig(**{**settings, "max_steps": 2}), word_rows(8))
    trainable = {name for name, p in again.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert same_bits(
        {name: p for name, p in again.model.named_parameters() if "lora_" in name},
        {name: p for name, p in adapted.model.named_parameters() if "lora_" in name},
    )
    again.train()


def test_saved_model_loads_as_an_ordinary_one(settings, tmp_path):
    trainer = trainer_of(settings, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_bits(weights(loaded), weights(trainer.model))


def test_bf16_autocast_changes_no_more_than_rounding(settings):
    noted = Gradients()
    changes = {"bf16": True, "max_grad_norm": 0.0, "max_steps": 1}
    trainer_of(settings, golden_model(), golden_rows("safe"), callbacks=[noted], **changes).train()
    assert all(g.dtype == torch.float32 for g in noted.seen[0].values())
    assert 1e-5 < relative_distance(noted.seen[0], golden_vector("sft")) < 5e-2


def test_length_is_the_steps_or_the_epochs_that_were_given(tmp_path):
    """Neither by a default, nor by both: transformers would take the steps. Built again from itself, it is the same."""
    lengths = []
    for given in ({}, {"num_train_epochs": 2}, {"max_steps": 5}, {"max_steps": 5, "num_train_epochs": -1}):
        config = dataclasses.replace(DefenseConfig(output_dir=str(tmp_path), **given))
        lengths.append((config.max_steps, config.num_train_epochs))
    assert lengths == [(-1, 3), (-1, 2), (5, -1), (5, -1)]
    with pytest.raises(InputError, match="--max_steps 5 and --num_train_epochs 2 both set the length of the run"):
        DefenseConfig(output_dir=str(tmp_path), max_steps=5, num_train_epochs=2)


def test_cpu_and_float32_are_chosen_by_themselves(tmp_path):
    config = DefenseConfig(output_dir=str(tmp_path))
    if not torch.accelerator.is_available():
        assert (config.use_cpu, config.bf16, config.fp16) == (True, False, False)
    assert config.completion_only_loss is True
    assert DefenseConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    assert DefenseConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16 is True


# ---------------------------------------------------------------------- refusals


def test_rows_without_a_completion_token_are_counted_and_the_first_is_named(settings):
    rows = Dataset.from_list(
        [{"prompt": "t4 t5 ", "completion": "t6"}]
        + [{"prompt": "t4 " * 12, "completion": "t6"}] * 2
        + [{"prompt": "t7 t8 ", "completion": "t9"}]
    )
    message = r"2 of 4 rows of the train data .* --max_length 8 \(the first is row 2\).*--drop_untrainable_rows"
    with pytest.raises(InputError, match=message):
        trainer_of(settings, rows=rows, max_length=8)


def test_rows_without_a_completion_token_can_be_dropped(settings, caplog):
    rows = Dataset.from_list([{"prompt": "t4 " * 12, "completion": "t6"}, {"prompt": "t7 t8 ", "completion": "t9"}])
    with caplog.at_level(logging.WARNING, "holdfast"):
        trainer = trainer_of(settings, rows=rows, max_length=8, drop_untrainable_rows=True)
    assert len(trainer.train_dataset) == 1
    assert "1 of 2 rows of the train data" in caplog.text
    assert "the first is row 1" in caplog.text


def test_dropping_every_row_is_refused(settings):
    rows = Dataset.from_list([{"prompt": "t4 " * 12, "completion": "t6"}] * 3)
    with pytest.raises(InputError, match="3 of 3 rows"):
        trainer_of(settings, rows=rows, max_length=8, drop_untrainable_rows=True)


def test_untrainable_rows_of_other_sets_are_named_by_their_set(settings):
    rows = Dataset.from_list([{"prompt": "t4 " * 12, "completion": "t6"}] * 3)
    trainer = trainer_of(settings, max_length=8, drop_untrainable_rows=False, rows=golden_rows("safe").select([0]))
    with pytest.raises(InputError, match="3 of 3 rows of the safety data"):
        trainer.batches_of(rows, "safety")


def test_truncation_counts_the_rows_it_empties_under_packing(settings):
    rows = Dataset.from_list([{"prompt": "t4 t5 ", "completion": "t6"}, {"prompt": "t4 " * 30, "completion": "t6"}])
    with pytest.raises(InputError, match="1 of 2 rows of the train data"):
        trainer_of(settings, rows=rows, max_length=8, packing=True)


def test_data_without_rows(settings):
    with pytest.raises(InputError, match="train data has no rows"):
        trainer_of(settings, rows=word_rows(1).select([]))


def test_data_of_another_type(settings):
    with pytest.raises(InputError, match="train data must be a"):
        trainer_of(settings, rows=word_rows(4).to_iterable_dataset())


def test_missing_train_data(settings):
    with pytest.raises(InputError, match="train_dataset is missing"):
        DefenseTrainer(tiny_llama(), DefenseConfig(**settings), processing_class=word_tokenizer())


def test_config_of_another_trainer(settings):
    with pytest.raises(InputError, match="DefenseTrainer needs a DefenseConfig, got a SFTConfig"):
        DefenseTrainer(
            tiny_llama(),
            SFTConfig(**settings, use_cpu=True, bf16=False),
            word_rows(4),
            processing_class=word_tokenizer(),
        )


@pytest.mark.parametrize("argument", ["compute_loss_func", "formatting_func"])
def test_another_loss_is_refused(settings, argument):
    with pytest.raises(InputError, match=argument):
        DefenseTrainer(
            tiny_llama(),
            DefenseConfig(**settings),
            word_rows(4),
            processing_class=word_tokenizer(),
            **{argument: lambda *_, **__: None},
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("max_steps", 0),
        ("max_steps", -2),
        ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_length", 0),
        ("trust_remote_code", True),
        ("fp16", True),
        ("label_smoothing_factor", 0.1),
        ("deepspeed", {"zero_optimization": {"stage": 2}}),
        ("enable_jit_checkpoint", True),
        ("push_to_hub", True),
        ("loss_type", "dft"),
        ("completion_only_loss", False),
        ("chat_template_kwargs", "thinking off"),
        ("chat_template_kwargs", "[1]"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        DefenseConfig(**{**settings, name: value})


def test_chat_template_kwargs_may_be_json(settings):
    config = DefenseConfig(**settings, chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}


def test_fsdp_checkpoints_that_are_pickles_are_refused(settings):
    with pytest.raises(InputError, match="--fsdp_config state_dict_type"):
        DefenseConfig(**settings, fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})


def test_fsdp_that_would_silently_become_ddp_is_refused(settings):
    with pytest.raises(InputError, match="--fsdp"):
        trainer_of(settings, fsdp=True, use_cpu=True)


def test_of_several_gpus_a_process_takes_one_and_says_so(settings, monkeypatch, caplog):
    """As on a machine of two, but for the device, which stays the CPU: without torchrun that would be DataParallel."""
    alone = trainer_of(settings)
    alone.train()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        trainer = trainer_of(settings, bf16=False, dataloader_pin_memory=False)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 4)
    assert "2 GPUs are to be seen, and one process trains on the first of them alone" in caplog.text
    trainer.train()
    assert logged(trainer) == logged(alone)


def test_bucket_views_are_refused(settings):
    trainer = trainer_of(settings)

    class Wrapped(torch.nn.Module):
        gradient_as_bucket_view = True

    with pytest.raises(InputError, match="gradient_as_bucket_view"):
        trainer.training_step(Wrapped(), golden_batch("safe"))


def test_non_finite_loss_names_the_step_and_the_last_checkpoint(settings):
    model = tiny_llama()

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:
                model.lm_head.weight.data[5, 0] = torch.inf

    trainer = trainer_of(
        settings, model, callbacks=[Break()], max_steps=6, save_strategy="steps", save_steps=2, max_grad_norm=0.0
    )
    with pytest.raises(TrainingError, match=r"not finite at step 5; the last good checkpoint is .*checkpoint-4$"):
        trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("schedule", "warm_up", "told"), [("linear", 2, True), ("linear", 1, False), ("constant", 2, False)]
)
def test_a_warm_up_as_long_as_the_run_is_told_of(settings, caplog, schedule, warm_up, told):
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        trainer_of(settings, max_steps=2, lr_scheduler_type=schedule, warmup_steps=warm_up).train()
    assert ("the run has 2 updates, so the learning rate never comes to" in caplog.text) == told


@pytest.mark.parametrize(("save", "kept"), [("no", "no checkpoint had been written yet"), ("steps", "checkpoint-2")])
def test_weights_that_the_last_update_broke_are_not_kept(settings, save, kept):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
            if state.global_step == 3:
                optimizer.param_groups[0]["lr"] = torch.inf

    trainer = trainer_of(settings, callbacks=[Break()], max_steps=4, save_strategy=save, save_steps=2)
    with pytest.raises(TrainingError, match=f"the weights are not finite after step 4; .*{kept}"):
        trainer.train()


def test_resuming_without_a_checkpoint(settings):
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        trainer_of(settings).train(resume_from_checkpoint=True)


def test_resuming_from_what_is_no_checkpoint(settings, tmp_path):
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        trainer_of(settings).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
