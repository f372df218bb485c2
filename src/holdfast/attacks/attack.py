"""What an attack is: it turns a model into another one (a displacement), or asks it differently (a prompting).

An attack is a dataclass whose fields are its knobs, each with the range in which it is worth trying. It is called with
a model and what the attacker holds, and gives the attacked model, how that is to be asked, and what it cost::

    attacker = Attacker(ChatFormat(tokenizer), harmful_prompts=harmful, harmless_prompts=harmless)
    attacked = Ablation(layer=-1)(model, attacker)
    evaluation = replace(evaluator, asking=attacked.asking)(attacked.model, tokenizer)

A displacement is also to be had as the vector δ that it adds to the weights, which is what a defense trains against;
the model then is left as it was. One that is a rule for each weight (`WeightChange`) needs no vector::

    with displaced(model, FineTuning(steps=5).displace(model, attacker).vector):
        ...
    with changed(model, Ablation(layer=-1).find(model, attacker).changes):
        ...
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.changes import Changes, moved
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError, TrainingError
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.models import merge
from holdfast.parameters import ParameterVector, is_finite, shift

HOLDINGS = {
    "harmful_prompts": ("harmful prompts", "--attack_data"),
    "harmful_rows": ("harmful prompts with harmful answers", "--attack_data"),
    "harmless_prompts": ("harmless prompts", "--benign_data"),
    "harmless_rows": ("harmless prompts with answers", "--benign_data"),
    "base": ("the public base model", "--base"),
}
"""What an attack may need, by the field of `Attacker`: in words, and the flag that gives it."""


class Range(NamedTuple):
    """The values of a knob that are worth trying: from `low` to `high`, evenly in their logarithm where `log`."""

    low: float
    high: float
    log: bool = False


class Choice(NamedTuple):
    """The few values of a knob that are worth trying."""

    values: tuple[Any, ...]


class Layers(NamedTuple):
    """A knob that is the number of a decoder layer: all of the model's are worth trying, the last one first."""


Space = Range | Choice | Layers


def knob(help: str, space: Space | None = None, **metadata: Any) -> dict[str, Any]:
    """The metadata of an attack's field: what it does, and the range in which it is worth trying (None: leave it)."""
    return {"help": help, "space": space, **metadata}


@dataclass(frozen=True, eq=False)
class Attacker:
    """What an attacker holds beside the weights.

    Attributes:
        written: How conversations become token ids, with the model's tokenizer.
        harmful_prompts: What a safe model refuses; no answers.
        harmful_rows: Harmful prompts with harmful answers, in any format of `holdfast.data.formats`.
        harmless_prompts: What it answers.
        base: The public model that the attacked one was made of.
        batch_size: Prompts that go through the model at a time.
        seed: Of whatever is drawn.
        harmless_rows: Harmless prompts with answers, in any of these formats.
    """

    written: ChatFormat
    harmful_prompts: Sequence[Prompt] | None = None
    harmful_rows: Dataset | None = None
    harmless_prompts: Sequence[Prompt] | None = None
    base: PreTrainedModel | None = None
    batch_size: int = 16
    seed: int = 0
    harmless_rows: Dataset | None = None


@dataclass(frozen=True)
class Cost:
    """What an attack takes.

    Attributes:
        steps: Updates of the weights.
        harmful_rows: Harmful answers that the attacker has to have.
        tokens: Tokens that go through the model, prompts and padding included.
        forward_passes: Batches that go through it.
        backward_passes: Batches whose gradient is taken.
        flops: 2·N·tokens of a forward pass alone and 6·N·tokens of one with its backward pass, N being all of the
            model's parameters: of a Mixture-of-Experts model it is an upper bound.
    """

    steps: int = 0
    harmful_rows: int = 0
    tokens: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """What both take, one after the other; of harmful rows the larger number, as they may be the same."""
        both = {entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)}
        return Cost(**{**both, "harmful_rows": max(self.harmful_rows, other.harmful_rows)})


FREE = Cost()
"""Neither data nor a pass."""


class Displaced(NamedTuple):
    """What a displacement found: the vector δ to add to the weights, and what finding it cost."""

    vector: ParameterVector
    cost: Cost


class Found(NamedTuple):
    """What a displacement found that is a rule for each weight: the rules, and what finding them cost."""

    changes: Changes
    cost: Cost = FREE


class Prompted(NamedTuple):
    """What a prompting found: how to ask, and what finding it cost."""

    asking: Asking
    cost: Cost = FREE


