"""The real attack: the simulated one's steps, kept; measured without being disturbed."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import reference
from helpers import Gradients, relative_distance, same_bits, tiny_llama, weights, word_rows, word_tokenizer, worst_entry
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.errors import InputError
from methods import mixtral, noted_windows

LORA = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Probe:
    """An evaluator that does to a model what evaluating may do: uses randomness, switches modes, runs it."""

    def __init__(self):
        self.weights = []

    def __call__(self, model, tokenizer):
        self.weights.append(weights(model))
        training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.rand(7)
            logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        model.train(training)
        return SimpleNamespace(flat=lambda: {"asr": logits.mean().item(), "n": 1})


def attack(settings, model=None, rows=None, evaluator=None, peft_config=None, callbacks=(), **changes):
    return AttackTrainer(
        model if model is not None else tiny_llama(),
        AttackConfig(**{**settings, "max_steps": 6, **changes}),
        rows if rows is not None else word_rows(12, seed=1),
        word_tokenizer(),
        evaluator=evaluator,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_measuring_leaves_the_run_as_it_was(settings, kind):
    """Also with dropout, whose masks the evaluation's own randomness must not change."""
    ends = []
    for evaluator in (None, Probe()):
        trainer = attack(
            settings,
            tiny_llama(attention_dropout=0.2),
            evaluator=evaluator,
            peft_config=LORA if kind == "lora" else None,
            measure_at=[0, 1, 3, 6],
        )
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_bits(*ends)
    assert [row["steps"] for row in trainer.measurements] == [0, 1, 3, 6]


def test_measurements_are_taken_at_the_chosen_steps(settings):
    probe, start = Probe(), tiny_llama()
    trainer = attack(settings, evaluator=probe, measure_at=[6, 2, 0, 2])
    trainer.train()
    assert [row["steps"] for row in trainer.measurements] == [0, 2, 6]
    assert list(trainer.evaluations) == [0, 2, 6]
    assert same_bits(probe.weights[0], weights(start))
    assert same_bits(probe.weights[2], weights(trainer.model))
    assert not same_bits(probe.weights[1], probe.weights[2])
    assert trainer.measurements[0]["attacker_loss"] is None
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert [row["attacker_loss"] for row in trainer.measurements[1:]] == pytest.approx([losses[2], losses[6]])
    assert all(row["n"] == 1 and "asr" in row for row in trainer.measurements)


def test_by_default_the_first_and_the_last_step_are_measured(settings):
    trainer = attack(settings, evaluator=Probe())
    trainer.train()
    assert [row["steps"] for row in trainer.measurements] == [0, 6]


def test_real_attack_takes_the_steps_of_the_simulated_one(settings):
    """Same batches, rate and clipping: the very displacement that Patcher defends against.

    Without weight decay, which transformers' optimizers do not apply to norms and biases.
    """
    patcher = PatcherTrainer(
        tiny_llama(),
        PatcherConfig(**settings, attack_steps=5, attack_weight_decay=0.0),
        word_rows(8),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
    )
    batches = [next(patcher.attack_batches) for _ in range(5)]
    patcher.attack_batches = iter(batches)
    patcher.attack(patcher.model)

    trainer = attack(settings, max_steps=5, weight_decay=0.0)
    trainer.get_train_dataloader = lambda: batches
    start = weights(trainer.model)
    trainer.train()
    displacement = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters()}
    assert relative_distance(displacement, patcher.attack_vector) < 1e-6


def test_experts_are_attacked_as_trl_trains_them(settings):
    """With the routers' auxiliary loss, which no simulated attack has."""
    noted = Gradients()
    trainer = attack(settings, mixtral(), callbacks=[noted], max_steps=1, max_grad_norm=0.0)
    windows = noted_windows(trainer)
    trainer.train()
    assert worst_entry(noted.seen[0], reference.sft(mixtral(), windows[0])) < 1e-5


def test_lora_attack_trains_the_adapter_alone(settings):
    trainer = attack(settings, peft_config=LORA, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert {name.split(".")[-4] for name in moved} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("source", ["object", "folder"])
def test_adapter_is_merged_before_the_attack(settings, tmp_path, source):
    torch.manual_seed(4)
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    if source == "folder":
        tiny_llama().save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        word_tokenizer().save_pretrained(tmp_path / "adapter")
        trainer = AttackTrainer(
            str(tmp_path / "adapter"), AttackConfig(**{**settings, "max_steps": 2}), word_rows(12, seed=1)
        )
    else:
        trainer = attack(settings, model, max_steps=2)
    assert not isinstance(trainer.model, PeftModel)
    assert not any("lora" in name for name, _ in trainer.model.named_parameters())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    before = weights(trainer.model)
    trainer.train()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if "proj" in name)


def test_model_on_disk_is_never_touched(settings, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    trainer = AttackTrainer(
        str(tmp_path / "model"), AttackConfig(**{**settings, "max_steps": 2}), word_rows(12, seed=1)
    )
    trainer.train()
    trainer.save_model()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not same_bits(weights(trainer.model), weights(tiny_llama()))


@pytest.mark.parametrize(
    "changes", [{"optim": "sgd"}, {"lr_scheduler_type": "linear"}, {"per_device_train_batch_size": 3}]
)
def test_optimizer_schedule_and_batch_size_are_the_adversarys_choice(settings, changes):
    ends = []
    for chosen in ({}, changes):
        trainer = attack(settings, **chosen)
        trainer.train()
        ends.append(weights(trainer.model))
    assert not same_bits(*ends)


def test_defaults_are_those_of_the_papers_attack(tmp_path):
    config = AttackConfig(output_dir=str(tmp_path))
    assert (config.learning_rate, config.max_steps, config.per_device_train_batch_size) == (1e-5, 2000, 4)
    assert config.lr_scheduler_type == "constant"
    assert (config.weight_decay, config.max_grad_norm, config.save_strategy) == (0.01, 1.0, "no")
    assert config.measure_at == [0, 2000]


@pytest.mark.parametrize("steps", [[-1], [0, 7]])
def test_steps_outside_the_attack_are_refused(settings, steps):
    with pytest.raises(InputError, match=r"--measure_at must lie between 0 and the last of 6 steps"):
        AttackConfig(**settings, max_steps=6, measure_at=steps)
