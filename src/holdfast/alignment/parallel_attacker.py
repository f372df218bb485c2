"""An attacker of Patcher's parallel form; the defender and the algorithm: `holdfast.alignment.parallel`."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from holdfast.alignment.parallel import ParallelPatcherConfig
from holdfast.attacks.simulated import hardly_moved
from holdfast.errors import InputError, Stopped, TrainingError
from holdfast.exchange import DEFENDER, Exchange, Version, fingerprint_of, opened_with
from holdfast.models import adapts_tied_embeddings, below_adapter
from holdfast.parameters import ParameterVector, local, share_moved, trainable_parameters
from holdfast.precision import keep_in_float32
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often an attacker looks for a newer version."""


class PatcherAttackerTrainer(DefenseTrainer):
    """An attacker of a parallel run: attacks the newest weights of the defender, publishes where that led, and again.

    Its steps are those of `holdfast.attacks.simulated`: torch's AdamW with its own defaults, afresh for every attack,
    at a constant rate, the gradient clipped to 1.0. It keeps no checkpoint: restarted, it begins with the newest
    weights. An attack whose loss is not finite is not published.

    With a LoRA adapter on a model whose defender trains it in full, every attack starts from a fresh adapter and the
    merged weights are published. With each goes the share of its weights that the attack moved; to tell it, a copy of
    those it began with lies in host memory.

    Args:
        model: As for `DefenseTrainer`; the model that the defender started from, whose weights are not used.
        args: The configuration; its `attack_…` settings are the attacker's own.
        train_dataset: Harmful prompts with harmful answers.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        attacks: How many attacks were published.
    """

    _tag_names = ["holdfast", "patcher"]
    _name = "Patcher's attacker"
    config_class = ParallelPatcherConfig
    asks_variously = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ParallelPatcherConfig | None = None,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.configured(args)
        if args.exchange is None:
            raise InputError("--role attacker needs --exchange, the folder in which defender and attackers meet")
        super().__init__(model, _as_attacker(args), train_dataset, data_names={"train": "attack"}, **kwargs)
        self.attacks = 0
        self._exchange: Exchange | None = None
        self._attacked: Version | None = None
        self._losses: list[float] = []
        self._origin = ParameterVector()
        self._merges = False
        self.add_callback(_Rounds(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Attack until the defender's run is finished.

        Raises:
            InputError: The exchange is not that of a defender with this model, tokenizer and trained parameters.
            Stopped: The job was asked to stop; an attack that it was in is lost.
            TrainingError: Nothing new came for `exchange_timeout` seconds, or the exchange is gone.
        """
        folder = self.args.exchange
        self._wait_until(lambda: Exchange.is_open(folder), f"no defender has opened the exchange {folder}")
        fingerprint = fingerprint_of(self.model, self.processing_class)
        if isinstance(self.model, PeftModel) and opened_with(folder) != fingerprint:
            fingerprint = fingerprint_of(self.model, self.processing_class, below_adapter(self.model))
            self._merges = True
            if adapts_tied_embeddings(self.model):
                raise InputError(
                    "--lora_target_modules: an adapter of tied embeddings cannot be merged into weights that stay "
                    "tied; leave the embeddings out"
                )
            keep_in_float32(self.model, frozen=True)  # half precision would round what the defender published
        with Exchange(folder, origin=self.args.attacker_name, run=None, fingerprint=fingerprint) as self._exchange:
            try:
                return super().train(*args, **kwargs)
            except _NothingToAttackError:
                return TrainOutput(0, 0.0, {})

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; H): the attacker's own."""
        loss, gradient = self.loss_and_gradient(model, window, router_loss=False)
        self._losses.append(self.accelerator.gather(loss.reshape(1)).mean().item())
        return loss, gradient

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All of them, as with torch's AdamW; transformers spares norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def begin_round(self) -> bool:
        """Take up the newest weights of the defender, and a fresh optimizer; False when there will be none."""
        assert self._exchange is not None
        exchange = self._exchange
        found: list[tuple[Version, ParameterVector]] = []

        def is_over() -> bool:
            if exchange.is_finished():
                return True
            version = exchange.newest(DEFENDER, after=self._attacked.number if self._attacked else 0)
            weights = None if version is None else exchange.load(version, self._exchanged())
            if version is not None and weights is not None:
                found.append((version, weights))
            return bool(found)

        self._wait_until(is_over, f"the defender has published nothing new in {self.args.exchange}")
        if not found:
            return False
        [(self._attacked, weights)] = found
        with torch.no_grad():
            for name, parameter in self._exchanged().items():
                local(parameter).copy_(local(weights[name]))
        self._origin = ParameterVector({name: local(tensor).cpu() for name, tensor in weights.items()})
        if self._merges:
            _reset_adapter(self.model)
        self.optimizer.state.clear()
        self._losses = []
        return True

    def end_round(self) -> None:
        """Publish where the attack led."""
        assert self._exchange is not None
        assert self._attacked is not None
        first, last = self._losses[0], self._losses[-1]
        if not all(math.isfinite(loss) for loss in self._losses):
            logger.warning("an attack is discarded: its loss went from %s to %s", first, last)
            return
        if self._merges:
            self.model.merge_adapter()
        moved = share_moved(self._exchanged(), self._origin)
        facts = {"first_loss": first, "last_loss": last, "weights_moved": moved}
        facts["lineage"] = self._attacked.facts["lineage"]
        self._exchange.publish(self._exchanged(), step=self._attacked.step, facts=facts)
        if self._merges:
            self.model.unmerge_adapter()  # by rounding not the weights that it was; the next attack loads its own
        self.attacks += 1
        logger.info(
            "attack %d, on the weights of step %d: loss %.4g to %.4g in %d steps, %.1f%% of the weights moved",
            self.attacks,
            self._attacked.step,
            first,
            last,
            len(self._losses),
            100 * moved,
        )
        if few := hardly_moved(moved):
            logger.warning("attack %d %s", self.attacks, few)

    def _exchanged(self) -> dict[str, Tensor]:
        """The parameters that are loaded and published: those that are trained, or those below an adapter to merge."""
        return dict(below_adapter(self.model) if self._merges else trainable_parameters(self.model))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """An attack gone wrong ends with its round, not with the job: its gradient is left out."""
        try:
            return super()._get_grad_norm(model, grad_norm)
        except TrainingError:
            self._losses.append(math.nan)
            self.model.zero_grad()
            return 0.0

    def _stop(self) -> NoReturn:
        """Leave the training loop, without the checkpoint that other runs go on from."""
        raise Stopped(
            f"asked to stop after {self.attacks} attacks; started again, this attacker begins with the newest weights",
            None,
        )

    def _wait_until(self, is_over: Callable[[], bool], complaint: str) -> None:
        """Wait until it is over on every rank; rank 0's clock decides for how long."""
        started = time.monotonic()
        while True:
            here = torch.tensor([[float(is_over()), time.monotonic() - started]], device=self.args.device)
            over, waited = self.accelerator.gather(here).double().unbind(1)
            if over.all():
                return
            if self._is_asked_to_stop():
                self._stop()
            if waited[0].item() > self.args.exchange_timeout:
                raise TrainingError(f"{complaint} for {self.args.exchange_timeout:g} seconds (--exchange_timeout)")
            time.sleep(POLL_SECONDS)


class _NothingToAttackError(Exception):
    """The defender's run was over before the first attack."""


class _Rounds(TrainerCallback):
    """Begins and ends attacks between the updates of the training loop."""

    def __init__(self, trainer: PatcherAttackerTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: ParallelPatcherConfig, state: Any, control: TrainerControl, **_: Any) -> None:
        """Begin the first attack."""
        if not self._trainer.begin_round():
            raise _NothingToAttackError  # here the loop cannot be told to stop

    def on_step_end(self, args: ParallelPatcherConfig, state: Any, control: TrainerControl, **_: Any) -> None:
        """End an attack that is long enough, and begin the next."""
        if state.global_step % args.attack_steps == 0:
            self._trainer.end_round()
            control.should_training_stop = not self._trainer.begin_round()


def _as_attacker(args: ParallelPatcherConfig) -> ParallelPatcherConfig:
    """The training settings of an attacker's job: its own rate and batch, torch's AdamW, and no end of its own."""
    settings: dict[str, Any] = {
        "learning_rate": args.attack_learning_rate or args.learning_rate,
        "weight_decay": args.attack_weight_decay,
        "per_device_train_batch_size": args.attack_batch_size or args.per_device_train_batch_size,
        "gradient_accumulation_steps": 1 if args.attack_batch_size else args.gradient_accumulation_steps,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "max_steps": sys.maxsize,
        "num_train_epochs": None,
        "bf16": False if args.bf16_was_ruled_out else args.bf16 or None,
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    return replace(args, **settings)


def _reset_adapter(model: PeftModel) -> None:
    """Make a LoRA adapter the one it was before training: another random A, and B = 0."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.reset_lora_parameters(name, init_lora_weights=True)
