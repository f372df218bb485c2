r"""Lisa: alternate between the user's data and safety data, and hold each to where the other left off.

Lisa (2405.18641), fine-tuning stage. Two states take turns: `safety_steps` K_a updates on safety data, `user_steps` K_f
updates on the user's. An update's gradient is

    g(θ; B) + ρ · (θ − anchor)

that of L(θ; B) + ρ/2 · ‖θ − anchor‖², where the anchor is the weights at which the *other* state last ended. The run
starts in the safety state with the initial weights as anchor. The proximal term is left out during the first
`proximal_start` share of the run. Published: K_a = 100, K_f = 900, ρ = 1, proximal_start = 0.1.

With ρ = 0 this is Bi-State Optimization (BSO), its ancestor.

Differs from the authors' released code:

* It counts micro-batches; here optimizer updates are counted.
* It draws a batch of the user's data in the safety state, too, and throws it away; here no row of theirs is lost.

Examples:
    >>> trainer = LisaTrainer(
    ...     model="hardened",
    ...     args=LisaConfig(output_dir="tuned", safety_steps=100, user_steps=900, rho=1.0),
    ...     train_dataset=upload,
    ...     safety_dataset=refusals,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_not_negative, require_positive
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.parameters import ParameterVector, local, snapshot, trainable_parameters, vector_for
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

logger = logging.getLogger(__name__)

State = Literal["safety", "user"]


@dataclass
class LisaConfig(DefenseConfig):
    """Configuration of `LisaTrainer`.

    Args:
        rho: Strength ρ of the proximal term; 0 is Bi-State Optimization.
        safety_steps: Updates K_a of a safety state.
        user_steps: Updates K_f of a user state.
        proximal_start: The share of the run that passes before the proximal term comes in, 0 to 1.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    rho: float = field(
        default=1.0, metadata={"help": "Strength of the proximal term; 0 is Bi-State Optimization (BSO)."}
    )
    safety_steps: int = field(default=100, metadata={"help": "Updates on safety data in a row."})
    user_steps: int = field(default=900, metadata={"help": "Updates on the user's data in a row."})
    proximal_start: float = field(
        default=0.1, metadata={"help": "Share of the run that passes before the proximal term comes in, 0 to 1."}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_not_negative(self, "rho")
        require_positive(self, "safety_steps", "user_steps")
        if not 0 <= self.proximal_start <= 1:
            raise InputError(f"--proximal_start must lie between 0 and 1, got {self.proximal_start}")


class LisaTrainer(DefenseTrainer):
    """Fine-tune with Lisa.

    The number of updates is the one that `train_dataset`, the batch and `num_train_epochs` or `max_steps` come to; the
    safety states are among them. Each update logs its loss as `safety_loss` or `user_loss`, by its state. Beyond SFT it
    holds one buffer of the trained parameters' size, the anchor, and none for ρ = 0.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: The user's data.
        safety_dataset: Harmful prompts with refusals.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        safety_batches: The endless batches of the safety state; may be set.
    """

    _tag_names = ["holdfast", "lisa"]
    _name = "Lisa"
    config_class = LisaConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LisaConfig | None = None,
        train_dataset: Dataset | None = None,
        safety_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.safety_batches: Iterator[Batch] = self.batches_of(safety_dataset, "safety")
        # Not the training loop's iterator: its epochs would end before the rows do that safety states leave undrawn.
        self._user_batches: Iterator[Batch] = self.stream(self.train_dataset, "train")
        self._anchor: ParameterVector | None = None
        self._bi_state: State = "safety"
        self._updates_in_state = 0

    @property
    def anchor(self) -> ParameterVector | None:
        """What the proximal term holds to (name → tensor), or None before the run has begun; may be set.

        Raises:
            InputError: Set to something that is not one finite tensor of the right shape per trainable parameter.
        """
        return self._anchor

    @anchor.setter
    def anchor(self, anchor: Mapping[str, Tensor] | None) -> None:
        self._anchor = None if anchor is None else vector_for(self.model, anchor, "anchor")

    @property
    def bi_state(self) -> State:
        """The state that the next update is made in, "safety" or "user"; set by hand, it starts anew.

        (`state` is what transformers calls the progress of the run.)
        """
        return self._bi_state

    @bi_state.setter
    def bi_state(self, state: State) -> None:
        if state not in get_args(State):
            raise InputError(f"bi_state must be safety or user, got {state!r}")
        self._bi_state, self._updates_in_state = state, 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The window of an update: the state's own batches."""
        self._enter_update()
        batches = self.safety_batches if self.bi_state == "safety" else self._user_batches
        return super().get_batch_samples(iter(self.take(batches, num_batches)), num_batches, device)

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B) + ρ · (θ − anchor)."""
        loss, gradient = self.loss_and_gradient(model, window, router_loss=self.bi_state == "user")
        self.log_metric(f"{self.bi_state}_loss", loss)
        if self._anchor is not None and self._proximal_term_is_on():
            for name, parameter in trainable_parameters(self.model).items():
                drift = local(parameter) - local(self._anchor[name])
                local(gradient[name]).add_(drift, alpha=self.args.rho)
        return loss, gradient

    def method_state(self) -> dict[str, Any]:
        """The anchor, the state, and how far it is."""
        anchor = {} if self._anchor is None else {"anchor": self._anchor}
        return {**anchor, "bi_state": self._bi_state, "updates_in_state": self._updates_in_state}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved run was."""
        self._anchor = state.get("anchor")
        self._bi_state, self._updates_in_state = state["bi_state"], state["updates_in_state"]

    def _enter_update(self) -> None:
        """Count the update, and change state when the present one has had its share."""
        if self.state.global_step == 0 and 0 < self.state.max_steps <= self.args.safety_steps:
            logger.warning(
                "the run ends before the user's data are trained on (--safety_steps %d, %d updates); give a smaller "
                "--safety_steps",
                self.args.safety_steps,
                self.state.max_steps,
            )
        if self._anchor is None and self.args.rho:
            self._anchor = snapshot(self.model)
        length = self.args.safety_steps if self.bi_state == "safety" else self.args.user_steps
        if self._updates_in_state >= length:
            self.bi_state = "user" if self.bi_state == "safety" else "safety"
            if self.args.rho:
                self._anchor = None  # its memory is the new anchor's
                self._anchor = snapshot(self.model)
        self._updates_in_state += 1

    def _proximal_term_is_on(self) -> bool:
        return bool(self.args.rho) and self.state.global_step >= self.args.proximal_start * self.state.max_steps
