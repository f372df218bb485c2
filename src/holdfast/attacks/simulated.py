"""The attack a defender simulates on itself: a fine-tuning attack, run in place and taken back.

The real attack (`holdfast.attacks.real`) takes the same steps, AdamW on the clipped gradient of the completions' loss,
through the same `DefenseTrainer.backward`; there they are kept. (Of a Mixture-of-Experts model a real attack, like any
training, also keeps the routers balanced; a simulated one is cross-entropy alone.)
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.training_args import OptimizerNames

from holdfast.attacks.low_rank import Adapter, Factors
from holdfast.data.batches import Batch
from holdfast.errors import InputError
from holdfast.parameters import (
    ParameterVector,
    displacement,
    norm,
    restore,
    share_moved,
    snapshot,
    take_gradient,
    trainable_parameters,
)
from holdfast.trainer import DefenseTrainer

logger = logging.getLogger(__name__)

HARDLY = 0.5
"""Fewer weights than this share moved by an attack are worth a warning; in float32 nearly all of them move."""


@dataclass(frozen=True)
class SimulatedAttack:
    """What a simulated attack found.

    Attributes:
        vector: The attack vector δ = θ_att − θ; None if the attack was discarded.
        first_loss: The attacker's loss L(θ; B₁) before its first step.
        last_loss: Its loss on its last batch, before its last step.
        norm: ‖δ‖.
        weights_moved: The share of the trained weights that δ changes.
        discarded: Why there is no vector, or None.
    """

    vector: ParameterVector | None
    first_loss: float
    last_loss: float
    norm: float
    weights_moved: float
    discarded: str | None = None


def simulate_attack(
    trainer: DefenseTrainer,
    model: torch.nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    window_size: int = 1,
    max_grad_norm: float = 1.0,
    optimizer: str = "adamw_torch_fused",
    adapter: Adapter | None = None,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> SimulatedAttack:
    """Attack the model with `steps` AdamW steps, and leave it with the very bits it had.

    The attacker is torch's AdamW with its own defaults (betas 0.9/0.999, eps 1e-8), whatever the defender's optimizer
    is, at a constant rate, on all trainable parameters, its gradient clipped to `max_grad_norm` (Patcher, 2606.07970).
    Beyond what training holds, it needs three buffers of the parameters' size: the saved weights, which become δ, and
    AdamW's two moments, which are dropped when it ends.

    Beside the paper's, an attacker may take another optimizer, train an adapter that is merged, or change the weights
    otherwise before or after that; δ is where all of it leads.

    Args:
        trainer: Whose data parallelism, precision and loss the attack uses.
        model: The model as wrapped for training.
        batches: Harmful batches, endless.
        steps: Length of the attack in attacker steps.
        learning_rate: The attacker's, constant.
        weight_decay: The attacker's.
        window_size: Micro-batches per attacker step.
        max_grad_norm: What the attacker's gradient is clipped to.
        optimizer: Its name, as transformers has it; with that optimizer's own defaults.
        adapter: Train an adapter with these settings, and merge it.
        before: Changes the weights, in place, before the first step.
        after: The same after the last.

    Returns:
        The attack vector and the attacker's losses. An attack whose loss or vector is not finite is discarded.

    Raises:
        Abandoned: The run was asked to stop; the model has its bits again.
        InputError: There is no step to take, or the batches end before the attack does; the model has its bits again.
    """
    if steps < 1:
        raise InputError(f"a simulated attack takes at least one step, got {steps}")
    trainer.model.zero_grad()
    origin = snapshot(trainer.model)
    losses: list[float] = []
    finished = False
    hide = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    try:
        if before is not None:
            before()
        factors = None
        if adapter is not None:
            factors = Factors(trainer.model, adapter, origin if before is None else snapshot(trainer.model))
        trained = list(trainable_parameters(trainer.model).values()) if factors is None else factors.parameters()
        stepper = _optimizer(optimizer, trainer, trained, learning_rate, weight_decay)
        for _ in tqdm(range(steps), desc="simulated attack", unit="step", leave=False, disable=hide):
            trainer.leave_if_asked_to_stop()
            loss = trainer.backward(model, trainer.draw(batches, window_size))
            losses.append(trainer.accelerator.gather(loss.reshape(1)).mean().item())
            if not math.isfinite(losses[-1]):
                break
            if factors is None:
                trainer.accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            else:
                factors.take_gradient(take_gradient(trainer.model))
                nn.utils.clip_grad_norm_(trained, max_grad_norm)
            stepper.step()
            stepper.zero_grad()
            if factors is not None:
                factors.merge()
        else:
            if after is not None:
                after()
            finished = True
    finally:
        if not finished:
            restore(trainer.model, origin)
            trainer.model.zero_grad()
    del stepper, trained, factors
    if not finished:
        reason = f"the attacker's loss at its step {len(losses)} is {losses[-1]}"
        return SimulatedAttack(None, losses[0], losses[-1], math.nan, math.nan, reason)
    moved = share_moved(trainable_parameters(trainer.model), origin)
    vector = displacement(trainer.model, origin)
    length = norm(vector)
    if not math.isfinite(length):
        return SimulatedAttack(None, losses[0], losses[-1], length, moved, "its vector is not finite")
    if few := hardly_moved(moved):
        logger.warning("the simulated attack after update %d %s", trainer.state.global_step, few)
    return SimulatedAttack(vector, losses[0], losses[-1], length, moved)


def _optimizer(
    name: str, trainer: DefenseTrainer, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The attacker's optimizer: transformers' of a name, with its defaults and not with the defender's settings."""
    settings = copy.copy(trainer.args)
    settings.optim, settings.optim_args, settings.learning_rate = OptimizerNames(name), None, learning_rate
    settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon = 0.9, 0.999, 1e-8
    kind, keywords = trainer.get_optimizer_cls_and_kwargs(settings, trainer.model)
    found: torch.optim.Optimizer = kind(parameters, weight_decay=weight_decay, **keywords)
    return found


def hardly_moved(share: float) -> str | None:
    """What to say of an attack that moved a suspiciously small share of the weights that it trains; else None."""
    if share >= HARDLY:
        return None
    return (
        f"moved {share:.2%} of the weights that it trains: its rate is too small for their precision, or little of the "
        "model took part, and a defense looks stronger against it than it is"
    )
