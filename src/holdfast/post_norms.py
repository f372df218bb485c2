"""Norms that stand between what writes to the residual stream and the stream, as in Gemma 2 and later and OLMo 2.

There what arrives in the stream is not the output a = W h of a matrix, but

    y = g ⊙ a / rms(a),    or of a LayerNorm    y = g ⊙ (a − mean a) / std(a) + b.

They are found by what they are given when a token goes through the model: the very output of a module that writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.errors import InputError
from holdfast.models import eval_mode
from holdfast.residual import Writer, decoder_layers


class PostNorm(NamedTuple):
    """A norm behind a writer.

    Attributes:
        path: Of its module.
        gain: g, (width,), in float32 on the CPU.
        centred: Whether it takes the mean out first.
        offset: g − weight, 1 in Gemma and 0 elsewhere.
    """

    path: str
    gain: Tensor
    centred: bool
    offset: float

    def before(self, directions: Tensor) -> Tensor:
        """What to take out of a, so that y has no part along some directions, but for a LayerNorm's b.

        r·y is (g ⊙ r)·a, or the centred g ⊙ r times a, but for a factor.

        Args:
            directions: (count, width).

        Returns:
            (up to count, width), of unit length and at right angles.
        """
        rows = directions * self.gain.to(directions)
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        _, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
        found: Tensor = basis[lengths > torch.finfo(rows.dtype).eps * self.gain.abs().max()]
        return found


@torch.no_grad()
def post_norms(model: PreTrainedModel | PeftModel, found: Iterable[Writer]) -> dict[str, PostNorm]:
    """The norm behind every writer that has one, by the writer's name. One token goes through the model.

    Args:
        model: A causal language model, sharded by FSDP2 or not.
        found: What writes to the stream.

    Raises:
        InputError: A norm is of a kind that is not known, or the stream itself goes through one in a layer.
    """
    names = {module: path for path, module in model.named_modules()}
    layers = decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    outside = {m for m in names if m not in inside and m not in layers and next(m.children(), None) is None}
    outputs: dict[int, tuple[Tensor, str]] = {}  # by identity; held, so that no other tensor takes its place
    behind: dict[str, PostNorm] = {}

    def given(module: nn.Module, tensors: tuple[Any, ...]) -> None:
        if tensors and id(tensors[0]) in outputs and _is_norm(module):
            behind[outputs[id(tensors[0])][1]] = _measured(module, names[module], tensors[0].shape[-1])

    def gave(module: nn.Module, _: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if (
            isinstance(tensor, Tensor) and "residual" not in inspect.signature(module.forward).parameters
        ):  # or it adds it
            outputs[id(tensor)] = tensor, names[module]

    def begun(*_: Any) -> None:
        outputs.clear()  # what a layer is given is the stream

    def ended(layer: nn.Module, _: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if (source := outputs.get(id(tensor))) is not None and _is_norm(model.get_submodule(source[1])):
            raise InputError(
                f"the residual stream itself goes through a norm, {source[1]}, so nothing is taken out of it for good "
                "by what is written to it; expected a model whose layers add to the stream"
            )

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(begun).remove)
            stack.callback(layer.register_forward_hook(ended).remove)
        for module in inside | outside:
            stack.callback(module.register_forward_pre_hook(given).remove)
            stack.callback(module.register_forward_hook(gave).remove)
        stack.enter_context(eval_mode(model))
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=token, use_cache=False)
    return {
        writer.name: norm for writer in found for path, norm in behind.items() if writer.name.startswith(f"{path}.")
    }


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("norm")


def _measured(module: nn.Module, path: str, width: int) -> PostNorm:
    """A norm, known by what it does to vectors."""
    weight = getattr(module, "weight", None)
    like = next(module.parameters(), torch.empty(0))
    ones = torch.ones(width, device=like.device, dtype=like.dtype)
    draw = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(ones)
    centred = isinstance(module, nn.LayerNorm)
    at_zero = module.forward(0 * ones)
    gain = (torch.ones_like(ones) if weight is None else weight) if centred else module.forward(ones)
    told = gain * nn.functional.layer_norm(draw, [width]) if centred else gain * nn.functional.rms_norm(draw, [width])
    if not torch.allclose((module.forward(draw) - at_zero).float(), told.float(), rtol=0.05, atol=0.05):
        raise InputError(
            f"{path}, a {type(module).__name__}, stands between what a layer writes and the residual stream, and is "
            "neither an RMS norm nor a LayerNorm, so it cannot be told what to take out before it"
        )
    offset = 0.0 if weight is None else round((gain - weight).float().mean().item())
    return PostNorm(path, gain.float().cpu(), centred, offset)
