"""Rerouting: its loss and gradient against a slow reference, under attack, in both estimators and what it needs."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

import reference
from alignment.test_retention import at, layers_of, moved_on, twin, vector_for
from helpers import golden_batch, logged_updates, same_bits, tiny_llama, weights, word_rows, word_tokenizer, worst_entry
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.errors import InputError
from holdfast.parameters import displaced, trainable_parameters
from methods import MODELS

ALPHA, RETAIN, REROUTE = 0.3, 0.5, 0.8
ATTACKS, RETAINED = word_rows(12, seed=1), word_rows(6, seed=3)


def rerouting(settings, model=None, attacks=ATTACKS, retained=RETAINED, **changes):
    weights_of = {"alpha": ALPHA, "retain_weight": RETAIN, "reroute_weight": REROUTE}
    return PatcherTrainer(
        model if model is not None else tiny_llama(),
        PatcherConfig(**{**settings, **weights_of, **changes}),
        word_rows(16),
        attacks,
        retain_dataset=retained,
        processing_class=word_tokenizer(),
    )


def upcoming(stream, count=1):
    """A stream's next batches, which stay to be drawn."""
    stream = copy.copy(stream)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize(("parts", "last"), [(1, None), (2, 1)])
@pytest.mark.parametrize("model", ["llama", "qwen2", "gpt2", "lora", "mixtral", "qwen2_moe"])
def test_loss_and_gradient_under_attack_are_those_of_the_slow_reference(settings, model, parts, last):
    build = MODELS[model]
    trainer = rerouting(settings, build(), per_device_train_batch_size=4 // parts)
    origin, window = moved_on(trainer, build), upcoming(trainer._rerouted, parts)
    before = weights(trainer.model)
    with displaced(trainer.model, vector_for(trainer.model), 1.5):
        today = twin(trainer, build)
        loss, gradient = trainer.rerouting(trainer.model, trainer.draw(trainer._rerouted, parts), last)
    expected, slow = reference.rerouting(today, origin, window, layers_of(today)[-(last or 0) :])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst_entry(gradient, slow) < 1e-5
    assert same_bits(weights(trainer.model), before)


def test_rows_one_behind_the_other_are_rerouted_as_rows_side_by_side_are(settings):
    taken = []
    for changes in ({}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 64}):
        trainer = rerouting({**settings, "max_length": None, **changes})
        moved_on(trainer)
        taken.append(trainer.rerouting(trainer.model, trainer.draw(trainer._rerouted), None))
    for loss, gradient in taken[1:]:
        torch.testing.assert_close(loss, taken[0][0], rtol=1e-5, atol=0)
        assert worst_entry(gradient, taken[0][1]) < 1e-5


def test_all_is_as_it_was_at_the_beginning_and_less_so_elsewhere(settings):
    trainer = rerouting(settings)
    trainer.remember()
    assert trainer.rerouting(trainer.model, trainer.draw(trainer._rerouted), None)[0] == pytest.approx(1)
    with displaced(trainer.model, {n: -2 * p.detach() for n, p in trainable_parameters(trainer.model).items()}):
        loss, gradient = trainer.rerouting(trainer.model, trainer.draw(trainer._rerouted), None)
    assert 0 <= loss < 1
    assert all(tensor.isfinite().all() for tensor in gradient.values())


@property_settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 2**31))
def test_it_hangs_on_no_norm(factor, seed):
    from holdfast.alignment.rerouting import _likeness

    draw = torch.Generator().manual_seed(seed)
    now, before = (torch.randn(2, 3, 8, generator=draw) for _ in range(2))
    found = _likeness(factor * now, before)
    torch.testing.assert_close(found, _likeness(now, before))
    assert found.min() >= 0
    assert not (_likeness(now, before) * _likeness(-now, before)).any()


def of_an_update(trainer, update=1):
    """The gradient of an update at the weights of the beginning, moved on, always of the same rows."""
    trainer._rerouted.drawn = 0
    return at(trainer, update)


