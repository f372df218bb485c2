r"""Antibody, alignment stage: a flat harmful loss, and refusals that survive a harmful step.

Antibody (2603.00498). With H a batch of harmful prompts and answers, R the same prompts answered with refusals,
ĝ = g(θ; H) / ‖g(θ; H)‖, θ⁻ = θ − ρ ĝ and the flatness s = g(θ; H) − g(θ⁻; H), an update's gradient is

    g(θ; B) + λ_t · s + λ_r · g(θ⁻; R)

Two rules for λ_t:

* `kkt`, the paper's Theorem 4.1: λ_t = max(0, ξ − ⟨s, g(θ; B)⟩ / ‖s‖²). No ξ is published.
* `cosine`, the authors' released code: λ_t = max(0, η − cos(s, g(θ; B))), smoothed by an exponential moving average
  (0.99, from the first update's value on), with η = 5.

ρ = 0.1 and λ_r = 0.05 for both. Four gradients an update.

Examples:
    >>> trainer = AntibodyAlignmentTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     args=AntibodyAlignmentConfig(output_dir="hardened", refusal="refusals.txt"),
    ...     train_dataset=alignment,
    ...     attack_dataset=harmful,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_not_negative, require_positive
from holdfast.data.batches import Batch
from holdfast.data.refusals import DEFAULT_REFUSAL, REFUSAL_HELP, refusal_view, without_refusals
from holdfast.errors import InputError
from holdfast.parameters import TINY, ParameterVector, displaced, dot, norm
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

SMOOTHING = 0.99
"""The share of the past in the moving average of λ_t under the `cosine` rule."""

PUBLISHED_STRENGTH = 5.0


@dataclass
class AntibodyAlignmentConfig(DefenseConfig):
    """Configuration of `AntibodyAlignmentTrainer`.

    Args:
        rho: Length ρ of the simulated harmful step.
        refusal_weight: Weight λ_r of the refusals after that step.
        flatness_rule: "cosine" (released code) or "kkt" (paper).
        strength: η of `cosine`, 5 by default, or ξ of `kkt`, which has no published value and must be given.
        refusal: What harmful prompts are to be answered with: a text, a file with one text per line, or the name of a
            column of the attack data.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    rho: float = field(default=0.1, metadata={"help": "Length of the simulated harmful step."})
    refusal_weight: float = field(default=0.05, metadata={"help": "Weight of the refusals after that step."})
    flatness_rule: str = field(
        default="cosine",
        metadata={
            "help": "How the flatness term is weighted: the released code or the paper.",
            "choices": ["cosine", "kkt"],
        },
    )
    strength: float | None = field(
        default=None, metadata={"help": "Strength of the flatness rule; 5 for cosine, and to be given for kkt."}
    )
    refusal: str = field(default=DEFAULT_REFUSAL, metadata={"help": REFUSAL_HELP})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_positive(self, "rho")
        require_not_negative(self, "refusal_weight", "strength")
        if self.flatness_rule not in ("cosine", "kkt"):
            raise InputError(f"--flatness_rule must be cosine or kkt, got {self.flatness_rule}")
        if self.strength is None and self.flatness_rule == "kkt":
            raise InputError("--strength must be given with --flatness_rule kkt: none has been published")
        if self.strength is None:
            self.strength = PUBLISHED_STRENGTH
        if self.packing or self.padding_free:
            raise InputError("--packing and --padding_free cannot be used: every harmful row has its own refusal")


class AntibodyAlignmentTrainer(DefenseTrainer):
    """Align with Antibody.

    Each update logs `harmful_loss` L(θ; H), `harmful_gain`, what the simulated step takes off it, `refusal_loss`
    L(θ⁻; R), and `flatness_weight` λ_t. Beyond SFT it holds two buffers of the trained parameters' size.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: Refusals to harmful prompts, and helpful answers to benign ones to keep capability.
        attack_dataset: Harmful prompts with harmful answers.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        attack_batches: The endless harmful batches, each with its refusal view (`refusal_input_ids`,
            `refusal_attention_mask`, `refusal_labels`); may be set.
    """

    _tag_names = ["holdfast", "antibody"]
    _name = "Antibody"
    config_class = AntibodyAlignmentConfig
    refused_sets = frozenset({"attack"})

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AntibodyAlignmentConfig | None = None,
        train_dataset: Dataset | None = None,
        attack_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.attack_batches: Iterator[Batch] = self.batches_of(attack_dataset, "attack")
        self._smoothed: float | None = None

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B) + λ_t · s + λ_r · g(θ⁻; R)."""
        drawn = self.draw(self.attack_batches, len(window))
        harmful = replace(drawn, batches=[without_refusals(batch) for batch in drawn.batches])
        refusing = self.as_window([refusal_view(batch) for batch in drawn.batches])
        with self.shared_randomness():
            harmful_loss, flatness = self.loss_and_gradient(model, harmful, quiet=True)
        with displaced(self.model, flatness, scale=-self.args.rho / max(norm(flatness), TINY)):
            loss_after, gradient_after = self.loss_and_gradient(model, harmful, quiet=True)
            flatness -= gradient_after
            del gradient_after
            refusal_loss, refusal_gradient = self.loss_and_gradient(model, refusing, quiet=True)
        loss, gradient = self.loss_and_gradient(model, window)
        flatness_weight = self._flatness_weight(flatness, gradient)
        gradient += flatness_weight * flatness
        gradient += self.args.refusal_weight * refusal_gradient
        self.log_metric("harmful_loss", harmful_loss)
        self.log_metric("harmful_gain", harmful_loss - loss_after)
        self.log_metric("refusal_loss", refusal_loss)
        self.log_metric("flatness_weight", flatness_weight)
        return loss, gradient

    def method_state(self) -> dict[str, Any]:
        """The moving average of λ_t."""
        return {"flatness_weight": self._smoothed}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the saved average."""
        self._smoothed = state["flatness_weight"]

    def _flatness_weight(self, flatness: ParameterVector, gradient: ParameterVector) -> float:
        """λ_t by the rule in force."""
        product, size = dot(flatness, gradient), max(norm(flatness), TINY)
        if self.args.flatness_rule == "kkt":
            return float(max(0.0, self.args.strength - product / size**2))
        weight = max(0.0, self.args.strength - product / (size * max(norm(gradient), TINY)))
        before = weight if self._smoothed is None else self._smoothed
        self._smoothed = SMOOTHING * before + (1 - SMOOTHING) * weight
        return self._smoothed
