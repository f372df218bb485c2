r"""Patcher in its parallel form: defender and attackers are jobs of their own, which meet in a folder.

Patcher (2606.07970), its parallel run. The formulas are those of `holdfast.alignment.patcher`; attacks do not hold the
defender up, but are made by other jobs, on other devices or machines, on weights that are somewhat older:

    defender, every `publish_every` updates:   publish θ                         (at once, too: attackers start with it)
    attacker, again and again:                 θ ← the newest published θ, newer than the last it attacked
                                               θ_att ← θ after `attack_steps` AdamW steps on D_attack; publish θ_att
    defender, every `attack_every` updates:    look for a newer θ_att;  δ ← θ_att − θ         (θ is today's)
    defender, every update:                    (1 − α) · g(θ; B) + α · g(θ + δ; B)

The defender never waits: until the first θ_att is there its updates are plain SFT, and where none is newer the δ in
force stays. With several attackers it takes the newest of each in turn. The *staleness* of a δ is how many updates θ is
ahead of the one that was attacked. The paper publishes and looks every 1000 updates, and attacks for 500 steps.

Differs from the authors' released code, which keeps δ on the CPU and copies it at every step: it stays on the device.

Example:
    Two processes, with the same data::

        config = ParallelPatcherConfig(output_dir="hardened", role="defender", exchange="/shared/run1")
        PatcherDefenderTrainer(model, config, alignment, harmful).train()

        config = ParallelPatcherConfig(output_dir="attacker", role="attacker", exchange="/shared/run1")
        PatcherAttackerTrainer(model, config, harmful).train()            # ends with the defender
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from holdfast.alignment.patcher import PatcherConfig, PatcherTrainer
from holdfast.config import require_positive
from holdfast.errors import InputError, TrainingError
from holdfast.exchange import Exchange, fingerprint_of
from holdfast.parameters import ParameterVector, norm, restore, trainable_parameters
from holdfast.trainer import DefenseTrainer, Window

logger = logging.getLogger(__name__)

DEFENDER = "defender"
"""The defender's name in an exchange; every other name is an attacker's."""
POLL_SECONDS = 0.5
"""How often an attacker looks for a newer version."""


@dataclass
class ParallelPatcherConfig(PatcherConfig):
    """Configuration of both jobs; what concerns only the other one is ignored, so that both can be given the same.

    Args:
        role: "defender" or "attacker"; without one, Patcher runs in its sequential form.
        exchange: The folder in which the jobs meet: on a file system that all of them see, or in memory.
        publish_every: Updates of the defender between publications of its weights; by default `attack_every`.
        attacker_name: An attacker's name in the exchange, different for each: letters, digits, ".", "_", "-".
        exchange_timeout: Seconds after which an attacker that sees nothing new gives up.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    role: str | None = field(
        default=None,
        metadata={"help": "Run one half of Patcher's parallel form in this job.", "choices": ["defender", "attacker"]},
    )
    exchange: str | None = field(
        default=None, metadata={"help": "Folder in which the jobs of a parallel run meet, seen by all of them."}
    )
    publish_every: int | None = field(
        default=None, metadata={"help": "Updates between publications of the weights; by default --attack_every."}
    )
    attacker_name: str = field(default="attacker", metadata={"help": "This attacker's name, different for each."})
    exchange_timeout: float = field(
        default=3600.0, metadata={"help": "Seconds after which an attacker that sees nothing new gives up."}
    )

    def __post_init__(self) -> None:
        """Check the ranges, and that a role has its exchange."""
        super().__post_init__()
        if self.role not in (None, "defender", "attacker"):
            raise InputError(f"--role must be defender or attacker, got {self.role}")
        if self.role and not self.exchange:
            raise InputError(f"--role {self.role} needs --exchange, the folder in which defender and attackers meet")
        if self.attacker_name == DEFENDER:
            raise InputError(f"--attacker_name {DEFENDER} cannot be used: it is the defender's")
        require_positive(self, "publish_every", "exchange_timeout")


