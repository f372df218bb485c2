"""Algebra on parameter vectors, and moving a model and putting it back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import same_bits, tiny_llama, weights
from holdfast.parameters import (
    ParameterVector,
    displaced,
    displacement,
    dot,
    exchanged,
    is_finite,
    norm,
    put_gradient,
    restore,
    share_moved,
    snapshot,
    snapshot_on_host,
    take_gradient,
    trainable_parameters,
)

SHAPES = {"a": (3, 2), "b": (4,), "c": (1, 1, 2), "scalar": ()}
seeds = st.integers(0, 2**32 - 1)
factors = st.floats(-8, 8, width=32)


def vector(seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return ParameterVector({name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in SHAPES.items()})


def flat(v):
    return torch.cat([t.reshape(-1) for t in v.values()])


def copy(v):
    return ParameterVector({name: t.clone() for name, t in v.items()})


@given(seeds, seeds, factors, factors)
def test_in_place_algebra_is_that_of_one_flat_vector(first, second, a, b):
    v, w = vector(first), vector(second)
    expected = a * flat(v) + b * flat(w)
    v *= a
    v += b * w
    torch.testing.assert_close(flat(v), expected)
    v -= w
    torch.testing.assert_close(flat(v), expected - flat(w))
    v += w
    torch.testing.assert_close(flat(v), expected)


@given(seeds, factors)
def test_adding_leaves_the_other_vector_and_its_memory_alone(seed, a):
    v, w = vector(seed), vector(seed + 1)
    kept, places = copy(w), {name: t.data_ptr() for name, t in v.items()}
    same_object = v
    v += a * w
    v -= w
    v *= a
    assert v is same_object
    assert {name: t.data_ptr() for name, t in v.items()} == places
    assert same_bits(w, kept)


@given(seeds, seeds, seeds, factors)
def test_dot_is_symmetric_and_linear(first, second, third, a):
    u, v, w = vector(first), vector(second), vector(third)
    assert dot(v, w) == pytest.approx((flat(v) @ flat(w)).item(), abs=1e-12)
    assert dot(v, w) == pytest.approx(dot(w, v), abs=1e-12)
    mixed = copy(u)
    mixed += a * v
    assert dot(mixed, w) == pytest.approx(dot(u, w) + a * dot(v, w), abs=1e-10)


@given(seeds, seeds, factors)
def test_norm_obeys_its_laws(first, second, a):
    v, w = vector(first), vector(second)
    assert norm(v) == pytest.approx(math.sqrt(dot(v, v)), rel=1e-12)
    assert abs(dot(v, w)) <= norm(v) * norm(w) * (1 + 1e-12)
    total = copy(v)
    total += w
    assert norm(total) <= norm(v) + norm(w) + 1e-12
    length = norm(v)
    v *= a
    assert norm(v) == pytest.approx(abs(a) * length, rel=1e-9, abs=1e-12)


@given(seeds)
def test_adding_what_was_subtracted_scaled_to_unit_length(seed):
    v = vector(seed)
    v *= 1 / norm(v)
    assert norm(v) == pytest.approx(1, rel=1e-12)


@given(seeds, st.data())
def test_share_moved_counts_the_entries_that_differ(seed, data):
    """By hand on one flat vector, on one tensor without an entry, and with a nan, which differs from everything."""
    before = vector(seed, torch.float32)
    before["none"] = torch.empty(0, 3)
    after = copy(before)
    size = len(flat(before))
    chosen = data.draw(st.sets(st.integers(0, size - 1)))
    by = data.draw(st.sampled_from([1e-3, -8.0, math.nan]))
    positions, start = {}, 0
    for name, tensor in after.items():
        for index in range(tensor.numel()):
            positions[start + index] = (name, index)
        start += tensor.numel()
    for position in chosen:
        name, index = positions[position]
        after[name].view(-1)[index] += by
    assert share_moved(after, before) == pytest.approx(len(chosen) / size)
    assert share_moved(before, before) == 0


def test_entries_that_began_at_zero_do_not_count_as_moved():
    """A step that is too small for a fresh adapter's A moves its B, which begins at zero, all the same."""
    before = ParameterVector(A=torch.full((4, 8), 0.1), B=torch.zeros(8, 4))
    after = ParameterVector(A=before["A"] + 1e-10, B=before["B"] + 1e-10)
    assert share_moved(after, before) == 0
    after["A"][:1] += 1e-3
    assert share_moved(after, before) == 0.25


def test_passes_in_bf16_see_only_moves_of_half_a_last_digit():
    before = ParameterVector(w=torch.full((4, 4), 0.1).bfloat16().float())
    after = ParameterVector(w=before["w"] + 1e-5)
    after["w"][0] += 1e-3
    assert share_moved(after, before) == 1
    assert share_moved(after, before, seen_in=torch.bfloat16) == 0.25


