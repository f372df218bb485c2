"""Algebra on parameter vectors: gradients, attack vectors and displacements of a model's trainable parameters.

A *parameter vector* holds one tensor for every trainable parameter of a model and is treated as a single vector: norms
and inner products run over all of its entries. Everything works on plain tensors and on DTensor shards alike, in place
and on the local shards, so FSDP2, DDP and LoRA need no special case.

Examples:
    One step of sharpness-aware minimisation, θ displaced along its own gradient::

        loss.backward()
        gradient = take_gradient(model)                          # moved out of param.grad
        with displaced(model, gradient, scale=0.05 / norm(gradient)):
            loss_of(model).backward()                            # gradient at the displaced weights
        # here the weights hold the very bits they held before
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast.errors import InputError

TINY = 1e-12
"""The least norm to divide by: a vector of zeros has no direction, and stays zero."""


class Scaled(NamedTuple):
    """`factor · vector`, not computed yet, so that `gradient += factor * vector` needs no buffer."""

    factor: float
    vector: ParameterVector


class ParameterVector(dict[str, Tensor]):
    """One tensor per trainable parameter, by name, added and scaled in place.

    `v += w`, `v -= w`, `v *= 0.5` and `v += 0.5 * w` allocate nothing of a parameter's size. The tensors are those
    that were put in: plain, or DTensor shards with the placement of their parameter.
    """

    @torch.no_grad()
    def __iadd__(self, other: ParameterVector | Scaled) -> Self:
        """Add another vector of the same names: θ ← θ + a·w."""
        factor, vector = other if isinstance(other, Scaled) else (1.0, other)
        torch._foreach_add_(self._local(), [local(vector[name]) for name in self], alpha=factor)
        return self

    def __isub__(self, other: ParameterVector) -> Self:
        """Subtract another vector of the same names."""
        return self.__iadd__(-1.0 * other)

    @torch.no_grad()
    def __imul__(self, factor: float) -> Self:
        """Scale in place."""
        torch._foreach_mul_(self._local(), factor)
        return self

    def __rmul__(self, factor: float) -> Scaled:
        """`factor * vector`, for use on the right of `+=`."""
        return Scaled(float(factor), self)

    def _local(self) -> list[Tensor]:
        return [local(tensor) for tensor in self.values()]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name: no frozen ones, and tied ones once.

    Under FSDP2 these are the shards, which may be written to: weights gathered for a forward pass are dropped first.
    """
    _drop_gathered_weights(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def take_gradient(model: nn.Module) -> ParameterVector:
    """Move the gradient out of `param.grad`, leaving None there. Nothing is copied.

    A trainable parameter that took no part in the loss gets zeros.
    """
    gradient = ParameterVector()
    for name, parameter in trainable_parameters(model).items():
        gradient[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return gradient


def put_gradient(model: nn.Module, gradient: Mapping[str, Tensor]) -> None:
    """Hand a gradient to the optimizer: the tensors themselves become `param.grad`."""
    for name, parameter in trainable_parameters(model).items():
        parameter.grad = gradient[name]


@torch.no_grad()
def snapshot(model: nn.Module) -> ParameterVector:
    """A copy of the trainable parameters: one buffer of their size."""
    return ParameterVector({name: p.detach().clone() for name, p in trainable_parameters(model).items()})


@torch.no_grad()
def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Write a snapshot back, bit for bit."""
    for name, parameter in trainable_parameters(model).items():
        local(parameter).copy_(local(saved[name]))


@torch.no_grad()
def displacement(model: nn.Module, origin: ParameterVector) -> ParameterVector:
    """Put the model back to `origin` and return how far it had moved, θ − origin.

    The snapshot's memory becomes the displacement, so beyond it only one tensor at a time is allocated. `origin` is
    used up.
    """
    for name, parameter in trainable_parameters(model).items():
        moved = local(parameter).clone()
        local(parameter).copy_(local(origin[name]))
        local(origin[name]).neg_().add_(moved)
    return origin


@torch.no_grad()
def snapshot_on_host(model: nn.Module) -> ParameterVector:
    """A copy of this rank's share of the trainable parameters in host memory, to compare with later (`share_moved`)."""
    return ParameterVector({name: local(p).to("cpu", copy=True) for name, p in trainable_parameters(model).items()})


@torch.no_grad()
def share_moved(
    parameters: Mapping[str, Tensor], origin: Mapping[str, Tensor], *, seen_in: torch.dtype | None = None
) -> float:
    """The share of entries whose value is not the one that `origin` has, over all entries of all shards.

    In low precision a step below half of a weight's last digit does not move it, however many follow: the share tells
    what a rate and a count of steps cannot. Entries that began at exactly zero are left out, for any step moves these:
    half of a fresh LoRA adapter would always have moved.

    Args:
        parameters: One tensor per name, each as it is stored.
        origin: What each held before, whole or this rank's share as `snapshot_on_host` has it, on whatever device. One
            tensor at a time is brought to its parameter's.
        seen_in: The type that passes compute in: a move that rounding to it hides is none then.
    """
    moved, counted = {}, {}
    for name, tensor in parameters.items():
        before = local(origin[name]).to(tensor.device)
        seen = seen_in or tensor.dtype
        moved[name] = tensor, ((local(tensor).to(seen) != before.to(seen)) & (before != 0)).sum()
        counted[name] = tensor, (before != 0).sum()
    return _total(moved) / max(_total(counted), 1)


@torch.no_grad()
def shift(model: nn.Module, direction: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Move the trainable parameters for good: θ ← θ + scale · direction. See `displaced`."""
    parameters = trainable_parameters(model)
    directions = [local(direction[name]) for name in parameters]
    torch._foreach_add_([local(p) for p in parameters.values()], directions, alpha=scale)


@torch.no_grad()
def approach(model: nn.Module, other: Mapping[str, Tensor], share: float) -> None:
    """Take the trainable parameters a share of the way to other weights, for good: θ ← θ + share · (other − θ)."""
    parameters = trainable_parameters(model)
    torch._foreach_lerp_([local(p) for p in parameters.values()], [local(other[name]) for name in parameters], share)


@contextmanager
def displaced(model: nn.Module, direction: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """Run the body at θ + scale · direction; on leaving, θ has the exact bits it had before.

    Restoring copies one saved buffer back rather than subtracting: adding and subtracting would drift by rounding, in
    bf16 by a whole percent. It may be nested, and also restores when the body raises.

    Args:
        model: Its trainable parameters are moved in place; frozen ones are not touched.
        direction: One tensor per trainable parameter, by name, each of its parameter's shape.
        scale: What the direction is multiplied by.

    Raises:
        KeyError: The direction lacks a trainable parameter; nothing has been moved.
    """
    saved = snapshot(model)
    try:
        shift(model, direction, scale)
        yield
    finally:
        restore(model, saved)


@contextmanager
def exchanged(model: nn.Module, other: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body at the weights of `other`, which has θ meanwhile; on leaving, both have the bits they had.

    No buffer is needed beyond one tensor at a time. It also changes back when the body raises, and when there is no
    memory for the next tensor on the way in.

    Args:
        model: Its trainable parameters are exchanged; frozen ones are not touched.
        other: One tensor per trainable parameter, by name, of its parameter's shape, kind and placement.

    Raises:
        KeyError: The other weights lack a trainable parameter; all are as they were.
    """
    done: list[str] = []
    try:
        for name, parameter in trainable_parameters(model).items():
            _exchange(parameter, other[name])
            done.append(name)
        yield
    finally:
        parameters = trainable_parameters(model)
        for name in done:
            _exchange(parameters[name], other[name])


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """⟨a, b⟩ over all entries of all shards.

    Sums are taken in float32 at least. Partial sums are added up over the mesh dimensions a tensor is sharded on, and
    over no other: a replicated tensor is already the same everywhere.
    """
    return _total({name: (a[name], _dot(local(a[name]), local(b[name]))) for name in a})


def norm(vector: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all entries of all shards."""
    squares = {
        name: (tensor, torch.linalg.vector_norm(local(tensor), dtype=_accumulator(tensor)).square())
        for name, tensor in vector.items()
    }
    return math.sqrt(_total(squares))


def is_finite(vector: Mapping[str, Tensor]) -> bool:
    """Whether every entry, on every shard, is a finite number."""
    broken = {name: (tensor, local(tensor).isfinite().logical_not().sum()) for name, tensor in vector.items()}
    return _total(broken) == 0


def vector_for(model: nn.Module, vector: Mapping[str, Tensor], name: str) -> ParameterVector:
    """A vector set by hand, checked and laid out as the model's trainable parameters are.

    Args:
        model: Whose trainable parameters it belongs to.
        vector: One tensor per trainable parameter, whole or already sharded.
        name: What messages call it.

    Raises:
        InputError: It is not one finite tensor of the right shape per trainable parameter.
    """
    parameters = trainable_parameters(model)
    if not (isinstance(vector, Mapping) and all(isinstance(tensor, Tensor) for tensor in vector.values())):
        raise InputError(f"{name} must hold one tensor per trainable parameter, by name")
    if vector.keys() != parameters.keys():
        odd = sorted(vector.keys() ^ parameters.keys())[0]
        raise InputError(f"{name} must hold one tensor per trainable parameter, which fails at {odd}")
    for key, parameter in parameters.items():
        if vector[key].shape != parameter.shape:
            raise InputError(f"{name}[{key!r}] has shape {tuple(vector[key].shape)}, expected {tuple(parameter.shape)}")
    laid_out = ParameterVector(
        {
            key: vector[key] if isinstance(vector[key], DTensor) else shard_like(parameter, vector[key])
            for key, parameter in parameters.items()
        }
    )
    if not is_finite(laid_out):
        raise InputError(f"{name} holds a number that is not finite")
    return laid_out


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gathered(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered; a plain tensor as it is."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor on its parameter's device and in its dtype, sharded as the parameter is."""
    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def _dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(_accumulator(a), b.dtype)
    return torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype))


@torch.no_grad()
def _total(partial_sums: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Add (tensor, partial sum of its local shard) pairs up, with one reduction per set of sharded mesh dimensions."""
    by_sharding: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for tensor, partial in partial_sums.values():
        by_sharding[_sharding(tensor)].append(partial)
    total = 0.0
    for (mesh, dimensions), sums in by_sharding.items():
        group_sum = torch.stack(sums).sum()
        for dimension in dimensions:
            assert mesh is not None  # only a DTensor has sharded dimensions
            torch.distributed.all_reduce(group_sum, group=mesh.get_group(dimension))
        total += group_sum.item()
    return total


def _sharding(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    if not isinstance(tensor, DTensor):
        return None, ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a parameter vector holds sums that were not reduced over the ranks yet")
    return tensor.device_mesh, tuple(i for i, placement in enumerate(tensor.placements) if placement.is_shard())


@torch.no_grad()
def _exchange(one: Tensor, other: Tensor) -> None:
    held = local(one).clone()
    local(one).copy_(local(other))
    local(other).copy_(held)


def _drop_gathered_weights(model: nn.Module) -> None:
    """Make FSDP2 register its shards again and gather anew.

    After a forward pass without a backward one its root keeps the full weights: `named_parameters` would yield them in
    place of the shards, and the next forward pass would use them, stale.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
