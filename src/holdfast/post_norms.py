"""Norms that stand between what writes to the residual stream and the stream, as in Gemma 2 and later and OLMo 2.

There what arrives in the stream is not the output a = W h of a matrix, but

    y = g ⊙ a / rms(a),    or of a LayerNorm    y = g ⊙ (a − mean a) / std(a) + b.

They are found by what they are given when tokens go through the model: the very output of a module that writes. And by
the same tokens it is measured whether the stream is made of nothing else than what is known to write to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.errors import InputError
from holdfast.layers import first_of
from holdfast.models import eval_mode
from holdfast.parameters import TINY
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
    """The norm behind every writer that has one, by the writer's name. A few tokens go through the model.

    Args:
        model: A causal language model, sharded by FSDP2 or not.
        found: What writes to the stream.

    Raises:
        InputError: A norm is of a kind that is not known.
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
        tensor = first_of(output)
        adds_itself = "residual" in inspect.signature(module.forward).parameters
        if isinstance(tensor, Tensor) and not adds_itself:
            outputs[id(tensor)] = tensor, names[module]

    def begun(*_: Any) -> None:
        outputs.clear()  # what a layer is given is the stream

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(begun).remove)
        for module in inside | outside:
            stack.callback(module.register_forward_pre_hook(given).remove)
            stack.callback(module.register_forward_hook(gave).remove)
        _run(stack, model)
    return {
        writer.name: norm for writer in found for path, norm in behind.items() if writer.name.startswith(f"{path}.")
    }


@torch.no_grad()
def left_along(model: PreTrainedModel, found: Iterable[Writer], norms: Mapping[str, PostNorm]) -> float:
    """How much of a direction is left in the stream where nothing writes along it; 0 where all is known that writes.

    It is more where layers do something else with the stream than add to it (BERT's norms, Doge's scaling, Gemma 3n's
    mixing), or where something writes that is no weight (XGLM's positions). A few tokens go through the model twice.

    Args:
        model: As for `post_norms`, without an adapter.
        found: What writes to the stream.
        norms: As from `post_norms`.

    Returns:
        The part along a random direction behind the layer where most is left, as a share of the whole stream's and
        of what it is without taking anything out.
    """
    parameters, width = dict(model.named_parameters()), model.get_input_embeddings().weight.shape[1]
    r = nn.functional.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(0)), dim=1)
    out_of = {id(parameters[w.name]): norms[w.name].before(r) if w.name in norms else r for w in found}
    biases = {norm.path for norm in norms.values() if norm.centred}

    def without(directions: Tensor, _: nn.Module, __: Any, output: Any) -> Any:
        tensor = first_of(output)
        if tensor.shape[-1] != width:
            return output
        rows = directions.to(tensor)
        tensor = tensor - (tensor @ rows.T) @ rows
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    def shares(takers: Mapping[nn.Module, Tensor]) -> Tensor:
        seen: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            stream = first_of(output).float().cpu()
            seen.append((stream @ r[0]).norm() / stream.norm().clamp(min=TINY))

        with ExitStack() as stack:
            for layer in decoder_layers(model):
                stack.callback(layer.register_forward_hook(note).remove)
            for module, directions in takers.items():
                stack.callback(module.register_forward_hook(functools.partial(without, directions)).remove)
            _run(stack, model)
        return torch.stack(seen)

    takers = {
        module: out_of[id(parameter)]
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if id(parameter) in out_of
    }
    takers |= {model.get_submodule(path): r for path in biases}
    return (shares(takers).max() / shares({}).max().clamp(min=TINY)).item()


def _run(stack: ExitStack, model: PreTrainedModel | PeftModel) -> None:
    """Send the first few tokens of the vocabulary through a model; of padding alone the stream may be empty."""
    stack.enter_context(eval_mode(model))
    tokens = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))
    model(input_ids=tokens[None].to(next(model.parameters()).device), use_cache=False)


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
