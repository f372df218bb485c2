r"""Vaccine: learn alignment under the worst small shift of the attention outputs.

Vaccine (2402.01109), alignment stage. Two passes over the same batch. The first takes the gradient of the loss with
respect to the output of every attention module, g_out,l = ∂L/∂(output of attention l). The second shifts every
attention output by a constant

    ρ · g_out,l / ‖(g_out,1 … g_out,n)‖

with one norm over all layers and all of a micro-batch on all ranks; its gradient is the update's. Published: ρ = 2.

Examples:
    >>> trainer = VaccineTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     args=VaccineConfig(output_dir="hardened", rho=2.0),
    ...     train_dataset=alignment,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_not_negative
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.parameters import TINY, ParameterVector, take_gradient
from holdfast.trainer import DefenseTrainer, Window

Outputs = dict[nn.Module, Tensor]
"""One tensor per attention module, of its output's shape (rows, tokens, width)."""


@dataclass
class VaccineConfig(DefenseConfig):
    r"""Configuration of `VaccineTrainer`.

    Args:
        rho: Length ρ of the shift, over all layers together.
        attention_pattern: A regular expression that the names of the modules to shift match as a whole, such as
            `.*\.self_attn`; by default the attention modules are found by themselves.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    rho: float = field(default=2.0, metadata={"help": "Length of the shift, over all layers together."})
    attention_pattern: str | None = field(
        default=None,
        metadata={"help": "Names of the modules to shift, as a regular expression; by default all attention modules."},
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_not_negative(self, "rho")
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError(
                "--gradient_checkpointing_kwargs must leave use_reentrant false: reentrant checkpointing hides the "
                "attention outputs from autograd"
            )


class VaccineTrainer(DefenseTrainer):
    """Align with Vaccine.

    The loss that is reported is that of the second pass, whose gradient is used; each update also logs `safe_loss`
    L(θ; B) and `perturbation_gap`, what the shift adds to it. Beyond SFT it holds no buffer of the trained parameters'
    size, only one copy of the attention outputs' gradients.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: Refusals to harmful prompts, and helpful answers to benign ones to keep capability.
        **kwargs: As for `DefenseTrainer`.

    Raises:
        InputError: The pattern matches no module, or no attention module was found.
    """

    _tag_names = ["holdfast", "vaccine"]
    _name = "Vaccine"
    config_class = VaccineConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: VaccineConfig | None = None,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self._attention = attention_modules(self.model, self.args.attention_pattern)

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B) at attention outputs shifted by ρ · g_out / ‖g_out‖."""
        losses, shifted_losses = [], []
        for batch in self.each_batch(model, window):
            with self.shared_randomness():
                loss, shifts = self._shifts(model, batch, window.tokens)
            with _outputs_changed(self._attention, lambda module, output: output + shifts[module]):  # noqa: B023
                shifted_losses.append(self.backward(model, Window([batch], window.tokens)))
            losses.append(loss)
        loss, shifted_loss = torch.stack(losses).sum(), torch.stack(shifted_losses).sum()
        self.log_metric("safe_loss", loss)
        self.log_metric("perturbation_gap", shifted_loss - loss)
        return shifted_loss, take_gradient(self.model)

    def _shifts(
        self, model: torch.nn.Module, batch: Batch, tokens: Tensor | int | None
    ) -> tuple[Tensor, Mapping[nn.Module, Tensor]]:
        """L(θ; B) of a micro-batch and ρ · g_out / ‖g_out‖; no gradient of a parameter is computed."""
        outputs: Outputs = {}

        def note(module: nn.Module, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing that is trained comes before it
                output.requires_grad_()
            outputs.setdefault(module, output)  # checkpointing comes here again during backward, off the graph
            return output

        with self.accelerator.no_sync(model), _outputs_changed(self._attention, note):
            loss = self.forward(model, batch, tokens, quiet=False)
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        scale = self.args.rho / self.accelerator.reduce(squares, "sum").sqrt().clamp(min=TINY)
        return loss.detach(), {
            module: (gradient * scale).to(gradient.dtype) for module, gradient in zip(outputs, gradients, strict=True)
        }


def attention_modules(model: nn.Module, pattern: str | None = None) -> list[nn.Module]:
    """The attention modules of a model, in its order.

    Args:
        model: Any causal language model of transformers, wrapped or not.
        pattern: A regular expression that whole module names match. Without one, the outermost modules whose class is
            called `…Attention` are taken, as transformers names them in every architecture.

    Raises:
        InputError: There is none, or the pattern cannot be read.
    """
    if pattern is None:
        found = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Attention")}
        outermost = [module for name, module in found.items() if not any(_is_inside(name, other) for other in found)]
        if not outermost:
            raise InputError("no attention module was found in the model; name them with --attention_pattern")
        return outermost
    try:
        matching = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"--attention_pattern {pattern} is not a regular expression ({error})") from error
    if not matching:
        raise InputError(f"--attention_pattern {pattern} matches no module of the model")
    return matching


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


@contextmanager
def _outputs_changed(modules: list[nn.Module], change: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Put `change(module, output)` in the place of every module's output, the first member where that is a tuple."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return change(module, output[0]), *output[1:]
        if not isinstance(output, Tensor):
            raise InputError(f"--attention_pattern matches a {type(module).__name__}, which does not return a tensor")
        return change(module, output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
