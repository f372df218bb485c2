"""Greedy picks are those of a plain computation from the formula, whatever the scale, order and rank of the rows."""

import json
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import GOLDEN, golden_vector
from holdfast.data.selection import relevance_diversity_dpp
from holdfast.errors import InputError

SEEDS = st.integers(0, 10_000)


def embeddings(rows, width, seed=0, mean=0.3):
    """Random rows around a common mean, as those of a language model are."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + mean


def kernel(candidates, task, beta=4):
    """The formula, word by word."""
    candidates, task = normalize(candidates.double(), dim=1), normalize(task.double(), dim=1)
    relevance = (candidates @ task.T).amax(dim=1)
    return relevance.outer(relevance) ** beta * (candidates @ candidates.T) + 1e-6 * torch.eye(len(candidates))


def is_greedy(matrix, picked):
    """Whether every pick is the best at its turn by the definition, but for rounding: all determinants taken anew."""
    for step, pick in enumerate(picked):
        before = picked[:step]
        rest = [i for i in range(len(matrix)) if i not in before]
        values = {i: torch.logdet(matrix[[*before, i]][:, [*before, i]]).item() for i in rest}
        if values[pick] < max(values.values()) - 1e-8:
            return False
    return True


def by_residuals(matrix, size):
    """Greedy picks with a fresh Cholesky factor at every step, for sizes at which determinants take too long."""
    picked = []
    for _ in range(size):
        factor = torch.linalg.cholesky(matrix[picked][:, picked])
        explained = torch.linalg.solve_triangular(factor, matrix[picked], upper=False).square().sum(dim=0)
        residual = matrix.diagonal() - explained
        residual[picked] = -math.inf
        picked.append(int(residual.argmax()))
    return picked


@pytest.mark.parametrize("named", [["size", "beta"], ["size"]])
def test_golden_picks(named):
    golden = json.loads((GOLDEN / "golden.json").read_text())["dpp"]
    asked = {name: golden[name] for name in named}
    assert relevance_diversity_dpp(**golden_vector("dpp"), **asked) == golden["chosen"]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(2, 16), st.integers(1, 6), st.sampled_from([0, 1, 2, 3, 4, 7]))
def test_every_pick_is_the_best_by_the_determinants(seed, count, width, rows, beta):
    # Without a common mean, and with few task rows, many relevances are negative.
    candidates, task = embeddings(count, width, seed, mean=0.0), embeddings(rows, width, seed + 1, mean=0.0)
    picked = relevance_diversity_dpp(candidates, task, count, beta)
    assert sorted(picked) == list(range(count))
    assert is_greedy(kernel(candidates, task, beta), picked)


@pytest.mark.parametrize("width", [64, 512])
def test_a_large_case_is_exact_below_and_beyond_its_rank(width):
    candidates, task = embeddings(2000, width), embeddings(2500, width, seed=1)
    assert relevance_diversity_dpp(candidates, task, 400) == by_residuals(kernel(candidates, task), 400)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(-30, 30), st.floats(1e-3, 1e3))
def test_the_scale_of_an_embedding_plays_no_part(seed, exponent, factor):
    candidates, task = embeddings(30, 8, seed), embeddings(20, 8, seed + 1)
    expected = relevance_diversity_dpp(candidates, task, 8)
    scales = factor * torch.rand(30, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-4
    assert relevance_diversity_dpp(candidates * scales, task * 2.0**exponent, 8) == expected


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 24))
def test_the_order_of_the_rows_plays_no_part(seed, size):
    candidates, task = embeddings(24, 16, seed), embeddings(20, 16, seed + 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    shuffled = relevance_diversity_dpp(candidates[order], task.flip(0), size)
    assert order[shuffled].tolist() == relevance_diversity_dpp(candidates, task, size)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 4), st.integers(1, 10))
def test_picks_are_distinct_and_a_longer_list_goes_on_from_a_shorter_one(seed, count, width, distinct):
    # Far more rows than dimensions, most of them duplicates.
    rows = torch.randint(distinct, (count,), generator=torch.Generator().manual_seed(seed))
    candidates, task = embeddings(distinct, width, seed)[rows], embeddings(5, width, seed + 1)
    everything = relevance_diversity_dpp(candidates, task, count)
    assert sorted(everything) == list(range(count))
    for size in range(1, count):
        assert relevance_diversity_dpp(candidates, task, size) == everything[:size]


def test_a_duplicate_comes_after_everything_that_is_new():
    distinct = embeddings(6, 8)
    candidates = distinct.repeat_interleave(3, dim=0)
    picked = relevance_diversity_dpp(candidates, embeddings(5, 8, seed=1), 18)
    assert sorted(row // 3 for row in picked[:6]) == list(range(6))


def test_of_equal_candidates_the_first_is_picked():
    assert relevance_diversity_dpp(torch.ones(5, 4), torch.ones(2, 4), 5) == [0, 1, 2, 3, 4]


def test_relevance_comes_first_and_beta_says_by_how_much():
    task = torch.tensor([[1.0, 0.0, 0.0]])
    near, also_near, far = [1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.2, 0.0, 1.0]
    candidates = torch.tensor([far, near, also_near])
    assert relevance_diversity_dpp(candidates, task, 2) == [1, 2]
    assert sorted(relevance_diversity_dpp(candidates, task, 2, beta=0)) == [0, 1]


def test_relevance_is_to_the_nearest_row_of_the_task():
    task = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert relevance_diversity_dpp(torch.tensor([[0.7, 0.7], [9.0, 0.1]]), task, 1) == [1]


@pytest.mark.parametrize("beta", [0.5, 2.5, 3, 4])
def test_a_negative_relevance_counts_by_its_magnitude_and_is_told_of(beta, caplog):
    task = torch.tensor([[1.0, 0.0]])
    opposed, near, far = [-1.0, 0.1], [1.0, 0.3], [0.3, 1.0]
    with caplog.at_level(logging.WARNING, logger="holdfast.data.selection"):
        assert relevance_diversity_dpp(torch.tensor([far, near]), task, 2, beta) == [1, 0]
        assert not caplog.records
        assert relevance_diversity_dpp(torch.tensor([far, near, opposed]), task, 3, beta)[0] == 2
    assert "1 of 3 candidates have a negative cosine to every task row" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_of_embeddings_is_taken_as_it_is(dtype):
    candidates, task = embeddings(40, 16).to(dtype), embeddings(20, 16, seed=1).to(dtype)
    expected = by_residuals(kernel(candidates, task), 40)
    assert relevance_diversity_dpp(candidates, task, 40) == expected


def test_gradients_and_inputs_are_left_alone():
    candidates, task = embeddings(10, 4).requires_grad_(), embeddings(10, 4, seed=1)
    copies = candidates.detach().clone(), task.clone()
    relevance_diversity_dpp(candidates, task, 5)
    assert torch.equal(candidates, copies[0])
    assert torch.equal(task, copies[1])
    assert candidates.grad is None


class Largest(TorchDispatchMode):
    """Notes the most entries that a tensor made inside had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 8 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


