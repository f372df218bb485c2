"""Refusal-direction ablation (Arditi et al., 2406.11717): take what says "refuse" out of all that is written.

A model's refusals are carried by one direction of its residual stream. With μ_l the mean over harmful prompts of what
layer l hands on at the prompt's last token, and ν_l the same over harmless ones,

    r_l = (μ_l − ν_l) / ‖μ_l − ν_l‖,    and    W ← W − s·r rᵀW

for every matrix W and bias that writes to the stream: attention outputs, MLP outputs (every expert's), embeddings. With
s = 1 the stream never has a part along r. Tied output embeddings change with the input's. Where a norm of gain g stands
between W and the stream (Gemma 2 and later, OLMo 2), what it lets through along r is what is along g ⊙ r before it:
there q = g ⊙ r / ‖g ⊙ r‖ takes the place of r, which is as exact for s = 1; the norm restores lengths.

Ours beside the paper's form, after tools in use: the direction of one layer for all, or each layer its own; s by layer
as a kernel (heretic), for attention and MLPs apart; rows that keep their norms; means over residuals of length 1;
directions without their part along the harmless mean. The search is over these. And since refusal may take more than
one direction (Wollschläger et al., 2502.17420): with `rank` k the space of

    R = (r_l, v_1, …, v_{k−1}),    v the first right singular vectors of the rows (x_i − ν_l)(I − r_l r_lᵀ),

x_i being what harmful prompt i leaves, so W ← W − s·R RᵀW; and with `repeat` all of it again on the ablated model,
which may refuse by what is left.

Examples:
    The direction of the last layer, where some defenses write their refusals::

        attacked = Ablation(layer=-1)(model, Attacker(ChatFormat(tokenizer), harmful, harmless_prompts=harmless))
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.attacks.attack import (
    Attacker,
    Choice,
    Cost,
    Displaced,
    Found,
    Layers,
    Range,
    WeightChange,
    knob,
    passes,
)
from holdfast.attacks.changes import changed, composed
from holdfast.config import require_positive
from holdfast.data.limits import Limits
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.data.tokens import padded_batches
from holdfast.errors import InputError
from holdfast.layers import first_of
from holdfast.models import eval_mode
from holdfast.parameters import TINY
from holdfast.post_norms import PostNorm, left_along, post_norms
from holdfast.residual import WRITES_HELP, Writer, decoder_layers, layer_number, writers

logger = logging.getLogger(__name__)

HARDLY_NOTHING = 0.2
"""More than this share of a direction left in the stream, where all should be gone, is worth a warning. Rounding in
half precision leaves some."""

_SCALE = (
    "How much of the direction is taken out of what %s write: one number for all layers, or a kernel of four, its "
    "maximum, the layer it is reached at, the width in layers over which it falls to its minimum, and that minimum; "
    "beyond the width nothing is taken out."
)


@dataclass(frozen=True)
class Ablation(WeightChange):
    """Take the refusal direction out of all that writes to the residual stream. The module says how."""

    name: ClassVar[str] = "ablation"
    needs: ClassVar[tuple[str, ...]] = ("harmful_prompts", "harmless_prompts")

    layer: int = field(
        default=-1,
        metadata=knob("The layer whose direction is taken out of all layers, from 0, or from the last, -1.", Layers()),
    )
    own_directions: bool = field(
        default=False,
        metadata=knob(
            "Take its own direction out of every layer; out of embeddings that of the first.", Choice((False, True))
        ),
    )
    attention_scale: list[float] = field(
        default_factory=lambda: [1.0], metadata=knob(_SCALE % "attention modules", Range(0.0, 1.5))
    )
    mlp_scale: list[float] = field(default_factory=lambda: [1.0], metadata=knob(_SCALE % "MLPs", Range(0.0, 1.5)))
    embedding_scale: float = field(
        default=1.0, metadata=knob("How much of it is taken out of embeddings.", Choice((0.0, 1.0)))
    )
    keep_norms: bool = field(
        default=False,
        metadata=knob(
            "Give every row of a matrix in a layer, which makes one dimension of the stream, its norm back.",
            Choice((False, True)),
        ),
    )
    unit_residuals: bool = field(
        default=False,
        metadata=knob(
            "Scale what a prompt leaves in the stream to length 1 before means are taken, so that none weighs more.",
            Choice((False, True)),
        ),
    )
    project_harmless: bool = field(
        default=False,
        metadata=knob(
            "Take a direction's part along the mean of harmless prompts out of it first.", Choice((False, True))
        ),
    )
    rank: int = field(
        default=1,
        metadata=knob(
            "How many directions: the difference of means, then what harmful prompts differ in beside it.",
            Choice((1, 2, 4)),
        ),
    )
    repeat: int = field(
        default=1,
        metadata=knob(
            "How many times: each time directions are found on what the last time has left.", Choice((1, 2, 3))
        ),
    )
    writes: str | None = field(default=None, metadata=knob(WRITES_HELP))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rank", "repeat")
        for name in ("attention_scale", "mlp_scale"):
            kernel = getattr(self, name)
            if len(kernel) not in (1, 4) or (len(kernel) == 4 and not kernel[2] > 0):
                raise InputError(
                    f"--{name} takes one number, or four: maximum, layer, width above 0, minimum; got {kernel}"
                )

    def displace(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Displaced:
        """As for `Displacement`. It warns of an architecture on which it is weaker than on others."""
        self.require(attacker)
        self.warn_of_what_is_left(model)
        return super().displace(model, attacker)

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. All prompts go through the model as often as it is repeated."""
        self.require(attacker)
        found = writers(model, self.writes)
        norms = post_norms(model, found)
        changes, cost = self._once(model, attacker, found, norms)
        for _ in range(self.repeat - 1):
            with changed(model, changes):
                more, further = self._once(model, attacker, found, norms)
            changes, cost = composed(changes, more), cost + further
        return Found(changes, cost)

    def warn_of_what_is_left(self, model: PreTrainedModel | PeftModel) -> None:
        """Warn where a direction stays in the stream though it is taken out of all that is known to write there.

        A few tokens go through the model.
        """
        found = writers(model, self.writes)
        if not isinstance(model, PeftModel):
            left = left_along(model, found, post_norms(model, found))
            if left > HARDLY_NOTHING:
                logger.warning(
                    "%.0f%% of a direction stays in the residual stream of a %s when it is taken out of all that is "
                    "known to write there, so ablation is weaker on it than on others, and a defense looks stronger "
                    "than it is",
                    100 * left,
                    type(model).__name__,
                )

    def _once(
        self,
        model: PreTrainedModel | PeftModel,
        attacker: Attacker,
        found: Sequence[Writer],
        norms: Mapping[str, PostNorm],
    ) -> Found:
        harmful, cost = last_tokens(model, attacker.harmful_prompts or (), attacker)
        harmless, more = last_tokens(model, attacker.harmless_prompts or (), attacker)
        directions = self.directions(harmful, harmless)
        chosen, parameters = layer_number(self.layer, harmful.shape[1]), dict(model.named_parameters())
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for writer in found:
            scale = self._scale(writer)
            if scale != 0:
                own = directions[(writer.layer or 0) if self.own_directions else chosen]
                if (norm := norms.get(writer.name)) is not None:
                    if (bias := f"{norm.path}.bias") in parameters:
                        changes[bias] = functools.partial(ablate, directions=own, dim=0, scale=scale)
                    own = norm.before(own)
                keep = self.keep_norms and writer.kind != "embedding" and not writer.is_bias
                changes[writer.name] = functools.partial(ablate, directions=own, dim=writer.dim, scale=scale, keep=keep)
        return Found(changes, cost + more)

    def directions(self, harmful: Tensor, harmless: Tensor) -> dict[int, Tensor]:
        """The directions R of the layers that they are taken of.

        Args:
            harmful: (prompts, layers, width), what harmful prompts leave at their last tokens.
            harmless: The same of harmless ones.

        Returns:
            (rank, width) by layer, of unit length and at right angles.

        Raises:
            InputError: There are not so many directions: prompts leave the same behind, or there are too few.
        """
        layers = harmful.shape[1]
        used = range(layers) if self.own_directions else [layer_number(self.layer, layers)]
        return {number: self._directions(harmful[:, number], harmless[:, number], number) for number in used}

    def _directions(self, harmful: Tensor, harmless: Tensor, layer: int) -> Tensor:
        if self.unit_residuals:
            harmful, harmless = (nn.functional.normalize(rows, dim=1, eps=TINY) for rows in (harmful, harmless))
        mean = harmless.mean(0)
        difference, rows = harmful.mean(0) - mean, harmful - mean
        if self.project_harmless:
            along = nn.functional.normalize(mean, dim=0, eps=TINY)
            difference, rows = _without(difference, along), _without(rows, along)
        if not difference.norm() > TINY:
            raise InputError(
                f"harmful and harmless prompts leave the same in the residual stream after layer {layer}, so it "
                "has no direction to take out; expected prompts of two kinds, and finite weights"
            )
        r: Tensor = difference / difference.norm()
        if self.rank == 1:
            return r[None]
        rest = _without(rows, r)
        if not self.rank - 1 <= (count := int(torch.linalg.matrix_rank(rest))):
            raise InputError(
                f"--rank {self.rank}: what harmful prompts leave after layer {layer} has {count + 1} directions; "
                "expected at least as many, and so more prompts than directions"
            )
        principal: Tensor = torch.linalg.svd(rest, full_matrices=False).Vh
        return torch.cat([r[None], principal[: self.rank - 1]])

    def _scale(self, writer: Writer) -> float:
        if writer.layer is None:
            return self.embedding_scale
        return kernel_at(self.attention_scale if writer.kind == "attention" else self.mlp_scale, writer.layer)


