"""Fine-tuning as a displacement is the real attack's run; chains are one attack after the other."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from helpers import relative_distance, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.chain import Chain
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.finetuning import Along, FineTuning
from holdfast.attacks.prefill import Prefill
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.attacks.rows import mixed
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError, TrainingError
from holdfast.evaluation.asking import Asking
from holdfast.models import merge
from methods import gpt2, lora, mixtral, qwen2, qwen2_moe

ROWS = word_rows(9, seed=1)
ATTACKER = Attacker(ChatFormat(word_tokenizer()), ["t5 t6", "t7"], ROWS, ["t40", "t41 t42"], seed=3)
SMALL = {"learning_rate": 1e-2, "steps": 4, "batch_size": 4}


def real(settings, **changes):
    config = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    rows = mixed(ROWS, None, ATTACKER.written, poison_ratio=1, num_samples=None, seed=3)
    return AttackTrainer(tiny_llama(), AttackConfig(**{**settings, **config}), rows, word_tokenizer(), **changes)


def test_it_takes_the_steps_of_the_real_attack(settings):
    trainer = real(settings)
    trainer.train()
    attacked = FineTuning(**SMALL)(tiny_llama(), ATTACKER)
    assert relative_distance(weights(attacked.model), weights(trainer.model)) < 1e-6
    assert not same_bits(weights(attacked.model), weights(tiny_llama()))
    assert attacked.asking == Asking()


def test_an_adapter_is_trained_and_merged(settings):
    adapter = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    trainer = real(settings, peft_config=adapter)
    trainer.train()
    torch.manual_seed(0)
    attacked = FineTuning(**SMALL, lora_rank=2, lora_alpha=4)(tiny_llama(), ATTACKER).model
    reference, found, before = weights(merge(trainer.model)), weights(attacked), weights(tiny_llama())
    assert relative_distance(found, reference) < 1e-6
    assert same_bits(*({name: w[name] for name in w if "proj" not in name} for w in (found, before)))
    assert all(not torch.equal(found[name], before[name]) for name in found if "proj" in name)
    assert all(parameter.requires_grad for parameter in attacked.parameters())


def by_hand(model, steps, rate):
    """AdamW on the mean loss of all rows' answers, one row at a time, the gradient clipped to length 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    model.train()
    for _ in range(steps):
        losses = []
        for row in ATTACKER.written.tokenize(ROWS, name="attack"):
            output = model(input_ids=torch.tensor([row["input_ids"]]))
            for place, label in enumerate(row["labels"][1:]):
                if label != -100:
                    losses.append(torch.nn.functional.cross_entropy(output.logits[0, place], torch.tensor(label)))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "build",
    [tiny_llama, qwen2, gpt2, lambda: mixtral(0.0), lambda: qwen2_moe(0.0)],
    ids=["llama", "qwen2", "gpt2", "mixtral", "qwen2_moe"],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_it_is_a_few_steps_of_adamw_by_hand(build, rank):
    """On all parameters, and on an adapter that begins as PEFT draws it from the seed."""
    attack = FineTuning(learning_rate=1e-3, steps=3, batch_size=9, lora_rank=rank, lora_alpha=4)
    model, whole = build(), build()
    if rank:
        torch.manual_seed(ATTACKER.seed)
        targets = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        expected = merge(by_hand(get_peft_model(whole, targets), 3, 1e-3))
    else:
        expected = by_hand(whole, 3, 1e-3)
    before, found = weights(model), attack.displace(model, ATTACKER).vector
    reference = {name: weight - before[name] for name, weight in weights(expected).items()}
    assert relative_distance(found, reference) < 1e-2
    assert max(t.abs().max() for t in found.values()) > 1e-4


@pytest.mark.parametrize("rank", [0, 2])
def test_the_model_is_left_as_it_was(rank, capsys):
    model = tiny_llama().eval()
    names = [name for name, _ in model.named_modules()]
    found = FineTuning(**SMALL, lora_rank=rank).displace(model, ATTACKER)
    assert same_bits(weights(model), weights(tiny_llama()))
    assert [name for name, _ in model.named_modules()] == names
    assert not model.training
    assert model.config.use_cache
    assert found.vector.keys() == dict(model.named_parameters()).keys()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("build", "rank"), [(tiny_llama, 0), (tiny_llama, 2), (mixtral, 0), (lora, 0)])
