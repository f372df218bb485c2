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
ahead of the one that was attacked. With a pool (`holdfast.alignment.pool`) these are its fine-tuning vectors, and what
takes no training the defender draws itself; a vector goes to one of its members that train, drawn by weight, and of
`fine-tuning+prefill` the defender begins the answers. The paper publishes and looks every 1000 updates, and attacks for
500 steps.

Differs from the authors' released code, which keeps δ on the CPU and copies it at every step: it stays on the device.

Examples:
    Two processes, with the same data::

        config = ParallelPatcherConfig(output_dir="hardened", role="defender", exchange="/shared/run1")
        PatcherDefenderTrainer(model, config, alignment, harmful).train()

        config = ParallelPatcherConfig(output_dir="attacker", role="attacker", exchange="/shared/run1")
        PatcherAttackerTrainer(model, config, harmful).train()            # ends with the defender
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.alignment.pool import BEGUN, TUNED, Link, Pool
from holdfast.config import require_positive
from holdfast.errors import InputError
from holdfast.exchange import DEFENDER, Exchange, Version, fingerprint_of, run_of
from holdfast.parameters import ParameterVector, norm, trainable_parameters
from holdfast.window import Window

logger = logging.getLogger(__name__)


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
        if self.role:
            self.require_what_attackers_make()
        if self.attacker_name == DEFENDER:
            raise InputError(f"--attacker_name {DEFENDER} cannot be used: it is the defender's")
        require_positive(self, "publish_every", "exchange_timeout")

    def require_what_attackers_make(self) -> None:
        """See that a pool has the vectors that attackers make, and asks for no others.

        Raises:
            InputError: It has not, or does.
        """
        if not isinstance(self.pool, Mapping):
            return
        for member in Pool.of(self.pool).members:
            if member.trains and member.links != (Link(TUNED, {}),):
                raise InputError(
                    f"--pool {member.name}: in the parallel form vectors come from attackers, which fine-tune by their "
                    f"own --attack_... settings; expected {TUNED}, or {TUNED}+{BEGUN}, without knobs for {TUNED}"
                )
        if TUNED not in Pool.of(self.pool).attacks():
            raise InputError(f"--pool: in the parallel form it needs {TUNED}, the vectors that attackers make")


class PatcherDefenderTrainer(PatcherTrainer):
    """The defender of a parallel run. Used as `PatcherTrainer` is, with `exchange` in its configuration.

    Each vector that comes in force is logged as `attack_vector_norm`, `attack_weights_moved` (the share that its attack
    moved) and `attack_staleness` (updates) and noted, with its origin, in `vectors`. Each publication is logged as
    `publish_seconds`, for which training stood still. Beyond SFT it holds two buffers of the trained parameters' size,
    as `PatcherTrainer` while defending; while a version is loaded a third one, before any gradient is there.

    Attributes:
        vectors: One entry for every vector that came in force: `step`, `origin`, `version`, `attacked_step`,
            `staleness`, `norm` and the attacker's own `first_loss`, `last_loss` and `weights_moved`.

    Raises:
        InputError: The exchange belongs to another run or another model.
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
        if self.args.exchange is None:
            raise InputError("--role defender needs --exchange, the folder in which defender and attackers meet")
        if Exchange.is_open(self.args.exchange):  # refused while nothing has been done yet
            run_of(Path(self.args.exchange), DEFENDER, self._run, fingerprint_of(self.model, self.processing_class))
        self.vectors: list[dict[str, Any]] = []
        self._used: dict[str, int] = {}
        # Weights are told apart by who published them, this process or one whose checkpoint it goes on from. Of the
        # latter's, those after the checkpoint are of updates that were lost.
        [self._lineage] = broadcast_object_list([uuid4().hex])
        self._last_step_of: dict[str, int] = {}
        self._exchange: Exchange | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as `DefenseTrainer` does, with the exchange open. When the run is finished, the attackers are told.

        Raises:
            InputError: The exchange cannot be written, or has come to be another's.
        """
        with Exchange(
            self.args.exchange,
            origin=DEFENDER,
            run=self._run,
            fingerprint=fingerprint_of(self.model, self.processing_class),
        ) as self._exchange:
            output = super().train(resume_from_checkpoint, **kwargs)
            if self.state.global_step >= self.state.max_steps:
                self._exchange.finish()
        return output

    @property
    def _run(self) -> str:
        """What the run is called in its exchange."""
        return str(Path(self.args.output_dir).resolve())

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """Publish and look where it is time to, then Patcher's gradient."""
        step = self.state.global_step
        if self._exchange is not None:
            if step % (self.args.publish_every or self.args.attack_every) == 0:
                began, facts = time.perf_counter(), {"lineage": self._lineage}
                self._exchange.publish(trainable_parameters(self.model), step=step, facts=facts)
                self.log_metric("publish_seconds", time.perf_counter() - began)
            if step > 0 and step % self.args.attack_every == 0:
                self._take_newest(self._exchange)
        return super().defended_gradient(model, window)

    def method_state(self) -> dict[str, Any]:
        """The vector in force, where vectors came from, which versions were used, and of what weights."""
        last_steps = {**self._last_step_of, self._lineage: self.state.global_step}
        own = {"vectors": self.vectors, "used_versions": self._used, "last_step_of": last_steps}
        return {**super().method_state(), **own}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the vector that was in force."""
        super().load_method_state(state)
        self.vectors, self._used = state["vectors"], state["used_versions"]
        self._last_step_of = state["last_step_of"]

    def _simulates_attacks(self) -> bool:
        return False  # others attack

    def _take_newest(self, exchange: Exchange) -> None:
        """Put the newest vector of the attacker whose turn it is in force; of the next one where it has none."""
        names = exchange.origins()
        last = self.vectors[-1]["origin"] if self.vectors else ""
        turn = sum(name <= last for name in names)  # the first name after the one used last
        for name in names[turn:] + names[:turn]:
            version = exchange.newest(name, after=self._used.get(name, 0))
            if version is not None and self._is_of_this_run(version) and self._use(exchange, version):
                return

    def _is_of_this_run(self, version: Version) -> bool:
        """Whether the attacked weights are this run's: not those of a run before it, or of updates lost in a crash."""
        lineage = str(version.facts.get("lineage"))
        return lineage == self._lineage or version.step <= self._last_step_of.get(lineage, -1)

    def _use(self, exchange: Exchange, version: Version) -> bool:
        """δ ← θ_att − θ, unless θ_att cannot be had."""
        parameters = trainable_parameters(self.model)
        vector = exchange.load(version, parameters)
        if vector is None:
            return False
        self._used[version.origin] = version.number
        vector -= ParameterVector(parameters)
        length = norm(vector)
        if not math.isfinite(length):
            logger.warning("%s is not used: it holds numbers that are not finite", version.path)
            return False
        member = self._pool.draw(self._draws("round"), self._pool.trained)
        assert member is not None  # else the pool was refused
        self._vectors.make_room(member)
        self._vectors.add(member, vector)
        found = {
            "step": self.state.global_step,
            "origin": version.origin,
            "version": version.number,
            "attacked_step": version.step,
            "staleness": self.state.global_step - version.step,
            "norm": length,
            "first_loss": version.facts["first_loss"],
            "last_loss": version.facts["last_loss"],
            "weights_moved": version.facts["weights_moved"],
        }
        self.vectors.append(found)
        self.log_metric("attack_vector_norm", length)
        self.log_metric("attack_weights_moved", found["weights_moved"])
        self.log_metric("attack_staleness", found["staleness"])
        return True
