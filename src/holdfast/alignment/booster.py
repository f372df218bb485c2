r"""Booster: keep a step of malicious fine-tuning from lowering the harmful loss.

Booster (2409.01586), alignment stage. With H a batch of harmful prompts and answers, and ĝ = g(θ; H) / ‖g(θ; H)‖, an
update's gradient is

    g(θ; B) + λ · [ g(θ; H) − g(θ − α ĝ; H) ]

the second term being the gradient of how much one normalised harmful step gains, to first order. Three gradients an
update. The published λ = 5 and α = 0.1 belong to LoRA at learning rate 5e-4; for full parameters both need search.

Examples:
    >>> trainer = BoosterTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     args=BoosterConfig(output_dir="hardened", lam=5.0, alpha=0.1),
    ...     train_dataset=alignment,
    ...     attack_dataset=harmful,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_not_negative, require_positive
from holdfast.data.batches import Batch
from holdfast.parameters import TINY, ParameterVector, displaced, norm
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window


@dataclass
class BoosterConfig(DefenseConfig):
    """Configuration of `BoosterTrainer`.

    Args:
        lam: Weight λ of the flatness term.
        alpha: Length α of the simulated harmful step.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    lam: float = field(default=5.0, metadata={"help": "Weight of the flatness term."})
    alpha: float = field(default=0.1, metadata={"help": "Length of the simulated harmful step."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_not_negative(self, "lam")
        require_positive(self, "alpha")


class BoosterTrainer(DefenseTrainer):
    """Align with Booster.

    Each update logs `harmful_loss` L(θ; H) and `harmful_gain`, what the simulated step takes off it. Beyond SFT it
    holds two buffers of the trained parameters' size.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: Refusals to harmful prompts, and helpful answers to benign ones to keep capability.
        attack_dataset: Harmful prompts with harmful answers.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        attack_batches: The endless harmful batches, one drawn for every train batch; may be set.
    """

    _tag_names = ["holdfast", "booster"]
    _name = "Booster"
    config_class = BoosterConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BoosterConfig | None = None,
        train_dataset: Dataset | None = None,
        attack_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.attack_batches: Iterator[Batch] = self.batches_of(attack_dataset, "attack")

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B) + λ · [ g(θ; H) − g(θ − α ĝ; H) ]."""
        harmful = self.draw(self.attack_batches, len(window))
        with self.shared_randomness():
            harmful_loss, flatness = self.loss_and_gradient(model, harmful, quiet=True)
        with displaced(self.model, flatness, scale=-self.args.alpha / max(norm(flatness), TINY)):
            loss_after, gradient_after = self.loss_and_gradient(model, harmful, quiet=True)
            flatness -= gradient_after
            del gradient_after
        loss, gradient = self.loss_and_gradient(model, window)
        gradient += self.args.lam * flatness
        self.log_metric("harmful_loss", harmful_loss)
        self.log_metric("harmful_gain", harmful_loss - loss_after)
        return loss, gradient
