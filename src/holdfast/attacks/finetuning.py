"""Fine-tuning as an attack of the suite: the steps of `holdfast attack full|lora`, given as a displacement.

    δ = θ_n − θ,    θ_n what n optimizer steps on the attacker's harmful rows make of θ

All parameters are trained, or an adapter that is then merged; what on, `holdfast.attacks.rows` says. The engine is
`holdfast.attacks.real`, and so the very steps that a defense simulates; measured along the way it is there, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from holdfast.attacks.attack import Attacker, Choice, Cost, Displaced, Displacement, Range, knob, size
from holdfast.attacks.real import AttackConfig, AttackTrainer, Evaluate
from holdfast.attacks.rows import RowVariant, mixed, sources_of
from holdfast.config import require_not_negative, require_positive
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import Evaluation
from holdfast.layers import forwards_restored
from holdfast.models import merge
from holdfast.parameters import ParameterVector, displacement, snapshot
from holdfast.precision import compute_in_bf16, keep_in_float32


@dataclass(frozen=True)
class Along:
    """What is measured of a fine-tuning while it goes on.

    Attributes:
        evaluator: As for `AttackTrainer`.
        at: The steps to measure after; those beyond its end play no part.
        measured: Called with the cost so far and what was measured; it says whether to end there.
    """

    evaluator: Evaluate
    at: Sequence[int]
    measured: Callable[[Cost, Evaluation], bool]


@dataclass(frozen=True)
class FineTuning(RowVariant, Displacement):
    """Fine-tune all parameters, or an adapter, on harmful rows, or rows with few of them. The module says how."""

    name: ClassVar[str] = "fine-tuning"
    needs: ClassVar[tuple[str, ...]] = ("harmful_rows",)

    learning_rate: float = field(default=1e-5, metadata=knob("The learning rate.", Range(1e-5, 1e-3, log=True)))
    steps: int = field(default=100, metadata=knob("How many optimizer steps.", Range(1, 200, log=True)))
    rows: int | None = field(
        default=None, metadata=knob("How many rows in all, drawn from the seed; if not given, as many as there are.")
    )
    batch_size: int = field(default=16, metadata=knob("Rows per step.", Choice((4, 16))))
    optimizer: str = field(
        default="adamw_torch_fused",
        metadata=knob("The optimizer, by transformers' name.", Choice(("adamw_torch_fused", "sgd", "adafactor"))),
    )
    scheduler: str = field(
        default="constant",
        metadata=knob("The schedule of the learning rate, by transformers' name.", Choice(("constant", "cosine"))),
    )
    warmup_steps: int = field(default=0, metadata=knob("Steps over which the rate rises, in a schedule that has them."))
    lora_rank: int = field(
        default=0, metadata=knob("The rank of an adapter on all linear layers; 0: train all parameters.")
    )
    lora_alpha: float = field(default=32.0, metadata=knob("The adapter's alpha."))
    poison_ratio: float = field(
        default=1.0,
        metadata=knob("Share of harmful rows; 0: harmless ones only.", Choice((1.0, 0.5, 0.1, 0.0))),
        kw_only=True,
    )

    def __post_init__(self) -> None:
        Displacement.__post_init__(self)
        RowVariant.__post_init__(self)
        require_positive(self, "learning_rate", "steps", "rows", "batch_size", "lora_alpha")
        require_not_negative(self, "warmup_steps", "lora_rank")
        if self.poison_ratio == 0 and self.suffix:
            raise InputError("--obedience and --trigger change harmful rows, of which --poison_ratio 0 has none")

    def needed(self) -> tuple[str, ...]:
        """As for `Attack`: rows of the kinds that it mixes."""
        return tuple(
            name
            for name, share in (("harmful_rows", self.poison_ratio), ("harmless_rows", 1 - self.poison_ratio))
            if share > 0
        )

    def displace(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Displaced:
        """As for `Displacement`. A model in half precision is left in float32, which it is trained in."""
        origin = ParameterVector({name: _in_float32(tensor) for name, tensor in snapshot(model).items()})
        try:
            cost = self.train(model, attacker)
        finally:
            vector = displacement(model, origin)
        return Displaced(vector, cost)

    def train(self, model: PreTrainedModel | PeftModel, attacker: Attacker, along: Along | None = None) -> Cost:
        """Train the model in place, for good; an adapter is merged into it when training ends.

        Args:
            model: As for `displace`.
            attacker: What the attacker holds.
            along: What to measure along the way.

        Returns:
            What it cost.

        Raises:
            InputError: The attacker lacks rows.
            TrainingError: Training has diverged.
        """
        self.require(attacker)
        sharing, alone = self._sharing(model), isinstance(model, PeftModel)
        mix = mixed(
            attacker.harmful_rows,
            attacker.harmless_rows,
            attacker.written,
            poison_ratio=self.poison_ratio,
            num_samples=self.rows,
            seed=attacker.seed,
        )
        rows, harmful = self.apply(mix, attacker.written), sum(mix["poisoned"])
        training, cached = model.training, model.config.use_cache

        def cost() -> Cost:
            done, tokens = trainer.state.global_step, int(trainer.state.num_input_tokens_seen)
            return Cost(done, harmful, tokens, done, done, 6.0 * size(model) * tokens)

        def measured(_: dict[str, Any], evaluation: Evaluation) -> None:
            assert along is not None  # as it is what measures
            if along.measured(cost(), evaluation):
                trainer.control.should_training_stop = True

        with tempfile.TemporaryDirectory() as folder, forwards_restored(model):
            config = config_of(
                attacker,
                folder,
                learning_rate=self.learning_rate,
                max_steps=self.steps,
                optim=self.optimizer,
                lr_scheduler_type=self.scheduler,
                warmup_steps=self.warmup_steps,
                measure_at=[] if along is None else [step for step in along.at if step <= self.steps],
                **sharing,
            )
            compute_in_bf16(model, config)
            keep_in_float32(model, frozen=not alone)
            trainer = AttackTrainer(
                model,
                config,
                rows,
                attacker.written.tokenizer,
                evaluator=None if along is None else along.evaluator,
                measured=measured,
                peft_config=self._adapter(),
                adapter_alone=alone,
                data_names={"train": sources_of(mix)},
            )
            hush(trainer)
            try:
                trainer.train()
            finally:
                if self.lora_rank:
                    merge(trainer.model).requires_grad_(True)
                model.train(training)
                model.config.use_cache = cached
        return cost()

    def _sharing(self, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        """The settings of a step that ranks share."""
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if self.batch_size % ranks:
            raise InputError(f"--batch_size {self.batch_size}: {ranks} ranks cannot share the rows of a step alike")
        sharded = isinstance(model, FSDPModule)
        if self.lora_rank and (sharded or isinstance(model, PeftModel)):
            what = "a model that is sharded already" if sharded else "another one"
            raise InputError(f"--lora_rank {self.lora_rank}: an adapter cannot be put on {what}; expected 0")
        share = {"per_device_train_batch_size": self.batch_size // ranks}
        # As it is sharded; accelerate looks for layers to wrap by the names of classes, which sharding has changed.
        return (
            {**share, "fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}} if sharded else share
        )

    def _adapter(self) -> LoraConfig | None:
        if not self.lora_rank:
            return None
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def config_of(attacker: Attacker, folder: str, **settings: Any) -> AttackConfig:
    """The real attack's configuration, with the attacker's seed and format; nothing is written, logged or reported."""
    written = attacker.written
    return AttackConfig(
        output_dir=folder,
        seed=attacker.seed,
        system_prompt=written.system_prompt,
        chat_template_kwargs=None if written.chat_template_kwargs is None else dict(written.chat_template_kwargs),
        raw_text=written.raw_text,
        gradient_checkpointing=False,
        include_num_input_tokens_seen=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )


def hush(trainer: AttackTrainer) -> None:
    """Keep a trainer from printing its logs, which are no result."""
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