def test_share_moved_is_of_entries_as_they_are_stored():
    """A step below half of a weight's last digit is none in bf16."""
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.uniform_(model.weight, 0.05, 0.1)
    origin = snapshot_on_host(model)
    with torch.no_grad():
        model.weight.add_(1e-5)
    assert share_moved(trainable_parameters(model), origin) == 0
    with torch.no_grad():
        model.weight[:16].add_(1e-2)
    assert share_moved(trainable_parameters(model), origin) == 0.25


def test_low_precision_is_summed_in_float32():
    """4096 squares of 0.1 in bf16 would stall far below their sum."""
    v = ParameterVector(w=torch.full((4096,), 0.1, dtype=torch.bfloat16))
    square = torch.tensor(0.1, dtype=torch.bfloat16).item() ** 2
    assert dot(v, v) == pytest.approx(4096 * square, rel=1e-4)
    assert norm(v) == pytest.approx(math.sqrt(4096 * square), rel=1e-4)


def test_dot_takes_unlike_precisions():
    a, b = vector(0, torch.bfloat16), vector(1, torch.float32)
    assert dot(a, b) == pytest.approx((flat(a).float() @ flat(b)).item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_is_finite_sees_a_single_entry(bad):
    v = vector(0)
    assert is_finite(v)
    v["c"][0, 0, 1] = bad
    assert not is_finite(v)


def test_huge_entries_are_finite_though_their_norm_is_none():
    v = vector(0)
    v["c"][0, 0, 1] = 3e38
    assert is_finite(v)


def backward(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model(input_ids=ids, labels=ids).loss.backward()


def lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def frozen_embeddings(model):
    model.model.embed_tokens.requires_grad_(False)
    return model


MODELS = {
    "float32": tiny_llama,
    "bfloat16": lambda: tiny_llama().to(torch.bfloat16),
    "float16": lambda: tiny_llama().to(torch.float16),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "tied bfloat16": lambda: tiny_llama(tie_word_embeddings=True).to(torch.bfloat16),
    "frozen": lambda: frozen_embeddings(tiny_llama()),
    "lora": lambda: lora(tiny_llama()),
    "lora on bfloat16": lambda: lora(tiny_llama().to(torch.bfloat16)),
}


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "_"))
def model(request):
    return MODELS[request.param]()


def direction(model, seed=0, size=0.3):
    draw = torch.Generator().manual_seed(seed)
    return ParameterVector(
        {n: (size * torch.randn(p.shape, generator=draw)).to(p.dtype) for n, p in trainable_parameters(model).items()}
    )


