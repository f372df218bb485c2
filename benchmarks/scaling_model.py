"""What a run on many GPUs needs in memory, traffic and time, computed from shapes; scaling.py makes tables of it.

Bytes and passes follow from three models' shapes and from what the methods keep. What depends on a machine is one of
the assumptions below. Bytes and seconds throughout; GB are 10⁹ bytes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

# Assumptions about machines.
GPU_MEMORY, RESERVED = 80e9, 5e9
PEAK, UTILISATION = 989e12, 0.4
BUS = 300e9
NODE = 8
TO_HOST, STORAGE, HASHING = 25e9, 5e9, 1.5e9

# The setting: rows of a GPU in a pass, and Patcher's published lengths, k₁ in its sequential and its parallel form.
ROWS, LENGTH = 4, 1024
DEFENSE, SEQUENTIAL, PARALLEL, ROUNDS = 1000, 300, 500, 15

# Bytes a parameter: float32 weights, gradient and AdamW's two moments; bf16 in passes and in their traffic.
WEIGHT, PASSED = 4, 2
SFT = 4 * WEIGHT
DEFENDING, ATTACKING = SFT + 2 * WEIGHT, SFT + 3 * WEIGHT
LORA = 2 * WEIGHT
"""Frozen weights, and those of the defender that take their place."""

# Operations for a parameter and token: forward; forward, again for backward, and back to activations; and to weights.
FORWARD, THROUGH, FULL = 2, 6, 8

TILE = 4096 * 32768
"""Logits that TRL's fused head holds at a time, tokens × vocabulary."""


class Model:
    """What is needed of an architecture, counted on the model itself, built without memory.

    Attributes:
        name: What it is called.
        parameters: All of them, tied ones once.
        layer: Those of a decoder layer.
        head: Those of the output embeddings.
        version: Bytes of one version of the weights in an exchange.
        per_token: Elements of activations: the input of every layer; what one layer keeps for backward while it is
            computed again; and two gradients of the MLP's width.
    """

    def __init__(self, name: str, config: PretrainedConfig) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.name = name
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        self.head = model.get_output_embeddings().weight.numel()
        self.version = WEIGHT * self.parameters
        width, mlp = config.hidden_size, config.intermediate_size
        keys = width * config.num_key_value_heads // config.num_attention_heads
        self.per_token = config.num_hidden_layers * width + (10 * width + 2 * keys + 4 * mlp) + 2 * mlp

    def gathered(self) -> float:
        """Bytes of whole weights and whole gradients on every GPU, in the worse of two moments of a backward pass."""
        at_head = (PASSED + WEIGHT + PASSED) * self.head + PASSED * TILE  # weights, the gradient in float32 and in bf16
        in_layers = PASSED * (self.head + 3 * self.layer + 3 * self.layer)  # up to three layers, and their gradients
        return max(at_head, in_layers)

    def activations(self) -> float:
        """Bytes of activations on every GPU, every layer's being computed again in the backward pass."""
        return PASSED * ROWS * LENGTH * self.per_token

    def per_gpu(self, gpus: int, state: float) -> float:
        """Bytes on every GPU of a group, `state` bytes a parameter being shared out among them."""
        return self.parameters * state / gpus + self.gathered() + self.activations() + RESERVED

    def least(self, state: float) -> int:
        """GPUs of the smallest group that this fits on."""
        return math.ceil(self.parameters * state / (GPU_MEMORY - self.per_gpu(1, 0)))

    def split(self, gpus: int) -> tuple[int, int] | None:
        """GPUs of the defender and of one attacker, which gets as few as it fits on, whole nodes of several.

        None if there are too few.
        """
        unit = 1 if gpus <= NODE else NODE
        attacker = unit * math.ceil(self.least(SFT) / unit)
        return (gpus - attacker, attacker) if gpus - attacker >= self.least(DEFENDING) else None

    def traffic(self, gpus: int) -> float:
        """Bytes that a GPU receives in a pass: weights for forward, weights for backward, gradients."""
        return 3 * PASSED * self.parameters * (gpus - 1) / gpus

    def arithmetic(self) -> float:
        """Seconds that a forward and backward pass computes."""
        return FULL * self.parameters * ROWS * LENGTH / (PEAK * UTILISATION)

    def seconds(self, gpus: int) -> float:
        """Seconds of a forward and backward pass, the shorter of arithmetic and traffic hidden under the longer."""
        return max(self.arithmetic(), self.traffic(gpus) / BUS)


