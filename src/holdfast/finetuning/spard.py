r"""SPARD: after every step on the user's data, project back to where the safety loss is low.

SPARD (2605.28030), fine-tuning stage, its projection SPAG. After each optimizer step on the user's data, with θ⁺ the
weights that it led to and S a batch of safety data, take ℓ = L(θ⁺; S). If ℓ > τ, with g = g(θ⁺; S):

    θ ← θ⁺ − min((ℓ − τ) / ‖g‖², η) · g

the projection on the half-space where the linearised safety loss is at most τ, cut to a trust region. Published:
τ = 0.2, η = the learning rate of fine-tuning, S one row.

Two rules, which are far from each other:

* `euclidean`, the paper's, as above.
* `adamw`, the authors' released code: S is four batches of one row; the step is taken if ℓ > τ + 0.1; g is clipped
  to norm 1, each parameter's part g_p of it scaled by min((ℓ − τ) / ‖g_p‖, 1), and handed to the *same* AdamW as
  the user's step, whose moments it shares.

The paper picks the safety rows by `holdfast.data.selection.relevance_diversity_dpp`: 3 % of the upload's size.

Examples:
    >>> trainer = SpardTrainer(
    ...     model="hardened",
    ...     args=SpardConfig(output_dir="tuned", tau=0.2),
    ...     train_dataset=upload,
    ...     safety_dataset=refusals,
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
from transformers import PreTrainedModel, TrainerCallback

from holdfast.config import DefenseConfig, require_positive
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.parameters import TINY, local, norm, put_gradient, shift, take_gradient
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

ADAMW_BATCHES = 4
"""Safety batches that the released code adds up."""
ADAMW_MARGIN = 0.1
"""How far above τ the safety loss must be before the released code acts."""


@dataclass
class SpardConfig(DefenseConfig):
    """Configuration of `SpardTrainer`.

    Args:
        tau: The safety loss τ up to which the user's step is left alone, in nats per token.
        eta: The largest step size η of the projection; by default the learning rate of the user's step.
        projection: "euclidean" (paper) or "adamw" (released code).
        safety_batch_size: Safety rows per device and batch.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    tau: float = field(default=0.2, metadata={"help": "Safety loss up to which the user's step is left alone."})
    eta: float | None = field(
        default=None, metadata={"help": "Largest step size of the projection; by default the user step's rate."}
    )
    projection: str = field(
        default="euclidean",
        metadata={"help": "How to project: the paper or the released code.", "choices": ["euclidean", "adamw"]},
    )
    safety_batch_size: int = field(default=1, metadata={"help": "Safety rows per device and batch."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_positive(self, "tau", "eta", "safety_batch_size")
        if self.projection not in ("euclidean", "adamw"):
            raise InputError(f"--projection must be euclidean or adamw, got {self.projection}")
        if self.eta is not None and self.projection == "adamw":
            raise InputError("--eta belongs to --projection euclidean: the released code has no trust region")


class SpardTrainer(DefenseTrainer):
    """Fine-tune with SPARD.

    Each update logs `safety_loss` ℓ at the weights that the user's step led to, and `projection_step`, the factor that
    g was taken with (0 where ℓ was low enough). Beyond SFT it holds no buffer: the user's gradient is dropped before
    the safety gradient is taken.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: The user's data.
        safety_dataset: Harmful prompts with refusals.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        safety_batches: The endless safety batches; may be set.
    """

    _tag_names = ["holdfast", "spard"]
    _name = "SPARD"
    config_class = SpardConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SpardConfig | None = None,
        train_dataset: Dataset | None = None,
        safety_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.safety_batches: Iterator[Batch] = self.batches_of(safety_dataset, "safety", self.args.safety_batch_size)
        self.add_callback(_AfterUserStep(self))

    def project(self, model: torch.nn.Module, *batches: Batch) -> float:
        """Project today's weights by the rule of the configuration.

        Args:
            model: The model as wrapped for training.
            *batches: What to take ℓ and g on: one batch for the rule `euclidean`, any number for `adamw`, which takes
                steps of the trainer's optimizer.

        Returns:
            The step size that g was taken with, 0.0 where ℓ was low enough; for `adamw` the largest scale of a part.

        Raises:
            InputError: Another number of batches, or no optimizer yet.
        """
        args, window = self.args, self.as_window(list(batches))
        self.model.zero_grad()
        if args.projection == "adamw":
            return self._project_by_adamw(model, window)
        if len(window) != 1:
            raise InputError(f"--projection euclidean projects on one safety batch, got {len(window)}")
        share = self.forward(model, window)
        loss = self._safety_loss(share)
        if loss <= args.tau:
            return 0.0
        self.accelerator.backward(share)
        gradient = take_gradient(self.model)
        step: float = min((loss - args.tau) / max(norm(gradient), TINY) ** 2, args.eta or self._rate())
        shift(self.model, gradient, scale=-step)
        return step

    def _project_by_adamw(self, model: torch.nn.Module, window: Window) -> float:
        """The released code's projection: a step of the user's own AdamW, moments and all."""
        if self.optimizer is None:
            raise InputError("--projection adamw takes a step of the optimizer, which is there once training has begun")
        loss = self._safety_loss(self.backward(model, window))
        gradient = take_gradient(self.model)
        if loss <= self.args.tau + ADAMW_MARGIN:
            return 0.0
        gradient *= min(1.0, 1.0 / max(norm(gradient), TINY))
        excess = loss - self.args.tau
        scales: list[float] = [min(excess / max(norm({name: part}), TINY), 1.0) for name, part in gradient.items()]
        for scale, part in zip(scales, gradient.values(), strict=True):
            local(part).mul_(scale)
        put_gradient(self.model, gradient)
        self.optimizer.step()
        self.model.zero_grad()
        return max(scales)

    def after_user_step(self) -> None:
        """Project the weights that the user's step led to; called between the optimizer's step and the scheduler's."""
        count = ADAMW_BATCHES if self.args.projection == "adamw" else 1
        batches = self.take(self.safety_batches, count)
        self.log_metric("projection_step", self.project(self.model_wrapped, *batches))

    def _safety_loss(self, share: Tensor) -> float:
        """ℓ, the same on all ranks, from this rank's share of it."""
        loss = self.accelerator.gather(share.detach().reshape(1)).mean()
        self.log_metric("safety_loss", loss)
        return float(loss)

    def _rate(self) -> float:
        """The rate of the step that was just taken."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else self.args.learning_rate


class _AfterUserStep(TrainerCallback):
    """Calls the trainer where the training loop has stepped and not yet cleared the gradient."""

    def __init__(self, trainer: SpardTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Project."""
        self._trainer.after_user_step()
