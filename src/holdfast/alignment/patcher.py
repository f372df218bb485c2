r"""Patcher: align against the displacement that a long simulated attack leads to.

Bi-level adversarial training (Patcher, 2606.07970). The attacker fine-tunes all parameters for many steps, the defender
learns weights that stay safe under the resulting displacement, the *attack vector* δ:

    attacker, every `attack_every` updates:   θ_att ← θ after `attack_steps` AdamW steps on D_attack
                                              δ ← θ_att − θ                      (held constant)
    defender, every update:                   (1 − α) · g(θ; B) + α · g(θ + δ; B)

First order: δ is taken not to depend on θ. The first `attack_every` updates are plain SFT, for want of a δ. The paper
runs 15 rounds of 300 attacker steps and 1000 updates at learning rate 1e-5 and α = 0.5.

Two settings are ours, not the paper's. The *sampled* estimator takes one gradient an update instead of two, in one
forward-backward pass as SFT; its mean over the coin is the gradient above, which is the *exact* one:

    with probability α:  g(θ + δ; B),    else  g(θ; B)

With `attack_scale` δ is taken times a factor s, drawn anew for every update from U(low, high). The coin and the factor
of an update hang on the run's seed and on the update's number alone (`holdfast.alignment.draws`).

Differs from the authors' released code:

* It adds δ to the weights and subtracts it again, which drifts by rounding; here the exact weights come back.
* It starts the defender's optimizer and shuffle anew each round; here they go on, as one run.

Examples:
    >>> trainer = PatcherTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     args=PatcherConfig(output_dir="hardened", alpha=0.5, attack_steps=300, attack_every=1000),
    ...     train_dataset=alignment,
    ...     attack_dataset=harmful,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from holdfast.alignment.draws import draws
from holdfast.attacks.simulated import simulate_attack
from holdfast.config import DefenseConfig, require_not_negative, require_positive
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.parameters import ParameterVector, displaced, vector_for
from holdfast.trainer import DefenseTrainer, Window

logger = logging.getLogger(__name__)

ESTIMATORS = ("exact", "sampled")
"""How the gradient of an update is had: in two passes, or in one of the two by a coin."""


@dataclass
class PatcherConfig(DefenseConfig):
    """Configuration of `PatcherTrainer`.

    Args:
        alpha: Weight α of the gradient under attack, 0 to 1.
        attack_steps: Length k₁ of a simulated attack, in attacker steps.
        attack_every: Updates k₂ of the defender between attacks; the first so many are plain SFT.
        attack_learning_rate: The attacker's constant rate; by default the defender's.
        attack_batch_size: Rows per device and attacker step; by default those of a whole window of the defender.
        attack_weight_decay: The attacker's weight decay.
        estimator: "exact", both gradients an update, or "sampled", one of them by a coin of probability `alpha`.
        attack_scale: The least and the greatest factor that the attack vector is taken times.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    alpha: float = field(default=0.5, metadata={"help": "Weight of the gradient under attack, 0 to 1."})
    attack_steps: int = field(default=300, metadata={"help": "Length of a simulated attack, in attacker steps."})
    attack_every: int = field(
        default=1000, metadata={"help": "Updates between simulated attacks; the first so many are plain SFT."}
    )
    attack_learning_rate: float | None = field(
        default=None, metadata={"help": "The attacker's constant learning rate; by default the defender's."}
    )
    attack_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and attacker step; by default the defender's whole window."}
    )
    attack_weight_decay: float = field(default=0.01, metadata={"help": "The attacker's weight decay."})
    estimator: str = field(
        default="exact",
        metadata={
            "help": "Both gradients an update, or one of them by a coin of probability --alpha, at the price of SFT.",
            "choices": list(ESTIMATORS),
        },
    )
    attack_scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={
            "help": "Least and greatest of the factor, drawn every update, that the attack vector is taken times."
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha must lie between 0 and 1, got {self.alpha}")
        require_positive(self, "attack_steps", "attack_every", "attack_learning_rate", "attack_batch_size")
        require_not_negative(self, "attack_weight_decay")
        if self.estimator not in ESTIMATORS:
            raise InputError(f"--estimator must be {' or '.join(ESTIMATORS)}, got {self.estimator}")
        bounds = self.attack_scale
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < math.inf:
            raise InputError(
                "--attack_scale takes two numbers, the least factor and the greatest, the least not below 0 and not "
                f"above the greatest; got {' '.join(map(str, bounds))}"
            )


class PatcherTrainer(DefenseTrainer):
    """Align with Patcher, in its sequential form: attacker and defender take turns on the same devices.

    Each update logs `safe_loss` L(θ; B), `attacked_loss` L(θ + δ; B) and their `loss_gap`; under the sampled estimator
    the one that it took, which also is its `loss`. `attack_scale` is the factor of δ. Each simulated attack logs
    `attacker_first_loss`, `attacker_last_loss`, `attack_vector_norm` and `attack_weights_moved`, the share of the
    weights that it moved. Beyond SFT it holds two buffers of the trained
    parameters' size while defending (δ, and the saved weights or the gradient under attack) and three during an attack.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: Refusals to harmful prompts, and helpful answers to benign ones to keep capability.
        attack_dataset: Harmful prompts with harmful answers, for the simulated attacker. It may be left out where
            `attack_vector` or `attack_batches` is set by hand.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        attack_batches: The attacker's endless batches; may be set.
    """

    _tag_names = ["holdfast", "patcher"]
    _name = "Patcher"
    config_class = PatcherConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PatcherConfig | None = None,
        train_dataset: Dataset | None = None,
        attack_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.attack_batches: Iterator[Batch] | None = None
        if attack_dataset is not None:
            self.attack_batches = self.batches_of(attack_dataset, "attack", self.args.attack_batch_size)
        self._attack_vector: ParameterVector | None = None
        self._set_by_hand = False
        self.add_callback(_BeforeTheFirstUpdate(self))

    @property
    def attack_vector(self) -> ParameterVector | None:
        """The attack vector δ in force (name → tensor), or None before the first attack.

        Set by hand, it stays: every step is defended with it, and no attack is simulated until it is set to None.

        Raises:
            InputError: Set to something that is not one finite tensor of the right shape per trainable parameter.
        """
        return self._attack_vector

    @attack_vector.setter
    def attack_vector(self, vector: Mapping[str, Tensor] | None) -> None:
        self._set_by_hand = vector is not None
        self._attack_vector = None if vector is None else vector_for(self.model, vector, "attack_vector")

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """(1 − α) · g(θ; B) + α · g(θ + s·δ; B), or one of the two gradients by a coin of probability α."""
        if self._attack_is_due():
            self.attack(model)
        if self.attack_vector is None:
            return self._safe_gradient(model, window)
        alpha = self.args.alpha
        if self.args.estimator == "sampled":
            if self._draws("coin").random() >= alpha:
                return self._safe_gradient(model, window)
            self.count_tokens(window)
            return self._attacked_gradient(model, window)
        with self.shared_randomness():  # and the attacked pass first, so that fewer buffers live at once
            attacked_loss, attacked_gradient = self._attacked_gradient(model, window)
        loss, gradient = self._safe_gradient(model, window)
        gradient *= 1 - alpha
        gradient += alpha * attacked_gradient
        self.log_metric("loss_gap", attacked_loss - self.cross_entropy(loss, window))
        return loss, gradient

    def _safe_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """L(θ; B) and its gradient."""
        loss, gradient = self.loss_and_gradient(model, window)
        self.log_metric("safe_loss", self.cross_entropy(loss, window))
        return loss, gradient

    def _attacked_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """L(θ + s·δ; B) and its gradient."""
        assert self.attack_vector is not None
        scale = self._draws("scale").uniform(*self.args.attack_scale)
        with displaced(self.model, self.attack_vector, scale):
            loss, gradient = self.loss_and_gradient(model, window, quiet=True)
        self.log_metric("attacked_loss", loss)
        self.log_metric("attack_scale", scale)
        return loss, gradient

    def _draws(self, purpose: str) -> np.random.Generator:
        """What is drawn for a purpose in this update."""
        return draws(self.args.seed, purpose, self.state.global_step)

    def attack(self, model: torch.nn.Module) -> None:
        """Simulate an attack on today's weights and put its vector in force; an attack gone wrong is discarded.

        Raises:
            InputError: There are no batches to attack with.
        """
        args, batches = self.args, self._batches_to_attack_with()
        self._attack_vector = None  # its memory is the new attack's
        found = simulate_attack(
            self,
            model,
            batches,
            steps=args.attack_steps,
            learning_rate=args.attack_learning_rate or args.learning_rate,
            weight_decay=args.attack_weight_decay,
            window_size=1 if args.attack_batch_size else args.gradient_accumulation_steps,
        )
        if found.discarded:
            logger.warning(
                "the simulated attack after update %d is discarded: %s; until the next one there is no attack vector",
                self.state.global_step,
                found.discarded,
            )
            return
        self._attack_vector = found.vector
        self.log_metric("attacker_first_loss", found.first_loss)
        self.log_metric("attacker_last_loss", found.last_loss)
        self.log_metric("attack_vector_norm", found.norm)
        self.log_metric("attack_weights_moved", found.weights_moved)

    def method_state(self) -> dict[str, Any]:
        """The vector in force, and whether it was set by hand; none, if a run is stopped while it looks for another."""
        vector = {} if self._attack_vector is None else {"attack_vector": self._attack_vector}
        return {**vector, "attack_vector_set_by_hand": self._set_by_hand}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Put the saved vector in force again."""
        self._attack_vector = state.get("attack_vector")
        self._set_by_hand = state["attack_vector_set_by_hand"]

    def before_the_first_update(self) -> None:
        """See that the run has what its attacks will need; called when a checkpoint has been taken up.

        Raises:
            InputError: No vector was set by hand, and there are no batches to attack with.
        """
        if self._simulates_attacks():
            self._batches_to_attack_with()
            if self._attack_vector is None and self.state.max_steps <= self.args.attack_every:
                logger.warning(
                    "no attack is due before the end of the run (--attack_every %d, %d updates): the model will be "
                    "aligned with plain SFT",
                    self.args.attack_every,
                    self.state.max_steps,
                )

    def _simulates_attacks(self) -> bool:
        return not self._set_by_hand

    def _attack_is_due(self) -> bool:
        step = self.state.global_step
        return self._simulates_attacks() and step > 0 and step % self.args.attack_every == 0

    def _batches_to_attack_with(self) -> Iterator[Batch]:
        if self.attack_batches is None:
            raise InputError(f"{type(self).__name__} lacks its attack_dataset (--attack_data), or an attack_vector")
        return self.attack_batches


class _BeforeTheFirstUpdate(TrainerCallback):
    """Calls the trainer where it is known whether a vector was set by hand: a checkpoint may have one."""

    def __init__(self, trainer: PatcherTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Look ahead."""
        self._trainer.before_the_first_update()