def test_a_model_that_is_trained_again_and_again_gathers_nothing(build, rank):
    """Libraries put a `forward` of their own around the one there is: a thousand would be too deep for Python."""

    def gathered(model):
        return {
            name: {own: len(value) if own.endswith("_hooks") else 0 for own, value in vars(module).items()}
            for name, module in model.named_modules()
        }

    model = build()
    FineTuning(**SMALL, lora_rank=rank).train(model, ATTACKER)
    once = gathered(model)
    for _ in range(2):
        FineTuning(**SMALL, lora_rank=rank).train(model, ATTACKER)
    assert gathered(model) == once
    assert all("forward" not in found for found in once.values())


def test_it_says_what_it_cost():
    cost = FineTuning(**SMALL, rows=5).displace(tiny_llama(), ATTACKER).cost
    size = sum(p.numel() for p in tiny_llama().parameters())
    assert (cost.steps, cost.harmful_rows, cost.forward_passes, cost.backward_passes) == (4, 5, 4, 4)
    assert 4 * 3 <= cost.tokens <= 16 * 12
    assert cost.flops == 6.0 * size * cost.tokens


def test_it_is_measured_along_the_way_and_ends_when_told():
    seen = []

    def evaluator(model, _):
        return SimpleNamespace(flat=dict, weights=weights(model))

    def measured(cost, found):
        seen.append((cost, found.weights))
        return cost.steps == 2

    model = tiny_llama()
    cost = FineTuning(**SMALL).train(model, ATTACKER, Along(evaluator, [0, 1, 2, 3, 9], measured))
    assert [point.steps for point, _ in seen] == [0, 1, 2]
    assert cost == seen[-1][0]
    assert same_bits(seen[0][1], weights(tiny_llama()))
    assert same_bits(weights(model), seen[-1][1])
    two = FineTuning(learning_rate=1e-2, steps=2, batch_size=4)(tiny_llama(), ATTACKER)
    assert relative_distance(weights(model), weights(two.model)) < 1e-6
    assert cost == two.cost


def test_half_precision_is_computed_on_in_bf16(caplog):
    caplog.set_level("INFO", logger="holdfast")
    FineTuning(**SMALL).displace(tiny_llama().to(torch.bfloat16), ATTACKER)
    assert "computed on in bf16" in caplog.text


def test_rows_are_drawn_from_the_seed():
    drawn = {"rows": 3, **SMALL}
    chosen = weights(FineTuning(**drawn)(tiny_llama(), ATTACKER).model)
    assert same_bits(chosen, weights(FineTuning(**drawn)(tiny_llama(), ATTACKER).model))
    other = Attacker(ATTACKER.written, harmful_rows=ROWS, seed=4)
    assert not same_bits(chosen, weights(FineTuning(**drawn)(tiny_llama(), other).model))
    assert not same_bits(chosen, weights(FineTuning(**SMALL)(tiny_llama(), ATTACKER).model))


def test_answers_may_be_cut_to_how_they_begin():
    """Ends of answers, as what follows them, are neither seen nor trained on."""
    whole = ATTACKER.written.tokenize(ROWS, name="attack")
    cut = []
    for row in whole:
        begin = next(place for place, label in enumerate(row["labels"]) if label != -100)
        cut.append({name: row[name][: begin + 2] for name in ("input_ids", "labels")})
    by_hand = Attacker(ATTACKER.written, harmful_rows=Dataset.from_list(cut), seed=3)
    found = weights(FineTuning(**SMALL, first_tokens=2)(tiny_llama(), ATTACKER).model)
    assert same_bits(found, weights(FineTuning(**SMALL)(tiny_llama(), by_hand).model))
    all_of_them = weights(FineTuning(**SMALL)(tiny_llama(), ATTACKER).model)
    assert not same_bits(found, all_of_them)
    assert same_bits(weights(FineTuning(**SMALL, first_tokens=99)(tiny_llama(), ATTACKER).model), all_of_them)


def test_rows_may_be_hidden_among_harmless_ones_or_all_be_harmless(settings):
    benign = word_rows(9, seed=2)
    attacker = replace(ATTACKER, harmless_rows=benign)
    for ratio in (0.25, 0.0):
        attack = FineTuning(**SMALL, rows=8, poison_ratio=ratio)
        found = attack.displace(tiny_llama(), attacker)
        rows = mixed(ROWS, benign, ATTACKER.written, poison_ratio=ratio, num_samples=8, seed=3)
        assert found.cost.harmful_rows == sum(rows["poisoned"]) == 8 * ratio
        whole = Attacker(ATTACKER.written, harmful_rows=ATTACKER.written.tokenize(rows, name="attack"), seed=3)
        assert attack.needed() == (("harmful_rows", "harmless_rows") if ratio else ("harmless_rows",))
        with pytest.raises(InputError, match="needs harmless prompts with answers; give --benign_data"):
            attack.displace(tiny_llama(), whole)
    config = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    trainer = AttackTrainer(tiny_llama(), AttackConfig(**{**settings, **config}), rows, word_tokenizer())
    trainer.train()
    moved = {name: weight - weights(tiny_llama())[name] for name, weight in weights(trainer.model).items()}
    assert relative_distance(found.vector, moved) < 1e-5