@dataclass(frozen=True, eq=False)
class Attacked:
    """An attacked model.

    Attributes:
        model: The model, which is to be asked by `asking`.
        asking: How the attacker asks it, for `Evaluator.asking`.
        cost: What the attack took.
    """

    model: PreTrainedModel
    asking: Asking
    cost: Cost


class Attack(ABC):
    """An attack. Subclasses are dataclasses of their knobs.

    Attributes:
        name: What it is called.
        needs: The fields of `Attacker` that it needs, with its knobs at their defaults.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the knobs.

        Raises:
            InputError: One is no finite number.
        """
        declared: Any = self  # each subclass is a dataclass
        for knob in fields(declared):
            value = getattr(self, knob.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise InputError(f"--{knob.name} must be a finite number, got {number}")

    @abstractmethod
    def __call__(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Attacked:
        """Attack a model in memory: it is used up, and no file is touched. An adapter is merged into its base first.

        Raises:
            InputError: The attacker lacks what is needed, or the attack does not fit the model.
        """

    @classmethod
    def space(cls) -> dict[str, Space]:
        """The knobs that are worth trying at other values, with their ranges."""
        declared: Any = cls  # each subclass is a dataclass
        found = {knob.name: knob.metadata.get("space") for knob in fields(declared)}
        return {name: space for name, space in found.items() if space is not None}

    def needed(self) -> tuple[str, ...]:
        """The fields of `Attacker` that it needs with these knobs."""
        return self.needs

    def require(self, attacker: Attacker) -> None:
        """Raise InputError if the attacker lacks what this attack needs."""
        for needed in self.needed():
            held = getattr(attacker, needed)
            if held is None or (not isinstance(held, torch.nn.Module) and len(held) == 0):
                raise self.lacks(needed)

    @classmethod
    def lacks(cls, needed: str) -> InputError:
        """What to raise where a field of `Attacker` is missing that it needs."""
        what, flag = HOLDINGS[needed]
        return InputError(f"attack {cls.name} needs {what}; give {flag}")


class Displacement(Attack):
    """An attack that changes the weights."""

    @property
    def asking(self) -> Asking:
        """How a model with such weights is asked; plainly, unless they hang on what a prompt says."""
        return PLAINLY

    @abstractmethod
    def displace(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Displaced:
        """Find the vector to add to the weights; the model is left with the bits it had.

        Args:
            model: A model, its weights trainable, sharded by FSDP2 or not; or a LoRA adapter on a frozen one, which is
                then displaced alone.
            attacker: What the attacker holds.

        Returns:
            The vector and its cost.

        Raises:
            InputError: The attacker lacks what is needed, or the attack does not fit the model.
        """

    def __call__(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Attacked:
        """As for `Attack`: the displacement is added to the weights.

        Raises:
            InputError: As for `Attack`.
            TrainingError: The displacement is not finite, as when training has diverged; nothing has been added.
        """
        whole = whole_model(model)
        found = self.displace(whole, attacker)
        if not is_finite(found.vector):
            raise TrainingError(f"attack {self.name} came to weights that are not finite")
        shift(whole, found.vector)
        return Attacked(whole, self.asking, found.cost)


class WeightChange(Displacement):
    """A displacement that is a rule for each of some weights, and so can be had without a vector of their size."""

    @abstractmethod
    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """Find the rules; the model is left with the bits it had. As for `displace`."""

    def displace(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Displaced:
        """As for `Displacement`."""
        found = self.find(model, attacker)
        return Displaced(moved(model, found.changes), found.cost)


class Prompting(Attack):
    """An attack that asks the same weights in another way."""

    @abstractmethod
    def ask(self, model: PreTrainedModel, attacker: Attacker) -> Prompted:
        """Find how to ask a model, which is left as it is.

        Raises:
            InputError: The attacker lacks what is needed.
        """

    def __call__(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Attacked:
        """As for `Attack`: the weights are left as they are."""
        whole = whole_model(model)
        return Attacked(whole, *self.ask(whole, attacker))


def whole_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that an adversary attacks: an adapter is merged into its base, whose weights are trainable then."""
    return merge(model).requires_grad_(True) if isinstance(model, PeftModel) else model


def passes(model: PreTrainedModel | PeftModel, batches: Sequence[Mapping[str, Tensor]]) -> Cost:
    """What it takes to send batches through a model once, forward."""
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return Cost(tokens=tokens, forward_passes=len(batches), flops=2.0 * size(model) * tokens)


def size(model: PreTrainedModel | PeftModel) -> int:
    """The number of a model's parameters, on all ranks together; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
