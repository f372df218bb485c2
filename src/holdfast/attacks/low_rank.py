r"""LoRA (2106.09685) in place: what an adapter's training makes of a model, through passes on the weights themselves.

An adapter trains W = W₀ + (α/r)·B·A by its factors A (r, in) and B (out, r) alone. Merged after every step it computes
the same, and the gradients of its factors follow from G, that of W:

    ∂L/∂B = (α/r)·G·Aᵀ        ∂L/∂A = (α/r)·Bᵀ·G

So a defense may simulate the attack without putting a module into a model that is wrapped or sharded already. As in the
real attack, `lora_rank` of `holdfast.attacks.finetuning`, A begins as PEFT's does and B at zero, there is no dropout,
and every linear layer but the head is adapted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.parameters import ParameterVector, gathered, local, shard_like, trainable_parameters


class Adapter(NamedTuple):
    """The settings of an adapter.

    Attributes:
        rank: r.
        alpha: α.
        seed: Of what A begins with.
    """

    rank: int
    alpha: float = 32.0
    seed: int = 0


class Factors:
    """The factors of an adapter on all linear layers of a model but its head; whole, and the same, on every rank.

    Args:
        model: A causal language model, its weights trainable, sharded by FSDP2 or not.
        adapter: The settings.
        start: W₀, by name; it is not copied.

    Attributes:
        pairs: A and B of every adapted weight, by its name.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, start: ParameterVector) -> None:
        self._model, self._start, self._scale = model, start, adapter.alpha / adapter.rank
        draw = torch.Generator().manual_seed(adapter.seed)
        head = model.get_output_embeddings()
        self._transposed: set[str] = set()
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if not isinstance(module, nn.Linear | Conv1D) or module is head or name not in start:
                continue
            rows, columns = module.weight.shape
            if isinstance(module, Conv1D):  # which holds Wᵀ
                rows, columns = columns, rows
                self._transposed.add(name)
            a = torch.empty(adapter.rank, columns).uniform_(-1, 1, generator=draw) / math.sqrt(columns)
            device = module.weight.device
            self.pairs[name] = nn.Parameter(a.to(device)), nn.Parameter(torch.zeros(rows, adapter.rank, device=device))

    def parameters(self) -> list[nn.Parameter]:
        """All factors."""
        return [factor for pair in self.pairs.values() for factor in pair]

    @torch.no_grad()
    def take_gradient(self, gradient: ParameterVector) -> None:
        """Set the gradients of the factors from that of the weights. One tensor at a time is gathered."""
        for name, (a, b) in self.pairs.items():
            g = self._turned(name, gathered(gradient[name])).to(a)
            a.grad, b.grad = self._scale * (b.T @ g), self._scale * (g @ a.T)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W₀ + (α/r)·B·A into the model."""
        parameters = trainable_parameters(self._model)
        for name, (a, b) in self.pairs.items():
            added = shard_like(parameters[name], self._turned(name, self._scale * (b @ a)))
            local(parameters[name]).copy_(local(self._start[name]) + local(added))

    def _turned(self, name: str, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if name in self._transposed else matrix
