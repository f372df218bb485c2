"""Patcher with a pool: every member's gradient against the suite's own attack, what is kept, drawn and resumed."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import reference
from helpers import (
    Weights,
    golden_batch,
    gradients,
    logged_updates,
    relative_distance,
    run_to_resume,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.back_to_base import BackToBase
from holdfast.attacks.chain import Chain
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.finetuning import FineTuning
from holdfast.attacks.low_rank import Adapter, Factors
from holdfast.attacks.prefill import OPENERS, Prefill
from holdfast.attacks.rounding import Rounding
from holdfast.attacks.simulated import simulate_attack
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError, Stopped
from holdfast.models import merge
from holdfast.parameters import snapshot
from methods import gpt2, lora, mixtral, qwen2

HARMFUL, HARMLESS = word_rows(12, seed=1), word_rows(6, seed=2)
ABLATION = {"layer": -1, "own_directions": False, "attention_scale": 1.0, "mlp_scale": 0.7, "rank": 2}
SUITES = Ablation(layer=-1, attention_scale=[1.0], mlp_scale=[0.7], rank=2)
TUNING = {"steps": 3, "learning_rate": 0.05, "optimizer": "sgd"}  # which does not blow rounding up
TUNED = FineTuning(0.05, 3, batch_size=12, optimizer="sgd")
# Every member with knobs that are given, and the suite's own attack.
MEMBERS = {
    "ablation": (ABLATION, SUITES),
    "dropping": ({"layer": 0, "part": "mlp", "amount": 0.8}, Dropping(0, "mlp", 0.8)),
    "base": ({"kept": 0.3}, BackToBase(kept=0.3)),
    "rounding": ({"bits": 3}, Rounding(3)),
    "fine-tuning": (TUNING, TUNED),
    "dropping+ablation": (
        {"dropping": {"layer": 0, "part": "mlp", "amount": 0.8}, "ablation": {**ABLATION, "repeat": 2}},
        Chain((Dropping(0, "mlp", 0.8), Ablation(-1, attention_scale=[1.0], mlp_scale=[0.7], rank=2, repeat=2))),
    ),
    "ablation+fine-tuning": ({"ablation": ABLATION, "fine-tuning": TUNING}, Chain((SUITES, TUNED))),
    "fine-tuning+ablation": ({"ablation": ABLATION, "fine-tuning": TUNING}, Chain((TUNED, SUITES))),
}
MODELS = {"llama": tiny_llama, "qwen2": qwen2, "mixtral": lambda: mixtral(0.0)}
CASES = [(member, model) for member in MEMBERS for model in MODELS if model == "llama" or "g+" not in member]


def pooled(settings, pool, model=None, attack_rows=HARMFUL, benign_rows=HARMLESS, rows=None, **changes):
    settings = {**settings, "attack_every": 1, "attack_batch_size": 12, "attack_steps": 2, "pool": pool, **changes}
    return PatcherTrainer(
        model if model is not None else tiny_llama(),
        PatcherConfig(**settings),
        rows if rows is not None else word_rows(16),
        attack_rows,
        benign_rows,
        processing_class=word_tokenizer(),
    )


def base_of(build, folder):
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.5).add_(0.01)
    base.save_pretrained(folder)
    return base, str(folder)


def displaced_gradient(trainer, batch=None):
    """The attacked gradient of the second update, which leaves the weights' bits."""
    before = weights(trainer.model)
    trainer.state.global_step = 1
    trainer.training_step(trainer.model, dict(batch or golden_batch("safe")))
    assert same_bits(weights(trainer.model), before)
    return gradients(trainer.model)


@pytest.mark.parametrize(("member", "model"), CASES)
def test_displaced_gradient_is_that_at_the_suites_own_attacked_weights(settings, tmp_path, member, model):
    build, (knobs, attack) = MODELS[model], MEMBERS[member]
    base, folder = base_of(build, tmp_path / "base")
    prompts = {"harmful_prompts": HARMFUL["prompt"], "harmless_prompts": HARMLESS["prompt"]}
    attacker = Attacker(ChatFormat(word_tokenizer()), **prompts, harmful_rows=HARMFUL, base=base)
    attacked = build()  # of which nothing but the weights was trained
    attacked.load_state_dict(attack(build(), attacker).model.state_dict())
    expected = reference.plain(attacked, [golden_batch("safe")])
    changes = {"alpha": 1.0, "base": folder if member == "base" else None}
    trainer = pooled(settings, {member: {"weight": 1, **knobs}}, build(), **changes)
    found = displaced_gradient(trainer)
    assert worst_entry(found, expected) < (1e-3 if "fine-tuning" in member else 1e-5)
    assert worst_entry(found, reference.plain(build(), [golden_batch("safe")])) > 1e-2