class PatcherDefenderTrainer(PatcherTrainer):
    """The defender of a parallel run. Used as `PatcherTrainer` is, with `exchange` in its configuration.

    Each vector that comes in force is logged as `attack_vector_norm` and `attack_staleness` (updates) and noted, with
    its origin, in `vectors`. Beyond SFT it holds two buffers of the trained parameters' size, as `PatcherTrainer` while
    defending; while a version is loaded a third one, before any gradient is there.

    Attributes:
        vectors: One entry for every vector that came in force: `step`, `origin`, `version`, `attacked_step`,
            `staleness`, `norm` and the attacker's own `first_loss` and `last_loss`.
    """

    config_class = ParallelPatcherConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ParallelPatcherConfig | None = None,
        train_dataset: Dataset | None = None,
        attack_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, attack_dataset, **kwargs)
        self.vectors: list[dict[str, Any]] = []
        self._used: dict[str, int] = {}
        self._exchange: Exchange | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as `DefenseTrainer` does, with the exchange open. When the run is finished, the attackers are told.

        Raises:
            InputError: The exchange belongs to another run or another model, or cannot be written.
        """
        with Exchange(
            self.args.exchange,
            origin=DEFENDER,
            run=str(Path(self.args.output_dir).resolve()),
            fingerprint=fingerprint_of(self.model, self.processing_class),
        ) as self._exchange:
            output = super().train(resume_from_checkpoint, **kwargs)
            if self.state.global_step >= self.state.max_steps:
                self._exchange.finish()
        return output

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """Publish and look where it is time to, then Patcher's gradient."""
        step = self.state.global_step
        if self._exchange is not None:
            if step % (self.args.publish_every or self.args.attack_every) == 0:
                self._exchange.publish(trainable_parameters(self.model), step=step)
            if step > 0 and step % self.args.attack_every == 0:
                self._take_newest(self._exchange)
        return super().defended_gradient(model, window)

    def method_state(self) -> dict[str, Any]:
        """The vector in force, where vectors came from, and which versions were used."""
        return {**super().method_state(), "vectors": self.vectors, "used_versions": self._used}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the vector that was in force."""
        super().load_method_state(state)
        self.vectors, self._used = state["vectors"], state["used_versions"]

    def _attack_is_due(self) -> bool:
        return False  # others attack

    def _take_newest(self, exchange: Exchange) -> None:
        """Put the newest vector of the attacker whose turn it is in force; of the next one where it has none."""
        names = exchange.origins()
        last = self.vectors[-1]["origin"] if self.vectors else ""
        turn = sum(name <= last for name in names)  # the first name after the last one used
        parameters = trainable_parameters(self.model)
        for name in names[turn:] + names[:turn]:
            version = exchange.newest(name, after=self._used.get(name, 0))
            vector = None if version is None else exchange.load(version, parameters)
            if version is None or vector is None:
                continue
            vector -= ParameterVector(parameters)
            length = norm(vector)
            self._used[name] = version.number
            if not math.isfinite(length):
                logger.warning("version %d of %s is not used: its weights are not finite", version.number, name)
                continue
            self._attack_vector = vector
            staleness = self.state.global_step - version.step
            self.vectors.append(
                {
                    "step": self.state.global_step,
                    "origin": name,
                    "version": version.number,
                    "attacked_step": version.step,
                    "staleness": staleness,
                    "norm": length,
                    **version.facts,
                }
            )
            self.log_metric("attack_vector_norm", length)
            self.log_metric("attack_staleness", staleness)
            return


class PatcherAttackerTrainer(DefenseTrainer):
    """An attacker of a parallel run: attacks the newest weights of the defender, publishes where that led, and again.

    Its steps are those of `holdfast.attacks.simulated`: torch's AdamW with its own defaults, afresh for every attack, at
    a constant rate, the gradient clipped to 1.0. It keeps no checkpoint: restarted, it begins with the newest weights.
    An attack whose loss is not finite is not published.

    With a LoRA adapter on a model whose defender trains it in full, every attack starts from a fresh adapter and the
    merged weights are published.

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

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ParallelPatcherConfig | None = None,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, None if args is None else _as_attacker(args), train_dataset, **kwargs)
        self.attacks = 0
        self._exchange: Exchange | None = None
        self._attacked_step = 0
        self._last_attacked = 0
        self._losses: list[float] = []
        self.add_callback(_Rounds(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Attack until the defender's run is finished.

        Raises:
            InputError: The exchange is not that of a defender with this model, tokenizer and trained parameters.
            TrainingError: Nothing new came for `exchange_timeout` seconds, or the exchange is gone.
        """
        exchange = self.args.exchange
        self._wait_until(lambda: Exchange.is_open(exchange), f"no defender has opened the exchange {exchange}")
        with Exchange(
            exchange,
            origin=self.args.attacker_name,
            run=None,
            fingerprint=fingerprint_of(self.model, self.processing_class),
        ) as self._exchange:
            return super().train(*args, **kwargs)

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """g(θ; H): the attacker's own."""
        loss, gradient = self.loss_and_gradient(model, window)
        self._losses.append(self.accelerator.gather(loss.reshape(1)).mean().item())
        return loss, gradient

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All of them, as with torch's AdamW; transformers spares norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def begin_round(self) -> bool:
        """Take up the newest weights of the defender, and a fresh optimizer; False when there will be none."""
        assert self._exchange is not None
        exchange = self._exchange
        loaded: ParameterVector | None = None

        def newer() -> bool:
            nonlocal loaded
            version = exchange.newest(DEFENDER, after=self._last_attacked)
            if version is not None:
                loaded = exchange.load(version, trainable_parameters(self.model))
            if version is not None and loaded is not None:
                self._last_attacked, self._attacked_step = version.number, version.step
            return loaded is not None or exchange.finished

        self._wait_until(newer, f"the defender has published nothing new in {self.args.exchange}")
        if loaded is None:
            return False
        restore(self.model, loaded)
        self.optimizer.state.clear()
        self._losses = []
        return True

    def end_round(self) -> None:
        """Publish where the attack led."""
        assert self._exchange is not None
        first, last = self._losses[0], self._losses[-1]
        if not all(math.isfinite(loss) for loss in self._losses):
            logger.warning("an attack is discarded: its loss went from %s to %s", first, last)
            return
        facts = {"first_loss": first, "last_loss": last, "attack_steps": len(self._losses)}
        self._exchange.publish(trainable_parameters(self.model), step=self._attacked_step, facts=facts)
        self.attacks += 1

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """An attack gone wrong ends with its round, not with the job: its gradient is left out."""
        try:
            return super()._get_grad_norm(model, grad_norm)
        except TrainingError:
            self._losses.append(math.nan)
            self.model.zero_grad()
            return 0.0

    def _wait_until(self, condition: Any, complaint: str) -> None:
        """Wait; on all ranks alike, since what the condition asks is."""
        started = time.monotonic()
        while not condition():
            # Rank 0's clock decides for all.
            waited = torch.tensor([time.monotonic() - started], device=self.args.device)
            if self.accelerator.gather(waited)[0].item() > self.args.exchange_timeout:
                raise TrainingError(f"{complaint} for {self.args.exchange_timeout:g} seconds (--exchange_timeout)")
            time.sleep(POLL_SECONDS)


class _Rounds(TrainerCallback):
    """Begins and ends attacks between the updates of the training loop."""

    def __init__(self, trainer: PatcherAttackerTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: ParallelPatcherConfig, state: Any, control: TrainerControl, **_: Any) -> None:
        """Begin the first attack."""
        self._trainer.begin_round()

    def on_step_end(self, args: ParallelPatcherConfig, state: Any, control: TrainerControl, **_: Any) -> None:
        """End an attack that is long enough, and begin the next."""
        if state.global_step % args.attack_steps == 0:
            self._trainer.end_round()
            control.should_training_stop = not self._trainer.begin_round()


def _as_attacker(args: ParallelPatcherConfig) -> ParallelPatcherConfig:
    """The training settings of an attacker's job: its own rate and batch, torch's AdamW, and no end of its own."""
    return replace(
        args,
        learning_rate=args.attack_learning_rate or args.learning_rate,
        weight_decay=args.attack_weight_decay,
        per_device_train_batch_size=args.attack_batch_size or args.per_device_train_batch_size,
        gradient_accumulation_steps=1 if args.attack_batch_size else args.gradient_accumulation_steps,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        max_steps=sys.maxsize,
        save_strategy="no",
        eval_strategy="no",
    )