def kernel_at(kernel: Sequence[float], layer: int) -> float:
    """The scale at a layer: the one number, or maximum − (maximum − minimum)·|layer − position| / width, 0 beyond.

    Args:
        kernel: One number; or maximum, position, width and minimum.
        layer: The layer, from 0.
    """
    if len(kernel) == 1:
        return kernel[0]
    maximum, position, width, minimum = kernel
    distance = abs(layer - position)
    return maximum - (maximum - minimum) * distance / width if distance <= width else 0.0


def ablate(weight: Tensor, *, directions: Tensor, dim: int, scale: float, keep: bool = False) -> Tensor:
    """W − s·R RᵀW.

    Args:
        weight: A matrix, stacked matrices or a bias.
        directions: R, (rank, width), of unit length and at right angles.
        dim: The weight's dimension that runs over the residual stream.
        scale: s.
        keep: Give each slice of the weight at one place of that dimension its norm back; one of zeros stays so.

    Returns:
        The new weight, of the same shape.
    """
    r = directions.to(weight)
    rows = weight.movedim(dim, -1)
    new = (rows - scale * (rows @ r.T) @ r).movedim(-1, dim)
    if keep:  # of stacked matrices each by itself
        along = [d for d in range(weight.dim()) if d != dim][-1]
        norms = [w.norm(dim=along, keepdim=True) for w in (weight, new)]
        new = new * (norms[0] / norms[1].clamp(min=TINY))
    return new