@pytest.mark.parametrize(
    ("model", "kappa"), [("llama", 0.0), ("llama", 0.4), ("llama", 1.0), ("lora", 0.4), ("mixtral", 0.4)]
)
def test_exact_gradient_has_terms_at_the_attacked_weights(settings, model, kappa):
    build = MODELS[model]
    trainer = rerouting(settings, build(), reroute_layers=1, retain_alpha=kappa)
    trainer.attack_vector = vector_for(trainer.model)
    origin, before = moved_on(trainer, build), twin(trainer, build)
    retained, rerouted = upcoming(trainer._retained), upcoming(trainer._rerouted)
    with displaced(trainer.model, trainer.attack_vector):
        attacked = twin(trainer, build)
    terms = [
        (1, reference.patcher(before, [golden_batch("safe")], trainer.attack_vector, ALPHA)),
        (RETAIN * (1 - kappa), reference.retention(before, origin, retained, layers_of(before))[1]),
        (RETAIN * kappa, reference.retention(attacked, origin, retained, layers_of(before))[1]),
        (REROUTE, reference.rerouting(attacked, origin, rerouted, layers_of(before)[-1:])[1]),
    ]
    assert worst_entry(of_an_update(trainer), reference.combined(*terms)) < 1e-5


@pytest.mark.parametrize("attacked", [True, False])
def test_mean_over_the_coin_is_the_exact_gradient(settings, attacked):
    """With δ and, as before the first attack, without; each term as often as the formula has it."""
    whole, kappa, taken = 1 + RETAIN + REROUTE, 0.4, {}
    exact, sampled = (rerouting(settings, estimator=name, retain_alpha=kappa) for name in ("exact", "sampled"))
    for trainer in (exact, sampled):
        if attacked:
            trainer.attack_vector = vector_for(trainer.model)
        moved_on(trainer)
    shares = {"attacked_loss": ALPHA, "safe_loss": 1 - ALPHA} if attacked else {"safe_loss": 1.0}
    under_attack = {"attacked_retain_loss": kappa * RETAIN, "retain_loss": (1 - kappa) * RETAIN}
    shares |= {**(under_attack if attacked else {"retain_loss": RETAIN}), "reroute_loss": REROUTE}
    count, seen = 300, dict.fromkeys(shares, 0)
    for update in range(count):
        sampled.state.global_step = update
        value = whole * sampled._draws("coin").random()
        bounds = [sum(list(shares.values())[: place + 1]) for place in range(len(shares))]
        expected = next(name for name, bound in zip(shares, bounds, strict=True) if value < bound)
        seen[expected] += 1
        if expected not in taken:
            taken[expected] = of_an_update(sampled, update)
            assert [name for name in shares if name in sampled._metrics["train"]] == [expected]
    assert all(abs(seen[name] / count - share / whole) < 0.1 for name, share in shares.items())
    mean = reference.combined(*((share / whole, taken[name]) for name, share in shares.items()))
    exact.args.attack_every = 10**6
    assert worst_entry(mean, of_an_update(exact)) < 1e-5


def test_passes_and_tokens_are_those_of_what_was_taken(settings):
    trainer = rerouting(settings, attack_every=100, max_steps=3)
    trainer.train()
    assert logged_updates(trainer)[-1]["passes"] == 9
    trainer = rerouting(settings, estimator="sampled", attack_every=100, max_steps=12)
    trainer.train()
    entries = logged_updates(trainer)
    assert entries[-1]["passes"] == 12
    assert any("reroute_loss" in entry for entry in entries)
    totals = [entry["num_tokens"] for entry in entries]
    assert totals == sorted(set(totals))


def test_what_cannot_be_rerouted(settings):
    with pytest.raises(InputError, match=r"^--reroute_weight must not be negative, got -1"):
        PatcherConfig(**settings, reroute_weight=-1)
    with pytest.raises(InputError, match=r"^--reroute_layers must be greater than 0, got 0"):
        PatcherConfig(**settings, reroute_layers=0)
    with pytest.raises(InputError, match=r"^--reroute_layers 5: .* has 2 decoder layers"):
        rerouting(settings, reroute_layers=5)
    for lacking in ({"attacks": None, "pool": {"dropping": 1}}, {"retained": None}):
        with pytest.raises(InputError, match=r"^--reroute_weight needs --attack_data, .* and --retain_data"):
            rerouting(settings, **lacking)