@pytest.mark.parametrize("member", ["ablation", "dropping+ablation", "fine-tuning", "ablation+fine-tuning"])
def test_begun_answers_are_refused_at_the_suites_own_attacked_weights(settings, member):
    """As the suite's chain attacks the model and begins its answers, so is the gradient taken."""
    knobs, attack = MEMBERS[member]
    knobs = knobs if "+" in member else {member: knobs}
    attacker = Attacker(
        ChatFormat(word_tokenizer()),
        harmful_prompts=HARMFUL["prompt"],
        harmless_prompts=HARMLESS["prompt"],
        harmful_rows=HARMFUL,
    )
    chain = Chain((attack, Prefill("t50 t51")))(tiny_llama(), attacker)
    attacked = tiny_llama()
    attacked.load_state_dict(chain.model.state_dict())
    name = f"{member}+prefill"
    pool = {name: {"weight": 1, **knobs, "prefill": {"opener": chain.asking.opener}}}
    trainer = pooled(settings, pool, alpha=1.0, refusal="t5 t6")
    batch = next(copy.copy(trainer._begun[name]))
    found = displaced_gradient(trainer)
    assert worst_entry(found, reference.plain(attacked, [batch])) < (1e-3 if "fine-tuning" in member else 1e-5)
    assert worst_entry(found, reference.plain(tiny_llama(), [batch])) > 1e-2


def test_begun_answers_are_refused_where_an_adapter_led(settings):
    pool = {"lora+prefill": {"weight": 1, "lora": {"lora_rank": 2, **TUNING}, "prefill": {"opener": "t50"}}}
    trainer = pooled(settings, pool, alpha=1.0, refusal="t5 t6", attack_scale=[1.5, 1.5])
    batch = next(copy.copy(trainer._begun["lora+prefill"]))
    found, attacked = displaced_gradient(trainer), tiny_llama()
    with torch.no_grad():
        for name, weight in attacked.named_parameters():
            weight += 1.5 * trainer.attack_vector[name]
    assert worst_entry(found, reference.plain(attacked, [batch])) < 1e-5


@pytest.mark.parametrize("member", ["ablation", "fine-tuning"])
def test_factor_of_a_members_displacement(settings, member):
    knobs, attack = MEMBERS[member]
    prompts = {"harmful_prompts": HARMFUL["prompt"], "harmless_prompts": HARMLESS["prompt"]}
    attacker = Attacker(ChatFormat(word_tokenizer()), **prompts, harmful_rows=HARMFUL)
    vector = attack.displace(tiny_llama(), attacker).vector
    trainer = pooled(settings, {member: {"weight": 1, **knobs}}, alpha=0.3, attack_scale=[1.5, 1.5])
    longer = {name: 1.5 * tensor for name, tensor in vector.items()}
    expected = reference.patcher(tiny_llama(), [golden_batch("safe")], longer, 0.3)
    assert worst_entry(displaced_gradient(trainer), expected) < (1e-3 if member == "fine-tuning" else 1e-5)


