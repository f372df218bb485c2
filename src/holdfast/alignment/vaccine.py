r"""Vaccine: learn alignment under the worst small shift of the attention outputs.

Vaccine (2402.01109), alignment stage. Two passes over the same batch. The first takes the gradient of the loss with
respect to the output of every attention module, g_out,l = ∂L/∂(output of attention l). The second shifts every
attention output by a constant

    ρ · g_out,l / ‖(g_out,1 … g_out,n)‖

with one norm over all layers and all of a micro-batch on all ranks; its gradient is the update's. Published: ρ = 2.

In a hybrid model, layers without attention are shifted where they mix tokens otherwise: at the output of linear
attention, a convolution or a state-space mixer. Of a Mixture-of-Experts model both passes take the loss that is trained
on, its routers' auxiliary loss included: what is shifted is the worst for what is learned.

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
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_not_negative
from holdfast.errors import InputError
from holdfast.layers import hooked, token_mixers
from holdfast.parameters import TINY, ParameterVector, take_gradient
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

Outputs = dict[nn.Module, Tensor]
"""One tensor per token mixer, of its output's shape (rows, tokens, width)."""


@dataclass
class VaccineConfig(DefenseConfig):
    r"""Configuration of `VaccineTrainer`.

    Args:
        rho: Length ρ of the shift, over all layers together.
        attention_pattern: A regular expression that the names of the modules to shift match as a whole, such as
            `.*\.self_attn`; by default every decoder layer's attention, or what it has in its place.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    rho: float = field(default=2.0, metadata={"help": "Length of the shift, over all layers together."})
    attention_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to shift, as a regular expression; by default every decoder layer's "
            "attention, or what a hybrid model has in its place."
        },
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
        InputError: The pattern matches no module, or without one a decoder layer has no token mixer, or several.
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
        self._shifted = modules_to_shift(self.model, self.args.attention_pattern)

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B) at attention outputs shifted by ρ · g_out / ‖g_out‖."""
        losses, shifted_losses = [], []
        for part in self.each_part(model, window):
            with self.shared_randomness():
                loss, shifts = self._shifts(model, part)
            with _outputs_changed(self._shifted, lambda module, output: output + shifts[module]):  # noqa: B023
                shifted_losses.append(self.backward(model, part, router_loss=True))
            losses.append(loss)
        loss, shifted_loss = torch.stack(losses).sum(), torch.stack(shifted_losses).sum()
        self.log_metric("safe_loss", self.cross_entropy(loss, window))
        self.log_metric("perturbation_gap", shifted_loss - loss)
        return shifted_loss, take_gradient(self.model)

    def _shifts(self, model: torch.nn.Module, part: Window) -> tuple[Tensor, Mapping[nn.Module, Tensor]]:
        """The loss of a micro-batch and ρ · g_out / ‖g_out‖; no gradient of a parameter is computed."""
        outputs: Outputs = {}
        forward_is_over = False

        def note(module: nn.Module, output: Tensor) -> Tensor:
            if forward_is_over:  # checkpointing comes here again during backward, off the graph
                return output
            if module in outputs:
                raise InputError(f"--attention_pattern: a {type(module).__name__} is run more than once in a pass")
            if not output.requires_grad:  # nothing that is trained comes before it
                output.requires_grad_()
            outputs[module] = output
            return output

        with self.accelerator.no_sync(model), _outputs_changed(self._shifted, note):
            loss = self.forward(model, part, quiet=False)
            forward_is_over = True
            if not outputs:
                raise InputError("--attention_pattern: none of the modules to shift is run")
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        scale = self.args.rho / self.accelerator.reduce(squares, "sum").sqrt().clamp(min=TINY)
        return loss.detach(), {
            module: (gradient * scale).to(gradient.dtype) for module, gradient in zip(outputs, gradients, strict=True)
        }


def modules_to_shift(model: PreTrainedModel | PeftModel, pattern: str | None = None) -> list[nn.Module]:
    """The modules whose outputs are shifted, in the model's order.

    Args:
        model: Any causal language model of transformers, with an adapter or without.
        pattern: A regular expression that whole module names match; by default every decoder layer's token mixer is
            taken.

    Raises:
        InputError: A decoder layer has no token mixer, or several; the pattern matches nothing, or cannot be read.
    """
    if pattern is None:
        mixers = token_mixers(model)
        if not mixers or any(len(names) != 1 for names in mixers.values()):
            raise InputError(
                f"the model's {len(mixers)} decoder layers have {sum(map(len, mixers.values()))} modules that mix "
                "tokens, expected one in each; name those to shift with --attention_pattern"
            )
        return [model.get_submodule(name) for [name] in mixers.values()]
    try:
        matching = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"--attention_pattern {pattern} is not a regular expression ({error})") from error
    if not matching:
        raise InputError(f"--attention_pattern {pattern} matches no module of the model")
    return matching


@contextmanager
def _outputs_changed(modules: list[nn.Module], change: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Put `change(module, output)` in the place of every module's output, the first member where that is a tuple."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return change(module, output[0]), *output[1:]
        if not isinstance(output, Tensor):
            raise InputError(f"--attention_pattern matches a {type(module).__name__}, which does not return a tensor")
        return change(module, output)

    with hooked(modules, hook):
        yield
