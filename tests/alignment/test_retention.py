"""Retention: its loss and gradient against a slow reference, in both estimators, and θ₀ across checkpoints."""

import copy
import importlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, TrainerCallback

import reference
from helpers import (
    golden_batch,
    gradients,
    logged_updates,
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
from holdfast.errors import InputError
from holdfast.parameters import trainable_parameters
from methods import MODELS

RETAINED = word_rows(6, seed=3)


def retaining(settings, model=None, retained=RETAINED, **changes):
    return PatcherTrainer(
        model if model is not None else tiny_llama(),
        PatcherConfig(**{**settings, **changes}),
        word_rows(16),
        word_rows(12, seed=1),
        retain_dataset=retained,
        processing_class=word_tokenizer(),
    )


def twin(trainer, build):
    """Another model with the weights of a trainer's today."""
    model = build()
    model.load_state_dict(trainer.model.state_dict())
    return model


def moved_on(trainer, build=tiny_llama, seed=2):
    """Have a trainer's model move away from where its run began; gives the model as it was there."""
    origin = twin(trainer, build)
    trainer.remember()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(trainer.model).values():
            parameter += 0.02 * torch.randn_like(parameter)
    return origin


def upcoming(trainer, count=1):
    """The next batches to be retained, which stay to be drawn."""
    stream = copy.copy(trainer._retained)
    return [next(stream) for _ in range(count)]


def layers_of(model):
    kinds = ("DecoderLayer", "GPT2Block")
    return [name for name, module in model.named_modules() if type(module).__name__.endswith(kinds)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("model", ["llama", "qwen2", "gpt2", "lora", "mixtral", "qwen2_moe"])
def test_loss_and_gradient_are_those_of_the_slow_reference(settings, model, parts):
    build = MODELS[model]
    trainer = retaining(settings, build(), per_device_train_batch_size=4 // parts)
    origin, window, today = moved_on(trainer, build), upcoming(trainer, parts), twin(trainer, build)
    loss, gradient = trainer.retention(trainer.model, trainer.retained(parts))
    expected, slow = reference.retention(today, origin, window, layers_of(today))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst_entry(gradient, slow) < 1e-5


@pytest.mark.parametrize("model", ["llama", "gpt2", "lora", "mixtral"])
def test_no_more_of_the_vocabulary_is_gone_through_than_one_token_a_row(settings, model):
    trainer = retaining(settings, MODELS[model]())
    moved_on(trainer, MODELS[model])
    scored = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, logits: scored.append(logits.shape[:2]))
    trainer.retention(trainer.model, trainer.retained(1))
    assert scored == [(4, 1), (4, 1)]  # at the weights of the beginning, and at today's


class WholeHead(LlamaForCausalLM):
    """A model that cannot be told at how many tokens to go through its vocabulary, as few are."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, labels=labels, use_cache=use_cache)


def test_it_is_the_same_where_all_of_the_vocabulary_has_to_be_gone_through(settings):
    found = []
    for model in (tiny_llama(), WholeHead(tiny_llama().config)):
        model.load_state_dict(tiny_llama().state_dict())
        trainer = retaining(settings, model)
        moved_on(trainer)
        found.append(trainer.retention(trainer.model, trainer.retained(1)))
    (loss, gradient), (other_loss, other) = found
    assert loss == pytest.approx(other_loss)
    assert worst_entry(gradient, other) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_the_same_with_checkpointed_activations(settings, reentrant):
    taken = []
    for checkpointing in (False, True):
        trainer = retaining(settings)
        if checkpointing:  # as training does at its beginning
            trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        moved_on(trainer)
        taken.append(trainer.retention(trainer.model, trainer.retained(1))[1])
        assert trainer.model.is_gradient_checkpointing == checkpointing
    assert worst_entry(*taken) < 1e-6


def test_rows_one_behind_the_other_are_retained_as_rows_side_by_side_are(settings):
    """Whether or not something fills up their end."""
    taken = []
    for changes in ({}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 64}):
        trainer = retaining({**settings, "max_length": None, **changes})
        moved_on(trainer)
        taken.append(trainer.retention(trainer.model, trainer.retained(1)))
    for loss, gradient in taken[1:]:
        torch.testing.assert_close(loss, taken[0][0], rtol=1e-5, atol=0)
        assert worst_entry(gradient, taken[0][1]) < 1e-5


def test_nothing_is_to_be_retained_where_nothing_has_moved(settings):
    """Under dropout, too: both passes have the same masks."""
    trainer = retaining(settings, tiny_llama(attention_dropout=0.3))
    trainer.remember()
    loss, gradient = trainer.retention(trainer.model, trainer.retained(1))
    assert loss == 0
    assert all(not tensor.any() for tensor in gradient.values())


def test_weights_and_origin_come_back_to_the_bit(settings):
    trainer = retaining(settings)
    origin = moved_on(trainer)
    before = weights(trainer.model)
    trainer.retention(trainer.model, trainer.retained(1))
    assert same_bits(weights(trainer.model), before)
    assert same_bits(trainer.method_state()["retained"], weights(origin))


@property_settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 2**31))
def test_it_hangs_on_no_norm(factor, seed):
    """A stream so many times as great moves relatively as far."""
    from holdfast.alignment.retention import _relative_squares

    draw = torch.Generator().manual_seed(seed)
    now, before = (torch.randn(2, 3, 8, generator=draw) for _ in range(2))
    torch.testing.assert_close(_relative_squares(factor * now, factor * before), _relative_squares(now, before))


def at(trainer, update, begun=0):
    """The gradient of an update at the weights of the beginning, moved on."""
    trainer.state.global_step = update
    trainer._retained.drawn = begun
    trainer._metrics["train"].clear()
    trainer.training_step(trainer.model, golden_batch("safe"))
    return {name: g.clone() for name, g in gradients(trainer.model).items()}


def vector_for(model):
    torch.manual_seed(5)
    return {name: 0.02 * torch.randn_like(p) for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("model", ["llama", "lora", "mixtral"])
def test_exact_gradient_has_one_term_more(settings, model):
    build = MODELS[model]
    trainer = retaining(settings, build(), alpha=0.3, retain_weight=5.0)
    trainer.attack_vector = vector_for(trainer.model)
    origin, window, before = moved_on(trainer, build), upcoming(trainer), twin(trainer, build)
    patcher = reference.patcher(before, [golden_batch("safe")], trainer.attack_vector, 0.3)
    retained = reference.retention(before, origin, window, layers_of(before))[1]
    assert worst_entry(at(trainer, 1), reference.combined((1, patcher), (5.0, retained))) < 1e-5


@pytest.mark.parametrize("attacked", [True, False])
def test_mean_over_the_coin_is_the_exact_gradient(settings, attacked):
    """With δ and, as before the first attack, without; each term as often as the formula has it."""
    alpha, weight, taken = 0.3, 0.5, {}
    exact, sampled = (
        retaining(settings, alpha=alpha, retain_weight=weight, estimator=name) for name in ("exact", "sampled")
    )
    for trainer in (exact, sampled):
        if attacked:
            trainer.attack_vector = vector_for(trainer.model)
        moved_on(trainer)
    count, seen = 300, {"attacked_loss": 0, "safe_loss": 0, "retain_loss": 0}
    for update in range(count):
        coin = sampled._draws
        sampled.state.global_step = update
        value = (1 + weight) * coin("coin").random()
        expected = "attacked_loss" if attacked and value < alpha else "safe_loss" if value < 1 else "retain_loss"
        seen[expected] += 1
        if expected not in taken:
            taken[expected] = at(sampled, update)
            assert [name for name in seen if name in sampled._metrics["train"]] == [expected]
    shares = {"attacked_loss": alpha, "safe_loss": 1 - alpha} if attacked else {"safe_loss": 1.0}
    shares = {name: share / (1 + weight) for name, share in {**shares, "retain_loss": weight}.items()}
    assert all(abs(seen[name] / count - share) < 0.1 for name, share in shares.items())
    mean = reference.combined(*((share, taken[name]) for name, share in shares.items()))
    exact.args.attack_every = 10**6
    assert worst_entry(mean, at(exact, 1)) < 1e-5


@pytest.mark.parametrize("method", ["retaining", "rerouting"])
def test_resumed_run_ends_with_the_same_bits_and_knows_where_it_began(tmp_path, method):
    through = run_to_resume(method, str(tmp_path))
    begun = weights(through.model)
    through.train()
    assert any("retain_loss" in entry for entry in logged_updates(through))
    resumed = run_to_resume(method, str(tmp_path), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(weights(resumed.model), weights(through.model))
    assert logged_updates(resumed)[4:] == logged_updates(through)[4:]
    assert all(same_bits(trainer.method_state()["retained"], begun) for trainer in (through, resumed))


def test_a_run_that_retained_nothing_cannot_go_on_retaining(tmp_path):
    run_to_resume("sampled", str(tmp_path), max_steps=2).train()
    with pytest.raises(InputError, match=r"^--retain_data: the checkpoint has not the weights that its run began with"):
        run_to_resume("retaining", str(tmp_path)).train(resume_from_checkpoint=True)


def test_a_run_may_go_on_without_retaining(tmp_path):
    run_to_resume("retaining", str(tmp_path), max_steps=2).train()
    trainer = run_to_resume("sampled", str(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert "retained" not in trainer.method_state()


class Noted(TrainerCallback):
    """The weights right after every step of the optimizer and at the end of its update, and the rate of the step."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, *_, model, optimizer, **__):
        def stepped(inner, *_):
            self.found.append([inner.param_groups[0]["lr"], weights(model)])

        optimizer.optimizer.register_step_post_hook(stepped)

    def on_step_end(self, *_, model, **__):
        self.found[-1].append(weights(model))


@pytest.mark.parametrize("model", ["llama", "lora", "mixtral"])
def test_every_update_takes_weights_back_by_its_own_rate(settings, model):
    schedule = {"lr_scheduler_type": "linear", "learning_rate": 0.01, "max_steps": 2, "attack_every": 100}
    trainer = retaining(settings, MODELS[model](), origin_decay=40.0, **schedule)
    begun, noted = weights(trainer.model), Noted()
    trainer.add_callback(noted)
    trainer.train()
    assert [rate for rate, _, _ in noted.found] == pytest.approx([0.01, 0.005])
    for rate, stepped, ended in noted.found:
        assert worst_entry(ended, reference.back_to(begun, stepped, 40 * rate)) < 1e-6
        assert worst_entry(ended, stepped) > 1e-5
    assert same_bits(
        trainer.method_state()["retained"], {name: begun[name] for name in trainable_parameters(trainer.model)}
    )


def test_tokens_are_those_of_the_pass_that_was_taken(settings):
    """Of a sampled update that retains, of K; as TRL counts those of an update on the train data."""
    trainer = retaining(settings, estimator="sampled", retain_weight=1.0, attack_every=100, max_steps=8)
    counts, retained = [], trainer.retained

    def noted(size):
        window = retained(size)
        counts.append(int(window.batches[0]["attention_mask"].sum()))
        return window

    trainer.retained = noted
    trainer.train()
    totals = [0, *(entry["num_tokens"] for entry in logged_updates(trainer))]
    steps = [now - before for before, now in itertools.pairwise(totals)]
    assert [n for n, entry in zip(steps, logged_updates(trainer), strict=True) if "retain_loss" in entry] == counts
    assert 0 < len(counts) < 8


def test_passes_are_those_with_a_backward_pass(settings):
    trainer = retaining(settings, attack_every=100, max_steps=3)
    trainer.train()
    assert logged_updates(trainer)[-1]["passes"] == 6


def test_live_memory_is_one_buffer_for_where_the_run_began(settings, monkeypatch):
    """Beyond SFT's, in buffers of the trained parameters' size."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    step_cost, live_memory = (importlib.import_module(name) for name in ("step_cost", "live_memory"))

    def peak(retained):
        model = tiny_llama(hidden_size=128, intermediate_size=256)
        changes = {"per_device_train_batch_size": 1, "attack_every": 100, "max_steps": 8, "estimator": "sampled"}
        trainer = retaining(settings, model, retained, **changes)
        with live_memory.peak_meter(model) as meter:
            watch = step_cost.MemoryWatch(meter)
            trainer.add_callback(watch)
            trainer.train()
        return max(watch.peaks[2:]) / step_cost.parameter_bytes(model)

    assert peak(RETAINED.select([0] * 6)) - peak(None) < 1.2


def test_what_cannot_be_retained(settings):
    with pytest.raises(InputError, match=r"^--retain_weight must be greater than 0, got 0"):
        PatcherConfig(**settings, retain_weight=0)
    with pytest.raises(InputError, match="retain"):
        retaining(settings, retained=RETAINED.select([]))
    with pytest.raises(InputError, match=r"^--torch_compile cannot be used with --retain_data"):
        retaining(settings, torch_compile=True)
    with pytest.raises(InputError, match=r"^--retain_alpha must lie between 0 and 1, got 1.5"):
        PatcherConfig(**settings, retain_alpha=1.5)
    with pytest.raises(InputError, match=r"^--origin_decay must not be negative, got -1"):
        PatcherConfig(**settings, origin_decay=-1)
    with pytest.raises(InputError, match=r"^--origin_decay needs --retain_data"):
        retaining(settings, retained=None, origin_decay=1.0)


def test_a_stream_of_several_vectors_a_token_is_refused(settings):
    """As in Gemma 3n, whose layers put out four side by side."""
    trainer = retaining(settings)
    moved_on(trainer)
    trainer._layers[0].register_forward_hook(lambda _module, _inputs, output: output.expand(4, *output.shape))
    trainer._layers[1].register_forward_pre_hook(lambda _module, inputs: (inputs[0][0], *inputs[1:]))
    with pytest.raises(InputError, match=r"^--retain_data: a layer of a LlamaForCausalLM puts out \(4, 4, "):
        trainer.retention(trainer.model, trainer.retained(1))