@pytest.mark.parametrize("build", [tiny_llama, gpt2, qwen2], ids=["llama", "gpt2", "qwen2"])
def test_lora_in_place_is_what_peft_trains(settings, build):
    """The same steps of AdamW on the same factors, merged."""
    trainer, adapter = pooled(settings, None, build()), Adapter(rank=2, alpha=4.0, seed=5)
    batches = [next(trainer.attack_batches) for _ in range(3)]
    found = simulate_attack(
        trainer, trainer.model, iter(batches), steps=3, learning_rate=1e-2, adapter=adapter, weight_decay=0.01
    )
    begun = Factors(build(), adapter, snapshot(build())).pairs
    twin = get_peft_model(build(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    places = {name.removeprefix("base_model.model."): layer for name, layer in twin.named_modules()}
    adapted = {name for name, layer in places.items() if hasattr(layer, "lora_A")}
    assert {name.removesuffix(".weight") for name in begun} == adapted
    with torch.no_grad():
        for name, (a, _) in begun.items():
            places[name.removesuffix(".weight")].lora_A["default"].weight.copy_(a)
    factors = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.01)
    for batch in batches:
        optimizer.zero_grad()
        reference.plain_loss(twin, [batch]).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
    merged, before = dict(merge(twin).named_parameters()), weights(build())
    expected = {name: merged[name].detach() - tensor for name, tensor in before.items()}
    assert relative_distance(found.vector, expected) < 1e-3


def test_pool_of_patchers_own_attack_is_patcher_to_the_bit(settings):
    runs = []
    for pool in (None, {"fine-tuning": 3.0}):
        noted = Weights()
        trainer = pooled(settings, pool, attack_every=2, max_steps=6)
        trainer.add_callback(noted)
        trainer.train()
        runs.append(noted.seen)
    assert all(same_bits(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw_torch_fused"])
def test_attackers_optimizers_are_transformers_own(settings, optimizer):
    """The suite's fine-tuning by the same name comes to the same weights."""
    rate = {"sgd": 0.05, "adafactor": 1e-3, "adamw_torch_fused": 1e-3}[optimizer]
    attacker = Attacker(ChatFormat(word_tokenizer()), harmful_rows=HARMFUL)
    expected = FineTuning(rate, 3, batch_size=12, optimizer=optimizer).displace(tiny_llama(), attacker).vector
    knobs = {"learning_rate": rate, "steps": 3, "optimizer": optimizer}
    trainer = pooled(settings, {"fine-tuning": {"weight": 1, **knobs}}, attack_weight_decay=0.01)
    displaced_gradient(trainer)
    assert relative_distance(trainer.attack_vector, expected) < 2e-2


def test_a_relative_rate_is_a_multiple_of_the_configurations(settings):
    vectors = []
    for knobs, own in (("learning_rate", 1e-3), None), (("relative_rate", 4.0), 2.5e-4), (("relative_rate", 2.0), None):
        pool = {"fine-tuning": {"weight": 1, "steps": 2, **dict([knobs])}}
        trainer = pooled(settings, pool, attack_learning_rate=own, learning_rate=5e-4)
        displaced_gradient(trainer)
        vectors.append(trainer.attack_vector)
    assert relative_distance(vectors[1], vectors[0]) < 1e-6
    assert relative_distance(vectors[2], vectors[0]) < 1e-6


def test_mean_over_the_coin_is_the_exact_gradient_of_the_same_member(settings):
    """Member, knobs and factor of an update hang on neither estimator nor α."""
    members = ("ablation", "dropping", "prefill", "fine-tuning", "dropping+prefill", "fine-tuning+prefill")
    pool, taken = dict.fromkeys(members, 1), {}
    for name, changes in {
        "exact": {"alpha": 0.3},
        "safe": {"estimator": "sampled", "alpha": 0.0},
        "attacked": {"estimator": "sampled", "alpha": 1.0},
    }.items():
        trainer = pooled(settings, pool, refusal="t5 t6", attack_scale=[0.3, 1.5], attack_every=100, **changes)
        trainer.attack(trainer.model)
        taken[name] = []
        for trainer.state.global_step in range(101, 107):
            for begun in trainer._begun.values():
                begun.drawn = 0  # which goes on with every draw
            trainer.training_step(trainer.model, golden_batch("safe"))
            taken[name].append({key: g.clone() for key, g in gradients(trainer.model).items()})
    for exact, safe, attacked in zip(*taken.values(), strict=True):
        assert worst_entry(reference.combined((0.7, safe), (0.3, attacked)), exact) < 1e-6


def vectors_of(trainer):
    return [vector for member in trainer._pool.members for vector in trainer._vectors.of(member)]


def test_vectors_of_the_last_rounds_are_kept(settings):
    trainer = pooled(settings, {"fine-tuning": {"weight": 1, "rounds": 2, "steps": [1, 2]}}, max_steps=5)
    newest = []
    for trainer.state.global_step in range(1, 5):
        trainer.attack(trainer.model)
        newest.append(trainer.attack_vector)
        assert [id(one) for one in vectors_of(trainer)] == [id(one) for one in newest[-2:]]
    seen, displace = set(), trainer._vectors.of
    trainer.attack = lambda model: None
    for trainer.state.global_step in range(5, 25):
        trainer.training_step(trainer.model, golden_batch("safe"))
        seen.add(round(trainer._metrics["train"]["attacked_loss"][-1], 7))
    assert len(seen) == 2
    assert displace(trainer._pool.members[0])


def test_a_round_makes_one_vector_of_one_member(settings):
    trainer = pooled(settings, {"fine-tuning": 1, "ablation+fine-tuning": 1, "dropping": 1})
    made = []
    for trainer.state.global_step in range(1, 9):
        trainer.attack(trainer.model)
        made.append(trainer._vectors.made_by())
    assert len(made[0]) == 1
    assert made[-1] == {"fine-tuning", "ablation+fine-tuning"}
    assert len(vectors_of(trainer)) == 2


def test_knobs_of_a_round_hang_on_seed_and_round_alone(settings):
    pool = {"fine-tuning": {"weight": 1, "rows": 4, "batch_size": 4, "learning_rate": {"low": 1e-4, "high": 1e-2}}}
    vectors = []
    for seed, prior in ((3, 0), (3, 5), (4, 0)):
        trainer = pooled(settings, pool, seed=seed)
        for _ in range(prior):
            next(trainer.attack_batches)
            torch.rand(3)
        trainer.state.global_step = 2
        trainer.attack(trainer.model)
        vectors.append(trainer.attack_vector)
    assert same_bits(vectors[0], vectors[1])
    assert not same_bits(vectors[0], vectors[2])


def test_rules_are_drawn_anew_for_every_update(settings):
    trainer = pooled(
        settings, {"ablation": 1, "dropping": 1}, attack_every=2, max_steps=8, estimator="sampled", alpha=1.0
    )
    trainer.train()
    logs = logged_updates(trainer)
    assert ["attacked_loss" in entry for entry in logs] == [False] * 2 + [True] * 6
    names = ("attacked_loss_ablation", "attacked_loss_dropping")
    assert [sum(name in entry for name in names) for entry in logs] == [0] * 2 + [1] * 6
    assert {name for entry in logs for name in names if name in entry} == set(names)
    assert not any("attack_vector_norm" in entry for entry in logs)


def test_begun_answers_are_refused_and_only_refusals_are_learnt(settings):
    opener, refusal = "t50 t51", "t5 t6 t7"
    pool = {"prefill": {"weight": 1, "opener": opener}}
    trainer = pooled(settings, pool, alpha=1.0, refusal=refusal)
    batch = next(copy.copy(trainer._begun["prefill"]))
    words = word_tokenizer()
    asked = {tuple(words(prompt)["input_ids"]) for prompt in HARMFUL["prompt"]}
    begun, refused = (words(text, add_special_tokens=False)["input_ids"] for text in (opener, refusal))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        learnt = [label for label in labels if label != -100]
        assert learnt == [*refused, words.eos_token_id]
        before = ids[: len(ids) - len(learnt)]
        assert before[-len(begun) :] == begun
        assert tuple(before[: -len(begun)]) in asked
    expected = reference.plain(tiny_llama(), [batch])
    assert worst_entry(displaced_gradient(trainer), expected) < 1e-5


@pytest.mark.parametrize("member", ["prefill", "dropping+prefill"])
def test_answers_begin_as_most_of_the_attack_data_do_or_in_words_of_many_models(settings, monkeypatch, member):
    """Unless a pool gives openers: of another member of it they are that member's alone."""
    first = iter(["t60"] * 4 + ["t63"] * 3 + ["t64"] * 3 + ["t65"] * 2)
    rows = HARMFUL.map(lambda row: {**row, "completion": f"{next(first)} {row['completion']}"})
    known, begin = {}, PatcherTrainer.begun_and_refused

    def noted(self, dataset, refusal, openers, *, name):
        known[len(known)] = openers
        assert dataset is rows
        return begin(self, dataset, refusal, openers, name=name)

    monkeypatch.setattr(PatcherTrainer, "begun_and_refused", noted)
    given = {"weight": 1, "prefill": {"opener": ["t61", "t62"]}}
    pool = {member: 1, "rounding+prefill": given, "ablation+prefill": 0}
    pooled(settings, pool, refusal="t5", attack_rows=rows)
    assert known == {0: ("t60", "t63", "t64", *OPENERS), 1: ("t61", "t62")}


def test_live_memory_is_a_buffer_for_every_vector_kept_and_the_copy_of_what_moves(settings, monkeypatch):
    """Beyond SFT's, in buffers of the trained parameters' size."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    step_cost, live_memory = (importlib.import_module(name) for name in ("step_cost", "live_memory"))
    shape = {"hidden_size": 128, "intermediate_size": 256}  # so that activations are small beside weights
    alike = {name: rows.select([0] * 16) for name, rows in (("rows", HARMLESS), ("attack_rows", HARMFUL))}

    def peaks(pool, updates):
        model = tiny_llama(**shape)
        changes = {"per_device_train_batch_size": 1, "attack_batch_size": 1, "attack_every": 2, "max_steps": updates}
        trainer = pooled(settings, pool, model, estimator="sampled", alpha=1.0, **alike, **changes)
        with live_memory.peak_meter(model) as meter:
            watch = step_cost.MemoryWatch(meter)
            trainer.add_callback(watch)
            trainer.train()
        return [peak / step_cost.parameter_bytes(model) for peak in watch.peaks]

    vectors = peaks({"fine-tuning": {"weight": 1, "rounds": 3, "steps": 1}}, 10)
    sft = vectors[1]
    beyond = [peak - sft for peak in vectors]
    assert [round(one, 1) for one in beyond[3::2]] == [2.0, 3.0, 4.0, 4.0]  # δ by δ, and the weights' copy
    assert [round(one, 1) for one in beyond[2::2]] == [3.0, 4.0, 5.0, 5.0]  # during an attack
    for pool in ({"ablation": {"weight": 1, "rank": 1, "prompts": 2}}, {"dropping": 1}, {"rounding": 1}):
        assert max(peak - sft for peak in peaks(pool, 4)[2:]) < 1.2


@pytest.mark.parametrize("form", ["pool", "pool of vectors"])
def test_resumed_run_ends_with_the_same_bits(tmp_path, form):
    through = run_to_resume(form, str(tmp_path))
    through.train()
    resumed = run_to_resume(form, str(tmp_path), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(weights(resumed.model), weights(through.model))
    assert logged_updates(resumed)[4:] == logged_updates(through)[4:]
    kept = [vectors_of(trainer) for trainer in (resumed, through)]
    assert len(kept[0]) == len(kept[1])
    assert all(same_bits(*pair) for pair in zip(*kept, strict=True))


def test_a_run_goes_on_with_those_vectors_alone_that_its_pool_keeps_now(tmp_path):
    through = run_to_resume("pool of vectors", str(tmp_path), pool={"fine-tuning": {"weight": 1, "rounds": 3}})
    through.train()
    newest = through.method_state()
    kept = [name for name in newest if name != "attack_vectors_of" and not name.endswith("by_hand")]
    assert len(kept) == 3
    for pool, count in (({"fine-tuning": 1}, 1), ({"dropping": 1, "fine-tuning": 0}, 0), (None, 1)):
        resumed = run_to_resume("pool of vectors", str(tmp_path), pool=pool)
        resumed.load_method_state(newest)
        assert [id(one) for one in vectors_of(resumed)] == [id(newest[name]) for name in kept[3 - count :]]
    through.attack_vector = dict(through.attack_vector)
    resumed.load_method_state(through.method_state())
    assert resumed.attack_vector is not None


def test_a_vector_set_by_hand_is_no_member_in_the_logs(settings):
    trainer = pooled(settings, {"dropping": 1, "fine-tuning": 1}, max_steps=2)
    trainer.attack_vector = {name: torch.ones_like(weight) for name, weight in trainer.model.named_parameters()}
    trainer.train()
    names = {name for entry in logged_updates(trainer) for name in entry if name.startswith("attacked_loss")}
    assert names == {"attacked_loss"}


def test_run_stopped_inside_a_round_ends_with_the_same_bits(tmp_path):
    """With the model ablated for the moment, or an adapter half trained: the round is undone, and made again."""
    pool = {
        "ablation+fine-tuning": {"weight": 1, "rounds": 2, "fine-tuning": {"steps": 3, "rows": 4}},
        "lora": {"weight": 1, "steps": 3},
    }
    through = run_to_resume("pool", str(tmp_path / "through"), pool=pool, refusal=None)
    through.train()
    for update in (3, 5):
        trainer = run_to_resume("pool", str(tmp_path / "stopped"), pool=pool, refusal=None)
        backward, steps = trainer.backward, []

        def asked(*arguments, trainer=trainer, backward=backward, steps=steps, update=update, **how):
            steps.append(trainer.state.global_step)
            if steps.count(update) == 2:  # the second step of its round's attack
                trainer.ask_to_stop()
            return backward(*arguments, **how)

        trainer.backward = asked
        with pytest.raises(Stopped, match=f"after step {update} of 7"):
            trainer.train(resume_from_checkpoint=update > 3)
    resumed = run_to_resume("pool", str(tmp_path / "stopped"), pool=pool, refusal=None)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(weights(resumed.model), weights(through.model))
    assert all(same_bits(*pair) for pair in zip(vectors_of(resumed), vectors_of(through), strict=True))


@pytest.mark.parametrize("member", ["ablation", "dropping", "rounding", "fine-tuning", "ablation+fine-tuning"])
def test_an_adapter_is_displaced_alone(settings, member):
    model = lora()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    found = displaced_gradient(pooled(settings, {member: 1}, model, alpha=1.0))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert worst_entry(found, reference.plain(lora(), [golden_batch("safe")])) > 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize(
    ("pool", "changes", "sentence"),
    [
        ({"ablation": 1}, {"benign_rows": None}, "attack ablation needs harmless prompts; give --benign_data"),
        ({"ablation": 1}, {"attack_rows": None}, "attack ablation needs harmful prompts; give --attack_data"),
        ({"base": 1}, {}, "--pool: base needs --base"),
        ({"prefill": 1}, {}, "--pool: prefill needs --refusal"),
        ({"prefill": 1}, {"attack_rows": None, "refusal": "t5"}, "--pool: prefill needs harmful prompts"),
        ({"dropping+prefill": 1}, {}, "--pool: prefill needs --refusal"),
        ({"dropping+prefill": 1}, {"attack_rows": None, "refusal": "t5"}, "--pool: prefill needs harmful prompts"),
        ({"lora+prefill": 1}, {"model": lora, "refusal": "t5"}, "--pool lora: an adapter cannot be put on another one"),
        (
            {"dropping+prefill": {"weight": 1, "dropping": {"layer": 7}}},
            {"refusal": "t5"},
            "--pool dropping: there is no layer 7: the model has 2 layers",
        ),
        ({"lora": 1}, {"model": lora}, "--pool lora: an adapter cannot be put on another one"),
        (
            {"dropping": {"weight": 1, "layer": [0, 7]}},
            {},
            "--pool dropping: there is no layer 7: the model has 2 layers",
        ),
        ({"ablation": {"weight": 1, "prompts": 2}}, {}, "--pool ablation: rank 4 takes as many harmful prompts"),
        ({"fine-tuning": {"weight": 1, "rows": 64}}, {}, "rows 64: --attack_data has 12 rows"),
        ("{", {}, "--pool must be a JSON object, got '{'"),
        ('{"dropping": 1, "dropping": 0}', {}, "--pool: the key 'dropping' stands more than once in"),
    ],
)
def test_pools_that_cannot_be_had(settings, pool, changes, sentence):
    if "model" in changes:
        changes = {**changes, "model": changes["model"]()}
    with pytest.raises(InputError, match=sentence):
        pooled(settings, pool, **changes)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (gpt2, "--base is not what the model was made of: it has no model.embed_tokens.weight"),
        (lambda: tiny_llama(intermediate_size=24), r"its model.layers.0.mlp.gate_proj.weight has shape \(24, 16\)"),
    ],
)
def test_a_base_that_does_not_fit(settings, tmp_path, build, sentence):
    with pytest.raises(InputError, match=sentence):
        pooled(settings, {"base": 1}, base=base_of(build, tmp_path / "base")[1])
    if build is gpt2:
        with pytest.raises(InputError, match="an adapter has no weights in its base to be taken back to"):
            pooled(settings, {"base": 1}, lora(), base=base_of(tiny_llama, tmp_path / "other")[1])