def shape(vocabulary: int, width: int, mlp: int, layers: int, heads: int, keys: int, *, tied: bool) -> dict[str, Any]:
    """A Llama's or Qwen2's shape under transformers' names."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "tie_word_embeddings": tied,
    }


MODELS = [
    Model("Qwen2.5-1.5B", Qwen2Config(**shape(151936, 1536, 8960, 28, 12, 2, tied=True))),
    Model("Llama-3-8B", LlamaConfig(**shape(128256, 4096, 14336, 32, 32, 8, tied=False))),
    Model("Llama-3-70B", LlamaConfig(**shape(128256, 8192, 28672, 80, 64, 8, tied=False))),
]
CHECK = Model("Llama-3.2-1B", LlamaConfig(**shape(128256, 2048, 8192, 16, 32, 8, tied=True)))
"""Small enough to hold the memory model against a single GPU."""


class Method(NamedTuple):
    """What a method keeps and computes, by its own account.

    Attributes:
        name: As in results/method_cost.json, if it was measured there.
        buffers: Of the trained parameters' size beyond SFT, at the peak.
        work: Operations of an update, for a parameter and token.
    """

    name: str
    buffers: int
    work: int


METHODS = [
    Method("SFT", 0, FULL),
    Method("Patcher, defending", 2, 2 * FULL),
    Method("Patcher, attacking in its sequential form", 3, FULL),
    Method("Patcher, attacking as a job of its own", 0, FULL),
    Method("Vaccine", 0, THROUGH + FULL),
    Method("Booster", 2, 3 * FULL),
    Method("Antibody, alignment", 2, 4 * FULL),
    Method("Lisa", 1, FULL),
    Method("SPARD, projecting", 0, 2 * FULL),
    Method("Antibody, fine-tuning", 0, FORWARD + FULL),
]


def passes() -> int:
    """Passes of the published run's defender: the first round has no attack vector."""
    return DEFENSE + (ROUNDS - 1) * 2 * DEFENSE


def speed_up(attack_steps: int) -> float:
    """How much longer the same run takes when the defender's GPUs attack as well."""
    return 1 + (ROUNDS - 1) * attack_steps / passes()


# ---------------------------------------------------------------------- the exchange


@dataclass(frozen=True)
class Exchange:
    """Seconds that one version takes.

    Attributes:
        copying: Training waits while its weights are copied to the host.
        appearing: Until others see it: written by all ranks, then read back and hashed by the first.
        taking: The reader waits while its first rank hashes it and all ranks load it.
    """

    copying: float
    appearing: float
    taking: float

    @property
    def waiting(self) -> float:
        """What the defender waits for a round, which publishes and takes one version."""
        return self.copying + self.taking


def exchange(model: Model, defender: int) -> Exchange:
    """The exchange of a defender on so many GPUs."""
    moving, hashing = model.version / STORAGE, model.version / min(STORAGE, HASHING)
    return Exchange(model.version / defender / TO_HOST, moving + hashing, hashing + moving)


class Staleness(NamedTuple):
    """Ages of attack vectors in updates, once the run is under way.

    Attributes:
        first: The update from which on there is an attack vector.
        new: The age of a vector that comes in force.
        oldest: Its age when the next one takes its place.
        busy: Share of its time in which the attacker attacks.
    """

    first: int
    new: int
    oldest: int
    busy: float


def staleness(
    update: float, attack: float, times: Exchange, publish: int, look: int, updates: int = 100_000
) -> Staleness:
    """Play a run with one attacker.

    Args:
        update: Seconds of a defender's update.
        attack: Seconds of an attack.
        times: The exchange's.
        publish: Updates of the defender between publications.
        look: Updates of the defender between its looks for a newer vector.
        updates: Length of the run.
    """
    interval = publish * update
    seen: list[tuple[float, int]] = []  # when a vector can be seen, and the update whose weights were attacked
    now, attacked = 0.0, -publish
    while now < updates * update:
        newest = math.floor((now - times.appearing) / interval) * publish
        if newest <= attacked:  # none is newer yet: wait for the next one
            newest = attacked + publish
            now = newest * update + times.appearing
        attacked = newest
        now += times.taking + attack
        seen.append((now + times.appearing, attacked))
    taken: list[tuple[int, int]] = []  # the update from which on a vector is in force, and the one that was attacked
    for step in range(look, updates, look):
        newest = max((origin for when, origin in seen if when <= step * update), default=-1)
        if newest > (taken[-1][1] if taken else -1):
            taken.append((step, newest))
    settled = taken[len(taken) // 2 :]
    return Staleness(
        taken[0][0],
        max(step - origin for step, origin in settled),
        max(after - origin for (_, origin), (after, _) in itertools.pairwise(settled)),
        len(seen) * attack / now,
    )
