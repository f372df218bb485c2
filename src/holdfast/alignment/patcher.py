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

With a `pool` δ is drawn at every update from several simulated attacks by weight: vectors of full or LoRA fine-tuning
of the last rounds, refusal-direction ablation, dropping, interpolation towards the public base, rounding, and chains of
them (`holdfast.alignment.pool`). A member that ends with `prefill` takes its gradient on harmful prompts whose answers
begin as an attacker begins them and refuse all the same, g(θ + δ; P), in the place of g(θ + δ; B); alone it displaces
nothing, so δ = 0.

With rows K to retain (`holdfast.alignment.retention`) the exact gradient has one term more, of which a share κ is taken
under attack; and one with harmful rows H to reroute (`holdfast.alignment.rerouting`), which are the attacker's:

    … + λ · { (1 − κ) · ∇R(θ; K) + κ · ∇R(θ + δ; K) } + μ · ∇C(θ + δ; H)

with the δ of the update, or none as long as there is none. The sampled estimator takes each term as often as it weighs;
all are scaled alike, so that clipping takes none its weight. With w = 1 + λ + μ:

    w · { g(θ + δ; B) with probability α / w,    g(θ; B) with (1 − α) / w,
          ∇R(θ + δ; K) with κ · λ / w,           ∇R(θ; K) with (1 − κ) · λ / w,    else ∇C(θ + δ; H) }

With `suffixes` about half of the rows of B, of the attacker's and of K end their prompts with one of these texts.

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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from holdfast.alignment.adversary import Adversary
from holdfast.alignment.draws import draws
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.alignment.pool import Link, Member, Pool
from holdfast.alignment.rerouting import ReroutingTrainer
from holdfast.alignment.rounds import simulate_round
from holdfast.alignment.vectors import BY_HAND, AttackVectors
from holdfast.attacks.attack import Choice, whole_model
from holdfast.attacks.changes import changed
from holdfast.attacks.prefill import OPENERS, openers_of
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.models import from_flag, load_model
from holdfast.parameters import ParameterVector, displaced, vector_for
from holdfast.window import Window

logger = logging.getLogger(__name__)