def test_displaced_moves_every_trainable_parameter_and_restores_the_bits(model):
    before, moved = weights(model), direction(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with displaced(model, moved, scale=-1.7):
        for name, parameter in model.named_parameters():
            expected = before[name] + (-1.7 * moved[name].float() if name in moved else 0)
            one_rounding = 2 * torch.finfo(parameter.dtype).eps
            torch.testing.assert_close(
                parameter.detach(), expected.to(parameter.dtype), rtol=one_rounding, atol=one_rounding
            )
            assert name not in moved or not torch.equal(parameter, before[name])
    assert same_bits(weights(model), before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_displaced_restores_after_an_exception(model):
    before = weights(model)
    with pytest.raises(ZeroDivisionError), displaced(model, direction(model)):
        raise ZeroDivisionError
    assert same_bits(weights(model), before)


def test_displaced_nests(model):
    before = weights(model)
    with displaced(model, direction(model, 1)):
        first = weights(model)
        with displaced(model, direction(model, 2), scale=1e4):
            assert not same_bits(weights(model), first)
        assert same_bits(weights(model), first)
    assert same_bits(weights(model), before)


def test_displaced_restores_even_what_a_step_inside_changed(model):
    before = weights(model)
    with displaced(model, direction(model)):
        backward(model)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert same_bits(weights(model), before)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(-3e38, 3e38) | st.just(math.nan) | st.just(math.inf))
def test_displaced_restores_after_any_scale(seed, scale):
    """Also after one that overflows bfloat16."""
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    before = weights(layer)
    with displaced(layer, direction(layer, seed), scale=scale):
        pass
    assert same_bits(weights(layer), before)


def test_exchanged_weights_are_the_others_and_come_back(model):
    before, other = weights(model), snapshot(model)
    other *= 1.5
    theirs = {name: tensor.clone() for name, tensor in other.items()}
    with exchanged(model, other):
        assert same_bits(dict(trainable_parameters(model)), theirs)
        assert same_bits(other, {name: before[name] for name in other})
    with pytest.raises(ZeroDivisionError), exchanged(model, other):
        raise ZeroDivisionError
    assert same_bits(weights(model), before)
    assert same_bits(other, theirs)


def test_exchanged_without_a_name_changes_nothing(model):
    before, lacking = weights(model), snapshot(model)
    lacking *= 1.5
    lacking.popitem()
    theirs = {name: tensor.clone() for name, tensor in lacking.items()}
    with pytest.raises(KeyError), exchanged(model, lacking):
        pytest.fail("the body must not run")
    assert same_bits(weights(model), before)
    assert same_bits(lacking, theirs)


def test_displaced_without_a_name_touches_nothing(model):
    before, lacking = weights(model), direction(model)
    lacking.popitem()
    with pytest.raises(KeyError), displaced(model, lacking):
        pytest.fail("the body ran")
    assert same_bits(weights(model), before)


def test_displaced_with_a_wrong_shape_touches_nothing():
    layer = nn.Linear(3, 2)
    before = weights(layer)
    with pytest.raises(RuntimeError), displaced(layer, {"weight": torch.ones(2, 3), "bias": torch.ones(7)}):
        pytest.fail("the body ran")
    assert same_bits(weights(layer), before)


def test_tied_parameters_are_one_entry_and_move_once():
    model = tiny_llama(tie_word_embeddings=True)
    names = [name for name in trainable_parameters(model) if "embed" in name or "lm_head" in name]
    assert names == ["model.embed_tokens.weight"]
    before = model.lm_head.weight.detach().clone()
    with displaced(model, {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}):
        torch.testing.assert_close(model.lm_head.weight.detach(), before + 1)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


def test_gradient_is_moved_not_copied(model):
    backward(model)
    places = {name: p.grad.data_ptr() for name, p in trainable_parameters(model).items()}
    gradient = take_gradient(model)
    assert {name: t.data_ptr() for name, t in gradient.items()} == places
    assert all(p.grad is None for p in model.parameters())
    put_gradient(model, gradient)
    assert {name: p.grad.data_ptr() for name, p in trainable_parameters(model).items()} == places


def test_taken_gradients_do_not_share_memory(model):
    """A second backward pass must not write into the gradient that was taken."""
    backward(model)
    first = take_gradient(model)
    kept = copy(first)
    backward(model)
    second = take_gradient(model)
    assert same_bits(first, kept)
    assert same_bits(first, second)
    assert not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in second.values()}


def test_unused_parameter_takes_a_zero_gradient():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(3, 4)})
    model["used"](torch.ones(1, 2)).sum().backward()
    gradient = take_gradient(model)
    assert gradient.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(gradient["unused.weight"], torch.zeros(4, 3))
    assert torch.equal(gradient["used.weight"], torch.ones(1, 2))


def test_frozen_parameters_are_in_no_vector():
    model = lora(tiny_llama())
    assert all("lora_" in name for name in snapshot(model))
    backward(model)
    assert take_gradient(model).keys() == snapshot(model).keys() == trainable_parameters(model).keys()


def test_snapshot_and_restore(model):
    before = weights(model)
    saved = snapshot(model)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.fill_(torch.nan)
    restore(model, saved)
    assert same_bits(weights(model), before)
    assert not {t.data_ptr() for t in saved.values()} & {p.data_ptr() for p in model.parameters()}


def test_displacement_is_how_far_the_model_moved(model):
    before, origin = weights(model), snapshot(model)
    memory = {name: t.data_ptr() for name, t in origin.items()}
    with torch.no_grad():
        for name, moved in direction(model).items():
            trainable_parameters(model)[name].add_(moved)
    after = weights(model)
    vector = displacement(model, origin)
    assert same_bits(weights(model), before)
    assert all(torch.equal(vector[name], after[name] - before[name]) for name in vector)
    assert {name: t.data_ptr() for name, t in vector.items()} == memory


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the storages that operations create."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tensors(args)}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.kept[storage.data_ptr()] = storage
        return result

    def bytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def size_of(model):
    return sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())


def test_displaced_keeps_one_saved_copy():
    model = tiny_llama()
    moved = direction(model)
    with Allocations() as seen, displaced(model, moved, scale=0.5):
        pass
    assert seen.bytes() == size_of(model)


def test_in_place_algebra_allocates_nothing():
    v, w = vector(0), vector(1)
    with Allocations() as seen:
        v += 0.5 * w
        v -= w
        v *= 3.0
    assert seen.bytes() == 0


def test_taking_a_gradient_allocates_nothing():
    model = tiny_llama()
    backward(model)
    with Allocations() as seen:
        put_gradient(model, take_gradient(model))
    assert seen.bytes() == 0
