"""Choosing the safety rows that go with a user's data: near to its task, and unlike one another.

SPARD (arXiv 2605.28030) takes candidates by greedy maximum-a-posteriori inference in a determinantal point process.
With q_i the greatest cosine of candidate x_i to any row of the task, its kernel is

    L_ij = (q_i q_j)^β · cos(x_i, x_j) + 1e-6 · [i = j],        β = 4,

and every step adds the candidate that multiplies det L_S, S being what was picked so far, by most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.errors import InputError

_JITTER = 1e-6
# Rows brought to float64 at a time. A block of the usual widths stays in a core's cache, which makes converting it for
# every pick cheap; blocks of the task are larger, because every one meets all candidates.
_ROWS_AT_ONCE = 256
_TASK_ROWS_AT_ONCE = 2048

logger = logging.getLogger(__name__)


@torch.no_grad()
def relevance_diversity_dpp(candidates: Tensor, task: Tensor, size: int, beta: float = 4.0) -> list[int]:
    """Pick candidates that are relevant to a task and diverse, greedily.

    What a candidate would multiply the determinant by is its residual variance L_ii − L_iS L_SS⁻¹ L_Si. It is kept up
    to date with one new row of the Cholesky factor per pick (Chen, Zhang & Zhou 2018, arXiv 1709.05135, algorithm 1),
    which needs one column of the kernel. All arithmetic is in float64, as float32 leaves the exact picks after a few
    hundred. For n candidates and m task rows of width d it takes O(nmd + size·n·(d + size)) time, and beyond the
    embeddings 8·n·size bytes and some blocks.

    The sign of q_i plays no part. With an even β it drops out of the formula; with an odd one it turns the signs of
    whole rows and columns, which leaves every determinant as it is; for other β the formula has no real value at
    q_i q_j < 0, and |q_i q_j|^β continues it. So a candidate opposed to every task row counts for as much as one that
    is as near to a row as this one is far. A warning tells of such candidates.

    Residual variances are at least the jitter of 1e-6, so duplicates and more picks than dimensions are no problem.
    Of candidates that tie the first one is picked, as far as rounding lets them tie.

    Args:
        candidates: Embeddings to pick from, (n, d), of any scale.
        task: Embeddings of the user's data, (m, d).
        size: How many to pick, 1 to n.
        beta: How much relevance counts; with 0 there is diversity alone.

    Returns:
        The rows picked, in order, counted from 0.

    Raises:
        InputError: If `size` or `beta` is out of range, there is no task row, the widths differ, or an embedding is
            zero or not finite; the set and the row are named, counted from 1.
    """
    count = len(candidates)
    if size <= 0:
        raise InputError(f"size must be positive, got {size}")
    if size > count:
        raise InputError(f"size {size} asks for more rows than there are: candidates has {count}")
    if not (math.isfinite(beta) and beta >= 0):
        raise InputError(f"beta must be a finite number and at least 0, got {beta}")
    if len(task) == 0:
        raise InputError("task has no rows; expected at least one")
    if candidates.shape[1] != task.shape[1]:
        raise InputError(
            f"candidates has embeddings of width {candidates.shape[1]} and task of width {task.shape[1]}; "
            "expected those of one model"
        )
    norms = _norms(candidates, "candidates")
    weights = _relevance(candidates, norms, task).abs() ** beta
    residual = weights.square() + _JITTER
    factor = candidates.new_empty((size, count), dtype=torch.float64)
    picked: list[int] = []
    for step in range(size):
        best = int(residual.argmax())
        picked.append(best)
        # The jitter is on the diagonal alone, so of the columns picked nobody needs it again.
        column = weights * weights[best] * _cosines(candidates, norms, best)
        torch.sub(column, factor[:step, best] @ factor[:step], out=factor[step])
        factor[step] /= residual[best].sqrt()
        residual -= factor[step].square()
        residual[best] = -math.inf
    return picked


def _relevance(candidates: Tensor, norms: Tensor, task: Tensor) -> Tensor:
    """The greatest cosine of every candidate to any row of the task, (n,)."""
    relevance = torch.full_like(norms, -math.inf)
    task_norms = _norms(task, "task")
    for task_rows, task_block in _float64_blocks(task, _TASK_ROWS_AT_ONCE):
        directions = (task_block / task_norms[task_rows, None]).to(candidates.device)
        for rows, block in _float64_blocks(candidates, _ROWS_AT_ONCE):
            nearest = (block @ directions.T).amax(dim=1) / norms[rows]
            relevance[rows] = torch.maximum(relevance[rows], nearest)
    if opposed := int((relevance < 0).sum()):
        logger.warning(
            "%d of %d candidates have a negative cosine to every task row; their relevance counts by its magnitude",
            opposed,
            len(candidates),
        )
    return relevance


def _cosines(candidates: Tensor, norms: Tensor, row: int) -> Tensor:
    """The cosine of every candidate to one of them, (n,)."""
    direction = candidates[row].double() / norms[row]
    products = torch.empty_like(norms)
    for rows, block in _float64_blocks(candidates, _ROWS_AT_ONCE):
        torch.mv(block, direction, out=products[rows])
    return products / norms


def _float64_blocks(embeddings: Tensor, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows with their embeddings in float64, each block in the memory of the one before."""
    memory = embeddings.new_empty((at_once, embeddings.shape[1]), dtype=torch.float64)
    for start in range(0, len(embeddings), at_once):
        rows = slice(start, min(start + at_once, len(embeddings)))
        yield rows, memory[: rows.stop - start].copy_(embeddings[rows])


def _norms(embeddings: Tensor, name: str) -> Tensor:
    """The length of every embedding, (n,), in float64."""
    # In blocks, because a norm taken with dtype=float64 would convert all rows at once.
    blocks = _float64_blocks(embeddings, _ROWS_AT_ONCE)
    norms = torch.cat([torch.linalg.vector_norm(block, dim=1) for _, block in blocks])
    unusable = ~(norms.isfinite() & (norms > 0))
    if unusable.any():
        row = int(unusable.int().argmax())
        problem = "zero, which has no direction" if norms[row] == 0 else "not finite"
        raise InputError(f"{name}, row {row + 1}: the embedding is {problem}")
    return norms
