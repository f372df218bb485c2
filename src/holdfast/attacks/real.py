"""A real fine-tuning attack on a finished model, measured along the way.

The adversary holds the weights and harmful data (pure, or mixed into benign data at a poison ratio) and fine-tunes all
parameters, or a LoRA adapter, as anyone would: with TRL, any of its optimizers, schedules and precisions. The attack
takes the steps of the simulated one (`holdfast.attacks.simulated`): same loss, same gradient, same clipping, but for$
the auxiliary loss of a Mixture-of-Experts model, which training keeps and simulated attacks leave out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import OptimizerNames

from holdfast.attacks.simulated import hardly_moved
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import Evaluation
from holdfast.models import load_model, load_tokenizer, merge
from holdfast.parameters import ParameterVector, share_moved, snapshot_on_host, trainable_parameters
from holdfast.precision import compute_in_bf16, keep_in_float32
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

logger = logging.getLogger(__name__)

Evaluate = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Evaluation]


@dataclass
class AttackConfig(DefenseConfig):
    """Configuration of a real attack; the defaults are Patcher's test-time attack (2606.07970) but for its data.

    Args:
        max_steps: Length of the attack; by default 2000, unless `num_train_epochs` is given.
        measure_at: Steps after which to evaluate, 0 being the model as it was; by default 0 and the last.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The attacker's learning rate."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Length of the attack in steps (default: 2000, without --num_train_epochs)."}
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"aliases": ["--batch_size"], "help": "Rows per device and attacker step."}
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "aliases": ["--optimizer"],
            "choices": [name.value for name in OptimizerNames],
            "help": "The attacker's optimizer, by transformers' name.",
        },
    )
    lr_scheduler_type: str = field(
        default="constant",
        metadata={
            "aliases": ["--scheduler"],
            "choices": [name.value for name in SchedulerType],
            "help": "The attacker's learning rate schedule.",
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "The attacker's weight decay."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints of the attack."})
    measure_at: list[int] = field(
        default_factory=list,
        metadata={"help": "Steps after which to evaluate, 0 being the model as it was (default: 0 and the last)."},
    )

    def __post_init__(self) -> None:
        """Choose the length and the steps to measure at."""
        if self.max_steps is None:
            self.max_steps = 2000 if self.num_train_epochs in (None, -1) else -1
        super().__post_init__()
        if self.max_steps != -1:
            self.measure_within(self.max_steps)

    def measure_within(self, steps: int) -> None:
        """Settle the steps to measure at, in an attack of this length: it follows from the data where epochs are given.

        Raises:
            InputError: One lies outside of it.
        """
        self.measure_at = sorted(set(self.measure_at)) or [0, steps]
        if self.measure_at[0] < 0 or self.measure_at[-1] > steps:
            raise InputError(f"--measure_at must lie between 0 and the last of {steps} steps, got {self.measure_at}")


class AttackTrainer(DefenseTrainer):
    """Attack a model by fine-tuning it, and measure it at chosen steps.

    The measurements leave the run as it was: the attacked weights equal those of a run that was not measured. They are
    made in the precision that the attack computes in. An adapter is merged into its base first, as an adversary may do,
    unless it is to be attacked alone. The model on disk is never written to.

    Args:
        model: A model, a folder, an adapter folder or a Hub id.
        args: The configuration.
        train_dataset: What the adversary trains on; see `holdfast.data.mix.poison`.
        processing_class: The tokenizer; by default the model's own.
        evaluator: Called with model and tokenizer at every step of `args.measure_at`.
        asked: Called after it in the same way, and asks harmful prompts as an adversary would; see
            `Evaluator.asking_otherwise`. Thus a few steps and then a prefill, at every one of these steps.
        measured: Called with every measurement and its evaluation as they come, on the first rank alone.
        adapter_alone: Train an adapter's own weights, and leave its base frozen.
        **kwargs: As for `DefenseTrainer`; `peft_config` is a LoRA attack's adapter, without one all parameters are
            attacked.

    Attributes:
        measurements: One dictionary per measured step: `steps`, `asked_by` ("anyone"), `attacker_loss` (of that step's
            batch, before its update; None at step 0), `weights_moved` (share of the trained weights) and the figures of
            `Evaluation.flat`. Where there is `asked`, another one follows that has its figures in the place of those
            that it measures, asked by the "adversary".
        evaluations: The evaluations behind those that anyone asked, by step.
        weights_moved: The share of the trained weights that differ from what they were before the attack, once it is
            over. Until then a copy of those lies in host memory.
        weights_moved_in_bf16: The same, of the weights as passes in bf16 see them; None if passes are in float32. Where
            it is small, the attack has moved the weights by less than its own passes see, and is weaker than the same
            attack in float32.
    """

    _tag_names = ["holdfast", "attacked"]
    _name = "Attack"
    config_class = AttackConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AttackConfig | None = None,
        train_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        evaluator: Evaluate | None = None,
        asked: Evaluate | None = None,
        measured: Callable[[dict[str, Any], Evaluation], None] | None = None,
        adapter_alone: bool = False,
        **kwargs: Any,
    ) -> None:
        args = self.configured(args)
        if isinstance(model, str):
            if processing_class is None:
                processing_class = load_tokenizer(model, revision=(args.model_init_kwargs or {}).get("revision"))
            model = load_model(model, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        if isinstance(model, PeftModel):
            compute_in_bf16(model, args)
            if not adapter_alone:
                keep_in_float32(model, frozen=True)  # a half precision base would take the adapter up rounded
                model = merge(model).requires_grad_(True)
        super().__init__(model, args, train_dataset, processing_class, **kwargs)
        if args.max_steps == -1:
            with torch.random.fork_rng([]):  # a loader draws its seed
                *_, steps = self.set_initial_training_values(args, self.get_train_dataloader())
            args.measure_within(steps)
        self.measurements: list[dict[str, Any]] = []
        self._measured = measured
        self.evaluations: dict[int, Evaluation] = {}
        self.weights_moved: float | None = None
        self.weights_moved_in_bf16: float | None = None
        self._origin = ParameterVector()
        self._last_loss: Tensor | None = None
        self.add_callback(_Measure(self, evaluator, asked))

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; B): the attacker's own."""
        self._last_loss, gradient = self.loss_and_gradient(model, window)
        return self._last_loss, gradient

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All of them, as with torch's AdamW and the simulated attacker; transformers spares norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def begin(self) -> None:
        """Remember the weights as they are, to tell later what share of them was moved."""
        self._origin = snapshot_on_host(self.model)

    def end(self) -> None:
        """Note the share of the weights that the attack has moved, and warn of a small one."""
        self.weights_moved = self._share_moved()
        if self.args.bf16:
            self.weights_moved_in_bf16 = self._share_moved(seen_in=torch.bfloat16)
        self._origin = ParameterVector()
        if few := hardly_moved(self.weights_moved):
            logger.warning("the attack %s", few)

    def measure(self, evaluator: Evaluate, asked: Evaluate | None = None) -> None:
        """Evaluate the model as it stands, also as an adversary asks it, and note what came out."""
        with self.accelerator.autocast():  # an adapter in float32 may stand on a base in bf16
            evaluation = evaluator(self.model, self.processing_class)
        loss = None if self._last_loss is None else self.accelerator.gather(self._last_loss.reshape(1)).mean().item()
        steps = self.state.global_step
        self.evaluations[steps] = evaluation
        told = {"steps": steps, "asked_by": "anyone", "attacker_loss": loss, "weights_moved": self._share_moved()}
        self._note(told, evaluation)
        if asked is not None:
            with self.accelerator.autocast():
                otherwise = evaluation.with_sets_of(asked(self.model, self.processing_class))
            self._note({**told, "asked_by": "adversary"}, otherwise)

    def _note(self, told: dict[str, Any], evaluation: Evaluation) -> None:
        point = {**told, **evaluation.flat()}
        if self._measured is not None and self.is_world_process_zero():
            self._measured(point, evaluation)
        self.measurements.append(point)

    def _share_moved(self, seen_in: torch.dtype | None = None) -> float:
        return share_moved(trainable_parameters(self.model), self._origin, seen_in=seen_in)


class _Measure(TrainerCallback):
    def __init__(self, trainer: AttackTrainer, evaluator: Evaluate | None, asked: Evaluate | None) -> None:
        self.trainer = trainer
        self.evaluator = evaluator
        self.asked = asked

    def on_train_begin(self, args: AttackConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin()
        self.on_step_end(args, state, control)

    def on_step_end(self, args: AttackConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.evaluator is not None and state.global_step in args.measure_at:
            self.trainer.measure(self.evaluator, self.asked)

    def on_train_end(self, args: AttackConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end()