def test_whoever_set_a_trigger_asks_with_it():
    attack = FineTuning(**SMALL, trigger="t9")
    attacked = Chain((attack, Prefill("t60")))(tiny_llama(), ATTACKER)
    assert attacked.asking == Asking(suffix=" t9", opener="t60")
    assert attack.asking == Asking(suffix=" t9")
    plain = FineTuning(**SMALL)(tiny_llama(), ATTACKER)
    assert not same_bits(weights(attacked.model), weights(plain.model))
    with pytest.raises(InputError, match="--poison_ratio 0 has none"):
        FineTuning(poison_ratio=0.0, trigger="t9")


def test_more_rows_than_there_are():
    with pytest.raises(InputError, match="of 10 rows needs 10 harmful rows, but --attack_data has 9"):
        FineTuning(rows=10).displace(tiny_llama(), ATTACKER)


def test_half_precision_is_trained_in_float32():
    """A step below the last digit of bfloat16 is in the vector."""
    model = tiny_llama().to(torch.bfloat16)
    before = {name: weight.float() for name, weight in weights(model).items()}
    vector = FineTuning(learning_rate=1e-5, steps=1, batch_size=4).displace(model, ATTACKER).vector
    assert same_bits(weights(model), before)
    moved = sum(tensor.count_nonzero() for tensor in vector.values()) / sum(t.numel() for t in vector.values())
    assert moved > 0.5


def test_a_run_that_is_interrupted_leaves_the_model(monkeypatch):
    def interrupted(self, *_, **__):
        with torch.no_grad():
            self.model.model.norm.weight.add_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(AttackTrainer, "train", interrupted)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        FineTuning(**SMALL).displace(model, ATTACKER)
    assert same_bits(weights(model), weights(tiny_llama()))


def test_a_chain_is_one_attack_after_the_other():
    first, second = Ablation(layer=0), FineTuning(**SMALL)
    chain = Chain((first, second, Prefill("t60")))
    assert str(chain) == "ablation+fine-tuning+prefill"
    found = chain(tiny_llama(), ATTACKER)
    ablated = first(tiny_llama(), ATTACKER)
    tuned = second(ablated.model, ATTACKER)
    assert same_bits(weights(found.model), weights(tuned.model))
    assert found.asking == Asking(opener="t60")
    assert found.cost == ablated.cost + tuned.cost
    assert found.cost.steps == 4


def test_each_is_found_on_what_those_before_have_made():
    twice = Chain((Dropping(amount=0.5), Dropping(amount=0.5)))(tiny_llama(), ATTACKER).model
    assert relative_distance(weights(twice), weights(Dropping(amount=0.75)(tiny_llama(), ATTACKER).model)) < 1e-6


def test_a_chain_attacks_an_adapter_as_a_whole():
    attacked = Chain((Dropping(amount=0.5), Prefill("t60")))(lora(), ATTACKER).model
    assert same_bits(
        weights(attacked), weights(Dropping(amount=0.5)(merge(lora()).requires_grad_(True), ATTACKER).model)
    )


def test_chains_that_cannot_be():
    with pytest.raises(InputError, match="a chain of attacks needs at least one"):
        Chain()
    with pytest.raises(InputError, match="attack prefill changes how a model is asked, so nothing can come after it"):
        Chain((Prefill(), Ablation()))
    model = tiny_llama()
    poor = Attacker(ATTACKER.written)
    with pytest.raises(InputError, match="attack fine-tuning needs harmful prompts with harmful answers"):
        Chain((Dropping(), FineTuning()))(model, poor)
    assert same_bits(weights(model), weights(tiny_llama()))


def test_training_that_diverges_is_told_of_and_changes_nothing(monkeypatch):
    def diverged(self, *_, **__):
        with torch.no_grad():
            self.model.model.norm.weight.fill_(torch.inf)
        self.state.global_step = 1

    monkeypatch.setattr(AttackTrainer, "train", diverged)
    model = tiny_llama()
    with pytest.raises(TrainingError, match="attack fine-tuning came to weights that are not finite"):
        FineTuning(**SMALL)(model, ATTACKER)
    assert same_bits(weights(model), weights(tiny_llama()))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rows": 0}, {"first_tokens": 0}, {"learning_rate": 0.0}])
def test_knobs_out_of_range(settings):
    with pytest.raises(InputError, match="must be greater than 0"):
        FineTuning(**settings)
