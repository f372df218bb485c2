"""Patcher's parallel form: what the defender does with what attackers publish, and what an attacker publishes."""

import copy
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from helpers import logged_updates, relative_distance, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.alignment.draws import draws
from holdfast.alignment.parallel import ParallelPatcherConfig, PatcherDefenderTrainer
from holdfast.alignment.parallel_attacker import PatcherAttackerTrainer
from holdfast.config import DefenseConfig
from holdfast.errors import InputError, Stopped, TrainingError
from holdfast.exchange import Exchange, fingerprint_of
from holdfast.parameters import share_moved
from holdfast.trainer import DefenseTrainer
from methods import mixtral

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def settings(settings, tmp_path):
    return {**settings, "exchange": str(tmp_path / "exchange"), "max_steps": 7}


def defender(settings, model=None, callbacks=(), retained=None, **changes):
    return PatcherDefenderTrainer(
        model if model is not None else tiny_llama(),
        ParallelPatcherConfig(**{**settings, "role": "defender", "attack_every": 2, **changes}),
        word_rows(16),
        word_rows(12, seed=1),
        retain_dataset=retained,
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
    )


def attacker(settings, model=None, peft_config=None, **changes):
    settings = {**settings, "output_dir": settings["output_dir"] + "-attacker"}
    return PatcherAttackerTrainer(
        model if model is not None else tiny_llama(),
        ParallelPatcherConfig(**{**settings, "role": "attacker", "exchange_timeout": 1.0, **changes}),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def joined(settings, origin):
    return Exchange(
        settings["exchange"], origin=origin, run=None, fingerprint=fingerprint_of(tiny_llama(), word_tokenizer())
    )


def shifted(vector, by):
    return {name: tensor + by for name, tensor in vector.items()}


class Attackers(TrainerCallback):
    """Publishes, after given updates of the defender, the newest weights that the exchange has, moved by a constant."""

    def __init__(self, settings, plan):
        self.settings, self.plan, self.jobs, self.seen, self.in_force = settings, plan, {}, {}, {}

    def on_step_end(self, args, state, control, *, model, **_):
        self.seen[state.global_step] = weights(model)
        self.in_force[state.global_step] = copy.deepcopy(self.trainer.attack_vector)
        self.trainer._exchange.wait()
        for origin, by, changes in self.plan.get(state.global_step, ()):
            job = self.jobs.setdefault(origin, joined(self.settings, origin))
            version = job.newest("defender")
            attacked = job.load(version, dict(model.named_parameters()))
            facts = {"first_loss": 2.0, "last_loss": 1.0, "weights_moved": 0.75, **version.facts, **changes}
            job.publish(shifted(attacked, by), step=version.step, facts=facts)
            job.wait()

    def on_train_end(self, args, state, control, **_):
        for job in self.jobs.values():
            job.close()


def defended_against(settings, plan, **changes):
    attackers = Attackers(settings, plan)
    trainer = defender(settings, callbacks=[attackers], **changes)
    attackers.trainer = trainer
    trainer.train()
    return trainer, attackers


def test_defender_without_attackers_is_sft_and_does_not_wait(settings):
    trainer = defender(settings)
    trainer.train()
    plain = {name: value for name, value in settings.items() if name != "exchange"}
    sft = DefenseTrainer(tiny_llama(), DefenseConfig(**plain), word_rows(16), processing_class=word_tokenizer())
    sft.train()
    assert same_bits(weights(trainer.model), weights(sft.model))
    assert trainer.vectors == []


def test_vector_leads_from_todays_weights_to_the_attacked_ones(settings):
    """Published after update 3, on the weights of update 2; found before the update that follows update 4."""
    trainer, attackers = defended_against(settings, {3: [("mallory", 0.5, {})]})
    assert all(attackers.in_force[step] is None for step in (1, 2, 3, 4))
    expected = {name: attackers.seen[2][name] + 0.5 - tensor for name, tensor in attackers.seen[4].items()}
    assert same_bits(attackers.in_force[5], expected)
    assert same_bits(attackers.in_force[7], expected)  # none is newer: it stays
    [found] = trainer.vectors
    length = sum(tensor.square().sum() for tensor in expected.values()).sqrt().item()
    assert found.pop("norm") == pytest.approx(length, rel=1e-5)
    assert found == {
        "step": 4,
        "origin": "mallory",
        "version": 1,
        "attacked_step": 2,
        "staleness": 2,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "weights_moved": 0.75,
    }
    logged = [entry for entry in trainer.state.log_history if "attack_staleness" in entry]
    assert [(e["step"], e["attack_staleness"], e["attack_weights_moved"]) for e in logged] == [(5, 2.0, 0.75)]


def test_sampled_defender_takes_one_of_the_two_gradients(settings):
    """By coins that do not hang on what the attackers publish, nor on when."""
    sampled = {"estimator": "sampled", "attack_scale": [0.5, 1.5], "max_steps": 12}
    trainer, _ = defended_against(settings, {3: [("mallory", 0.01, {})]}, **sampled)
    logs = logged_updates(trainer)
    assert all(("safe_loss" in entry) is not ("attacked_loss" in entry) for entry in logs)
    assert {"attacked_loss" in entry for entry in logs[4:]} == {True, False}
    coins = [draws(3, "coin", update).random() < 0.5 for update in range(4, 12)]
    assert ["attacked_loss" in entry for entry in logs[4:]] == coins


def test_sampled_defender_may_retain_and_reroute(settings):
    sampled = {"estimator": "sampled", "retained": word_rows(6, seed=3), "reroute_weight": 1.0, "max_steps": 24}
    sampled |= {"retain_weight": 1.0, "retain_alpha": 0.5, "origin_decay": 1.0}
    begun = weights(tiny_llama())
    trainer, _ = defended_against(settings, {3: [("mallory", 0.01, {})]}, **sampled)
    each = {"attacked_loss", "safe_loss", "retain_loss", "attacked_retain_loss", "reroute_loss"}
    terms = [each & entry.keys() for entry in logged_updates(trainer)]
    assert all(len(names) == 1 for names in terms)
    assert set().union(*terms[4:]) == each
    assert same_bits(trainer.method_state()["retained"], begun)


def test_defender_with_a_pool_keeps_what_attackers_publish_and_draws_the_rest_itself(settings):
    plan = {update: [("mallory", 0.01 * update, {})] for update in (1, 3, 5)}
    pool = {"fine-tuning": {"weight": 1, "rounds": 2}, "dropping": 1}
    trainer, attackers = defended_against(settings, plan, pool=pool, estimator="sampled", alpha=1.0, max_steps=14)
    logs = logged_updates(trainer)
    assert ["attacked_loss" in entry for entry in logs] == [False] * 2 + [True] * 12
    names = {name for entry in logs for name in entry if name.startswith("attacked_loss_")}
    assert names == {"attacked_loss_fine-tuning", "attacked_loss_dropping"}
    assert [found["step"] for found in trainer.vectors] == [2, 4, 6]
    kept = trainer._vectors.of(trainer._pool.members[0])
    assert [same_bits(*pair) for pair in zip(kept, (attackers.in_force[5], attackers.in_force[7]), strict=True)] == [
        True
    ] * 2


def test_defender_begins_the_answers_at_what_attackers_publish(settings):
    """Each vector goes to one of the members that train."""
    plan = {update: [("mallory", 0.01 * update, {})] for update in range(1, 12, 2)}
    pool = {
        "fine-tuning": {"weight": 1, "rounds": 2},
        "fine-tuning+prefill": {"weight": 1, "prefill": {"opener": "t50"}},
    }
    changes = {"refusal": "t5 t6", "estimator": "sampled", "alpha": 1.0, "max_steps": 16}
    trainer, attackers = defended_against(settings, plan, pool=pool, **changes)
    names = {name for entry in logged_updates(trainer) for name in entry if name.startswith("attacked_loss_")}
    assert names == {"attacked_loss_fine-tuning", "attacked_loss_fine-tuning+prefill"}
    published = [attackers.in_force[found["step"] + 1] for found in trainer.vectors]
    assert len(published) == 6
    for member in trainer._pool.members:
        kept = trainer._vectors.of(member)
        assert 1 <= len(kept) <= member.rounds
        assert all(any(same_bits(one, other) for other in published) for one in kept)


def test_attackers_are_taken_in_turn(settings):
    plan = {1: [("ann", 0.1, {}), ("bob", 0.2, {})], 3: [("bob", 0.3, {})], 5: [("ann", 0.1, {}), ("bob", 0.3, {})]}
    trainer, _ = defended_against(settings, plan, max_steps=9)
    used = [(found["step"], found["origin"], found["version"]) for found in trainer.vectors]
    assert used == [(2, "ann", 1), (4, "bob", 2), (6, "ann", 2), (8, "bob", 3)]


def test_publications_have_their_own_rhythm(settings):
    published = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer._exchange.wait()
            version = trainer._exchange.newest("defender", after=len(published))
            if version is not None:
                published.append((version.number, version.step))

    trainer = defender(settings, callbacks=[Note()], publish_every=3)
    trainer.train()
    assert published == [(1, 0), (2, 3), (3, 6)]
    assert [entry["step"] for entry in trainer.state.log_history if "publish_seconds" in entry] == [1, 4, 7]


def test_weights_of_a_run_before_are_not_used(settings):
    trainer, _ = defended_against(settings, {3: [("mallory", 0.5, {"lineage": "of a run before"})]})
    assert trainer.vectors == []


@pytest.mark.parametrize(("published", "used"), [(5, True), (7, False)])
def test_resumed_run_uses_what_attacked_weights_that_it_has_had(settings, published, used):
    """After update 5 those of update 4 are attacked, with which it resumes; after update 7 those of update 6."""
    changes = {"save_strategy": "steps", "save_steps": 4}
    defended_against(settings, {published: [("mallory", 0.5, {})]}, **changes)
    resumed = defender(settings, max_steps=9)
    resumed.train(resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-4")
    assert [(found["step"], found["attacked_step"]) for found in resumed.vectors] == ([(4, 4)] if used else [])


def test_weights_that_are_not_finite_are_not_used(settings, caplog):
    logging.getLogger("holdfast").propagate = True
    trainer, _ = defended_against(settings, {3: [("mallory", float("nan"), {})]})
    assert trainer.vectors == []
    assert "numbers that are not finite" in caplog.text


def test_resumed_run_goes_on_with_the_vector_in_force(settings):
    settings = {**settings, "save_strategy": "steps", "save_steps": 5}
    trainer, attackers = defended_against(settings, {3: [("mallory", 0.5, {})]})
    resumed = defender(settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.attack_vector, attackers.in_force[5])
    assert same_bits(weights(resumed.model), weights(trainer.model))
    assert resumed.vectors == trainer.vectors


# ---------------------------------------------------------------------- an attacker


class Defender:
    """Publishes weights as a defender does, and reads what an attacker made of them."""

    def __init__(self, settings, model=None, versions=1):
        self.model = model if model is not None else tiny_llama(seed=5)
        self.exchange = Exchange(
            settings["exchange"],
            origin="defender",
            run="a run",
            fingerprint=fingerprint_of(self.model, word_tokenizer()),
        )
        for number in range(versions):
            self.exchange.publish(self.weights(number), step=10 * number, facts={"lineage": "x"})
            self.exchange.wait()

    def weights(self, number=0):
        return shifted(weights(self.model), 0.01 * number)

    def attacked(self, origin="attacker", after=0):
        version = self.exchange.newest(origin, after=after)
        return version, self.exchange.load(version, weights(self.model))


def attack_once(batches, start, lr=1e-3, build=tiny_llama):
    """Where the attack must have led on these batches, and its losses."""
    model, losses = build(), []
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), losses


class Finish(TrainerCallback):
    """After so many steps of the attacker, the defender is done; notes the batches."""

    def __init__(self, exchange, steps):
        self.exchange, self.steps, self.batches = exchange, steps, []

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.steps:
            self.exchange.finish()


def finished_after(trainer, exchange, steps):
    note = Finish(exchange, steps)
    trainer.callback_handler.callbacks.insert(0, note)
    step = trainer.training_step

    def noted(model, inputs, *rest):
        note.batches.append({key: tensor.clone() for key, tensor in inputs.items()})
        return step(model, inputs, *rest)

    trainer.training_step = noted
    trainer.train()
    return note.batches


@pytest.mark.parametrize("build", [tiny_llama, mixtral])
def test_attacker_publishes_where_its_attack_led(settings, build):
    """Not on the weights that it was started with, with the reference in plain torch; and stops with the defender.

    On a Mixture-of-Experts model without the routers' auxiliary loss, as the sequential form's attacks are.
    """
    other = Defender(settings, build(seed=5) if build is tiny_llama else build(), versions=2)
    trainer = attacker(settings, build(), attack_steps=3, attack_learning_rate=2e-3, attack_batch_size=2)
    batches = finished_after(trainer, other.exchange, 3)
    assert trainer.attacks == 1
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    version, found = other.attacked()
    assert (version.number, version.step, version.facts["lineage"]) == (1, 10, "x")
    expected, losses = attack_once(batches, other.weights(1), lr=2e-3, build=build)
    assert relative_distance(found, expected) < 1e-5
    assert relative_distance(found, other.weights(1)) > 1e-4
    assert version.facts["first_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert version.facts["last_loss"] == pytest.approx(losses[2], rel=1e-5)
    assert version.facts["weights_moved"] == share_moved(found, other.weights(1)) > 0.5


def test_every_attack_starts_from_the_newest_weights_with_a_fresh_optimizer(settings):
    other = Defender(settings)

    class Republish(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                other.exchange.publish(other.weights(7), step=70, facts={"lineage": "x"})
                other.exchange.wait()

    trainer = attacker(settings, attack_steps=2)
    trainer.callback_handler.callbacks.insert(0, Republish())
    batches = finished_after(trainer, other.exchange, 4)
    assert trainer.attacks == 2
    version, found = other.attacked()
    assert (version.number, version.step) == (2, 70)
    assert relative_distance(found, attack_once(batches[2:], other.weights(7))[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_attacker_is_merged(settings, dtype):
    """And publishes the rest to the bit as the defender did, whatever precision its own model came in."""
    other = Defender(settings)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    rates = {"attack_steps": 2, "attack_learning_rate": 1e-2}
    trainer = attacker(settings, model=tiny_llama().to(dtype), peft_config=adapter, **rates)
    finished_after(trainer, other.exchange, 2)
    _, found = other.attacked()
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, other.weights()[name])}
    assert moved == {name for name in found if "q_proj" in name or "down_proj" in name}
    for name in moved:
        difference = found[name] - other.weights()[name]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 4


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
def test_adapter_of_tied_embeddings_cannot_be_merged(settings):
    tied = lambda: tiny_llama(seed=5, tie_word_embeddings=True)  # noqa: E731
    Defender(settings, tied())
    adapter = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="--lora_target_modules: an adapter of tied embeddings"):
        attacker(settings, tied(), peft_config=adapter).train()


def test_every_lora_attack_starts_from_a_fresh_adapter(settings):
    other = Defender(settings)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = attacker(settings, peft_config=adapter, attack_steps=1, attack_learning_rate=1e-2)
    seen = []
    begin = trainer.begin_round

    def noted():
        going_on = begin()
        seen.append(sum(p.abs().sum().item() for name, p in trainer.model.named_parameters() if "lora_B" in name))
        return going_on

    class Republish(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                other.exchange.publish(other.weights(1), step=10, facts={"lineage": "x"})
                other.exchange.wait()

    trainer.begin_round = noted
    trainer.callback_handler.callbacks.insert(0, Republish())
    finished_after(trainer, other.exchange, 2)
    assert seen[:2] == [0.0, 0.0]
    assert trainer.attacks == 2


def test_attack_gone_wrong_is_not_published(settings, caplog):
    logging.getLogger("holdfast").propagate = True
    other = Defender(settings)
    trainer = attacker(settings, attack_steps=2)
    backward = trainer.backward
    trainer.backward = lambda *window, **how: backward(*window, **how) * torch.nan
    finished_after(trainer, other.exchange, 2)
    assert trainer.attacks == 0
    assert "an attack is discarded" in caplog.text
    assert other.exchange.newest("attacker") is None


def test_attacker_gives_up_when_nothing_new_comes(settings):
    other = Defender(settings)
    trainer = attacker(settings, attack_steps=1, exchange_timeout=0.1)
    with pytest.raises(TrainingError, match=r"published nothing new in .* for 0.1 seconds \(--exchange_timeout\)"):
        trainer.train()
    assert trainer.attacks == 1
    other.exchange.close()


def test_attacker_that_is_asked_to_stop(settings):
    """In an attack, between two of them, and before there is anything to attack."""
    first = attacker(settings)
    first.ask_to_stop()
    with pytest.raises(Stopped, match="after 0 attacks"):
        first.train()
    other = Defender(settings)

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == self.step:
                self.trainer.ask_to_stop()

    for step, attacks in ((1, 0), (2, 1)):  # the defender's weights are enough for one attack of two steps
        ask = Ask()
        ask.step, ask.trainer = step, attacker(settings, attack_steps=2)
        ask.trainer.callback_handler.callbacks.insert(0, ask)
        with pytest.raises(Stopped, match=f"after {attacks} attacks") as caught:
            ask.trainer.train()
        assert caught.value.checkpoint is None
        assert not list(Path(settings["output_dir"]).glob("checkpoint-*"))
    other.exchange.close()


def test_attacker_that_comes_too_late_leaves_at_once(settings):
    other = Defender(settings)
    other.exchange.finish()
    trainer = attacker(settings)
    trainer.train()
    assert trainer.attacks == 0
    other.exchange.close()


def test_attacker_without_a_defender_gives_up(settings):
    with pytest.raises(TrainingError, match="no defender has opened the exchange"):
        attacker(settings, exchange_timeout=0.1).train()


def test_exchange_that_vanishes(settings):
    Defender(settings)

    class Delete(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            shutil.rmtree(settings["exchange"])

    trainer = attacker(settings, attack_steps=1)
    trainer.callback_handler.callbacks.insert(0, Delete())
    with pytest.raises(TrainingError, match="is gone"):
        trainer.train()


# ---------------------------------------------------------------------- bad settings


@pytest.mark.parametrize("role", ["defender", "attacker"])
def test_role_without_an_exchange(settings, role):
    del settings["exchange"]
    with pytest.raises(InputError, match=f"--role {role} needs --exchange"):
        ParallelPatcherConfig(**settings, role=role)


def test_unknown_role(settings):
    with pytest.raises(InputError, match="--role must be defender or attacker, got judge"):
        ParallelPatcherConfig(**settings, role="judge")


def test_attacker_with_the_defenders_name(settings):
    with pytest.raises(InputError, match="--attacker_name defender cannot be used"):
        ParallelPatcherConfig(**settings, role="attacker", attacker_name="defender")


@pytest.mark.parametrize("name", ["publish_every", "exchange_timeout"])
def test_settings_that_must_be_positive(settings, name):
    with pytest.raises(InputError, match=f"--{name} must be greater than 0"):
        ParallelPatcherConfig(**settings, **{name: 0})


def test_attacker_of_another_model(settings):
    Defender(settings)
    with pytest.raises(InputError, match="not opened with the same model"):
        attacker(settings, model=tiny_llama(hidden_size=32)).train()


def test_attacker_with_another_tokenizer(settings):
    Defender(settings)
    trainer = attacker(settings)
    trainer.processing_class.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match="not opened with the same tokenizer"):
        trainer.train()


def test_attacker_that_trains_something_else(settings):
    Defender(settings)
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(InputError, match="not opened with the same trained parameters"):
        attacker(settings, model=model).train()


def test_exchange_of_another_run(settings, tmp_path):
    trainer = defender(settings)
    trainer.train()
    with pytest.raises(InputError, match="belongs to the run"):  # before anything of its own is touched
        defender({**settings, "output_dir": str(tmp_path / "other")})


def test_an_attacker_beside_the_defender_asks_as_one_in_turns_does(settings, tmp_path):
    given = {"exchange": str(tmp_path / "exchange"), "suffixes": ["t90 t91", "t92"]}
    beside, in_turns = attacker(settings, **given), defender(settings, **given)
    assert beside.train_dataset["input_ids"] == in_turns._attack_rows["input_ids"]