class PatcherTrainer(ReroutingTrainer):
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
        attack_dataset: Harmful prompts with harmful answers, for the simulated attacker, for ablation and begun
            answers, and to be rerouted. It may be left out where nothing takes it, or `attack_vector` or
            `attack_batches` is set by hand.
        benign_dataset: Harmless prompts, whose answers play no part, for a pool with ablation.
        retain_dataset: As for `RetainingTrainer`.
        **kwargs: As for `DefenseTrainer`.

    Attributes:
        attack_batches: The attacker's endless batches; may be set.
    """

    _tag_names = ["holdfast", "patcher"]
    _name = "Patcher"
    config_class = PatcherConfig
    asks_variously = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PatcherConfig | None = None,
        train_dataset: Dataset | None = None,
        attack_dataset: Dataset | None = None,
        benign_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self.args.require_data(
            attack=attack_dataset is not None, benign=benign_dataset is not None, retain=self.retains
        )
        self._pool = Pool.of(self.args.pool)
        assert self._format is not None  # the train data have been prepared
        with from_flag("--base"):
            base = whole_model(load_model(self.args.base)) if self.args.base is not None else None
        self._adversary = Adversary(
            self.model,
            self._pool,
            self._format,
            harmful=attack_dataset,
            harmless=benign_dataset,
            base=base,
        )
        self.attack_batches: Iterator[Batch] | None = None
        self._attack_rows: Dataset | None = None
        if attack_dataset is not None:
            self._attack_rows = self.prepared(attack_dataset, "attack")
            self.attack_batches = self.stream(self._attack_rows, "attack", self.args.attack_batch_size)
        self._pool.require_rows(None if self._attack_rows is None else len(self._attack_rows), self.args.world_size)
        self._begun = {
            member.name: self.stream(self._begun_rows(member.begun, attack_dataset), member.name)
            for member in self._pool.members
            if member.begun is not None and member.weight > 0
        }
        if self.args.origin_decay > 0:
            self.decay_towards_origin(self.args.origin_decay)
        if self.args.reroute_weight > 0:
            assert self._attack_rows is not None  # as the configuration requires
            self.reroute(self._attack_rows, self.args.reroute_layers)
        self._vectors = AttackVectors()
        self.add_callback(_BeforeTheFirstUpdate(self))

    @property
    def attack_vector(self) -> ParameterVector | None:
        """The newest attack vector δ (name → tensor), or None before the first attack.

        Set by hand, it stays: every step is defended with it, and no attack is simulated until it is set to None.

        Raises:
            InputError: Set to something that is not one finite tensor of the right shape per trainable parameter.
        """
        return self._vectors.newest

    @attack_vector.setter
    def attack_vector(self, vector: Mapping[str, Tensor] | None) -> None:
        self._vectors.set_by_hand(None if vector is None else vector_for(self.model, vector, "attack_vector"))

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """The gradient that the module has, of all terms or of one of them by a coin."""
        self.remember()
        if self._attack_is_due():
            self.attack(model)
        member = self._drawn_member()
        if self.args.estimator == "sampled":
            return self._sampled_gradient(model, window, member)
        loss, gradient = self._exact_gradient(model, window, member)
        if self.retains:
            gradient += self.args.retain_weight * self._retaining_gradient(model, len(window), member)
        if self.reroutes:
            gradient += self.args.reroute_weight * self._rerouting_gradient(model, len(window), member)[1]
        return loss, gradient

    def _sampled_gradient(
        self, model: torch.nn.Module, window: Window, member: Member | None
    ) -> tuple[Tensor, ParameterVector]:
        """One term of the exact gradient, as often as it weighs, times what all of them weigh."""
        aligned = 1 + (self.args.retain_weight if self.retains else 0.0)
        whole = aligned + self.args.reroute_weight
        coin = whole * self._draws("coin").random()
        if member is not None and coin < self.args.alpha:
            loss, gradient = self._attacked_gradient(model, window, member)
        elif coin < 1:
            loss, gradient = self._safe_gradient(model, window)
        elif coin < aligned:
            attacked = coin - 1 < self.args.retain_alpha * self.args.retain_weight
            window = self.retained(len(window))
            loss, gradient = self._retention_at(model, window, member if attacked else None)
            self.count_tokens(window)
        else:
            loss, gradient = self._rerouting_gradient(model, len(window), member)
        if whole != 1:
            gradient *= whole
        return loss, gradient

    def _exact_gradient(
        self, model: torch.nn.Module, window: Window, member: Member | None
    ) -> tuple[Tensor, ParameterVector]:
        """(1 − α) · g(θ; B) + α · g(θ + s·δ; B), and g(θ; B) where there is no δ yet."""
        if member is None:
            return self._safe_gradient(model, window)
        alpha = self.args.alpha
        with self.shared_randomness():  # and the attacked pass first, so that fewer buffers live at once
            attacked_loss, attacked_gradient = self._attacked_gradient(model, window, member)
        loss, gradient = self._safe_gradient(model, window)
        gradient *= 1 - alpha
        gradient += alpha * attacked_gradient
        if member.begun is None:
            self.log_metric("loss_gap", attacked_loss - self.cross_entropy(loss, window))
        return loss, gradient

    def _safe_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """L(θ; B) and its gradient."""
        loss, gradient = self.loss_and_gradient(model, window)
        self.log_metric("safe_loss", self.cross_entropy(loss, window))
        return loss, gradient

    def _attacked_gradient(
        self, model: torch.nn.Module, window: Window, member: Member
    ) -> tuple[Tensor, ParameterVector]:
        """L(θ + s·δ; B) and its gradient, δ the member's, if any; of one that begins answers, L(θ + s·δ; P)."""
        if member.begun is not None:
            window = self.draw(self._begun[member.name], len(window))
        with self._under_attack(member):
            loss, gradient = self.loss_and_gradient(model, window, quiet=True)
        if self.args.estimator == "sampled":
            self.count_tokens(window)
        self.log_metric("attacked_loss", loss)
        if self.args.pool is not None and member is not BY_HAND:
            self.log_metric(f"attacked_loss_{member.name}", loss)
        return loss, gradient

    def _retaining_gradient(self, model: torch.nn.Module, size: int, member: Member | None) -> ParameterVector:
        """(1 − κ) · ∇R(θ; K) + κ · ∇R(θ + s·δ; K) over the next `size` micro-batches of K; without a δ ∇R(θ; K)."""
        window, kappa = self.retained(size), self.args.retain_alpha
        if member is None or kappa == 0:
            return self._retention_at(model, window, None)[1]
        with self.shared_randomness():
            _, attacked = self._retention_at(model, window, member)
        _, gradient = self._retention_at(model, window, None)
        gradient *= 1 - kappa
        gradient += kappa * attacked
        return gradient

    def _retention_at(
        self, model: torch.nn.Module, window: Window, member: Member | None
    ) -> tuple[Tensor, ParameterVector]:
        """R(θ + s·δ; K) and its gradient, δ the member's; of None R(θ; K)."""
        with self._under_attack(member):
            loss, gradient = self.retention(model, window)
        self.log_metric("retain_loss" if member is None else "attacked_retain_loss", loss)
        return loss, gradient

    def _rerouting_gradient(
        self, model: torch.nn.Module, size: int, member: Member | None
    ) -> tuple[Tensor, ParameterVector]:
        """C(θ + s·δ; H) and its gradient, over the next `size` micro-batches of H."""
        window = self.rerouted(size)
        with self._under_attack(member):
            loss, gradient = self.rerouting(model, window, self.args.reroute_layers)
        if self.args.estimator == "sampled":
            self.count_tokens(window)
        return loss, gradient

    def _under_attack(self, member: Member | None) -> AbstractContextManager[None]:
        """θ + s·δ in the place of θ, δ the member's and s as they are drawn in this update; of None θ itself."""
        if member is None:
            return nullcontext()
        chosen = self._draws("attack")
        scale = float(self._draws("scale").uniform(*self.args.attack_scale))
        if member.links:
            self.log_metric("attack_scale", scale)
        if member.trains:
            vectors = self._vectors.of(member)
            return displaced(self.model, vectors[int(chosen.integers(len(vectors)))], scale)
        return changed(self.model, self._adversary.changes(member, chosen), scale)

    def attack(self, model: torch.nn.Module) -> None:
        """Simulate an attack on today's weights and put its vector in force; an attack gone wrong is discarded.

        Of a pool with several attacks that take training one is drawn by weight; so are knobs that vary. Both hang on
        the run's seed and the round alone.

        Raises:
            InputError: There are no batches to attack with.
        """
        args, number = self.args, self.state.global_step // self.args.attack_every
        batches, chosen = self._batches_to_attack_with(), draws(args.seed, "round", number)
        member = self._pool.draw(chosen, self._pool.trained)
        assert member is not None  # else none is due
        self._vectors.make_room(member)
        found = simulate_round(
            self, model, member, self._adversary, batches, self._attack_rows, chosen=chosen, number=number
        )
        if found.vector is None:
            logger.warning(
                "the simulated attack after update %d is discarded: %s; until the next one there is no attack vector",
                self.state.global_step,
                found.discarded,
            )
            return
        self._vectors.add(member, found.vector)
        self.log_metric("attacker_first_loss", found.first_loss)
        self.log_metric("attacker_last_loss", found.last_loss)
        self.log_metric("attack_vector_norm", found.norm)
        self.log_metric("attack_weights_moved", found.weights_moved)

    def method_state(self) -> dict[str, Any]:
        """The vectors in force; one less, if a run is stopped while it looks for another."""
        return {**super().method_state(), **self._vectors.state()}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Put the saved vectors in force again, as far as the pool still draws them."""
        super().load_method_state(state)
        self._vectors.load(state, [member for member in self._pool.members if member.weight > 0])

    def before_the_first_update(self) -> None:
        """See that the run has what its attacks will need; called when a checkpoint has been taken up.

        Raises:
            InputError: No vector was set by hand, and there are no batches to attack with.
        """
        if self._simulates_attacks():
            if self._pool.trained:
                self._batches_to_attack_with()
            if self._vectors.newest is None and self.state.max_steps <= self.args.attack_every:
                logger.warning(
                    "no attack is due before the end of the run (--attack_every %d, %d updates): the model will be "
                    "aligned without one",
                    self.args.attack_every,
                    self.state.max_steps,
                )

    def _simulates_attacks(self) -> bool:
        return not self._vectors.by_hand

    def _begun_rows(self, link: Link, rows: Dataset | None) -> Dataset:
        """The harmful prompts, answers begun as an attacker who knows the attack data would, unless it is told how."""
        assert rows is not None  # as the configuration requires of a pool with begun answers
        assert self._format is not None
        given = link.knobs.get("opener")
        known = openers_of(rows, self._format.plain, common=len(OPENERS))  # as many of its own as of many models
        openers = given.values if isinstance(given, Choice) else known
        return self.begun_and_refused(rows, self.args.refusal, openers, name="attack")

    def _attack_is_due(self) -> bool:
        step = self.state.global_step
        is_time = step > 0 and step % self.args.attack_every == 0
        return is_time and self._simulates_attacks() and bool(self._pool.trained)

    def _drawn_member(self) -> Member | None:
        """What δ is to be taken from in this update; None: from nothing yet."""
        if self._vectors.by_hand:
            return BY_HAND
        attacked = self._vectors.made_by()
        begun = self.state.global_step >= self.args.attack_every
        ready = [one.name for one in self._pool.members if (one.name in attacked if one.trains else begun)]
        return self._pool.draw(self._draws("member"), ready)

    def _draws(self, purpose: str) -> np.random.Generator:
        """What is drawn for a purpose in this update."""
        return draws(self.args.seed, purpose, self.state.global_step)

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