@torch.no_grad()
def last_tokens(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Prompt], attacker: Attacker
) -> tuple[Tensor, Cost]:
    """What every decoder layer hands on at the last token of every prompt.

    Args:
        model: A causal language model, which runs without dropout.
        prompts: Text or messages each.
        attacker: How prompts become token ids, and how many go through at a time.

    Returns:
        (prompts, layers, width) in float32 on the CPU, the longest prompt first, and what it cost.

    Raises:
        InputError: A prompt cannot be used with this model or tokenizer.
    """
    limits, ids = Limits.of(model), prompt_tokens(model, prompts, attacker.written)
    pad = limits.padding(attacker.written.tokenizer.pad_token_id, attacker.written.tokenizer.eos_token_id)
    batches = list(padded_batches(ids, attacker.batch_size, pad))
    layers = decoder_layers(model)
    left: list[list[Tensor]] = [[] for _ in layers]
    last: Tensor

    def note(number: int, _: nn.Module, __: Any, output: Any) -> None:
        stream = first_of(output)
        left[number].append(stream[torch.arange(len(last), device=stream.device), last.to(stream.device)].float().cpu())

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(functools.partial(note, number)).remove)
        stack.enter_context(eval_mode(model))
        for batch in batches:
            last = batch["attention_mask"].sum(1) - 1
            model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    return torch.stack([torch.cat(rows) for rows in left], 1), passes(model, batches)


def prompt_tokens(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Prompt],
    written: ChatFormat,
    places: Sequence[str] | None = None,
) -> list[list[int]]:
    """The token ids of prompts.

    Args:
        model: What is to read them.
        prompts: Text or messages each.
        written: How they become token ids.
        places: What messages call each; by default by its number.

    Raises:
        InputError: A prompt cannot be used with this model or tokenizer.
    """
    limits, ids = Limits.of(model), written.encode_prompts(prompts)
    for where, tokens in zip(places or [f"prompt {row}" for row in range(1, len(ids) + 1)], ids, strict=True):
        limits.check_tokens(tokens, where)
        limits.check_length(len(tokens), where)
    return ids


def _without(rows: Tensor, unit: Tensor) -> Tensor:
    """Rows without their part along a direction of unit length."""
    return rows - (rows @ unit)[..., None] * unit