def test_no_tensor_is_larger_than_the_factor_and_a_block():
    count, size, width = 5000, 40, 4
    candidates, task = embeddings(count, width), embeddings(count, width, seed=1)
    with Largest() as largest:
        relevance_diversity_dpp(candidates, task, size)
    assert largest.entries <= 256 * 2048  # a block of cosines; n × n would be 25 million
    with Largest() as largest:
        relevance_diversity_dpp(candidates, task, 300)
    assert largest.entries == count * 300


def test_more_picks_than_rows_are_refused():
    with pytest.raises(InputError, match="size 11 asks for more rows than there are: candidates has 10"):
        relevance_diversity_dpp(embeddings(10, 4), embeddings(5, 4), 11)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_not_positive_is_refused(size):
    with pytest.raises(InputError, match=f"size must be positive, got {size}"):
        relevance_diversity_dpp(embeddings(10, 4), embeddings(5, 4), size)


@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(InputError, match="beta must be a finite number and at least 0"):
        relevance_diversity_dpp(embeddings(10, 4), embeddings(5, 4), 3, beta)


@pytest.mark.parametrize("name", ["candidates", "task"])
@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "zero, which"), (math.nan, "not finite"), (math.inf, "not finite")]
)
def test_an_embedding_without_a_direction_is_refused(name, value, problem):
    sets = {"candidates": embeddings(10, 4), "task": embeddings(8, 4)}
    sets[name][6] *= value
    with pytest.raises(InputError, match=f"{name}, row 7: the embedding is {problem}"):
        relevance_diversity_dpp(**sets, size=3)


def test_embeddings_of_different_widths_are_refused():
    with pytest.raises(InputError, match="candidates has embeddings of width 4 and task of width 5"):
        relevance_diversity_dpp(embeddings(10, 4), embeddings(8, 5), 3)


def test_a_task_without_rows_is_refused():
    with pytest.raises(InputError, match="task has no rows"):
        relevance_diversity_dpp(embeddings(10, 4), torch.empty(0, 4), 3)
