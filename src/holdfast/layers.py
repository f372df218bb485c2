"""Parts of transformers' architectures, found by structure, such as routers; and what is put on modules for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

# What tells of other tokens. No feed-forward network takes any of these.
_OF_OTHER_TOKENS = {"attention_mask", "cache_params", "past_key_values", "layer_past"}


def token_mixers(model: PreTrainedModel | PeftModel) -> dict[str, list[str]]:
    """The token mixers of every decoder layer: attention, and what hybrid models have in its place.

    Linear attention (Qwen3-Next, Qwen3.5), convolutions (LFM2) and state-space mixers (Jamba, Mamba) are told from
    feed-forward networks by what their `forward` takes: a mask or a cache.

    Args:
        model: A causal language model of transformers, with an adapter or without.

    Returns:
        The name of every decoder layer → the names of the outermost such modules in it, both in the model's order.
        Most architectures have one in every layer; Falcon-H1 has two side by side, Nemotron-H has layers without any.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = _decoder_layers(model.get_decoder()) or _decoder_layers(model)  # ModernBERT calls its head a decoder
    return {names[layer]: [names[mixer] for mixer in _outermost(layer, _mixes_tokens)] for layer in layers}


def has_routers(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model has the routers of experts, as far as transformers says where those are.

    Jamba, Granite, Ernie and Doge come without experts, too; their configurations ask for their loss all the same.
    """
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    if not isinstance(recorder, OutputRecorder):
        return True
    return any(isinstance(module, recorder.target_class) for module in model.modules())


def first_of(output: Any) -> Any:
    """The tensor that a module hands on: some architectures' give a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Call `hook(module, inputs, output)` behind each of these modules in the body.

    Args:
        modules: Whose outputs are looked at, or changed.
        hook: As `register_forward_hook` takes it: what it returns takes the output's place, None leaves that alone.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def forwards_restored(model: nn.Module) -> Iterator[None]:
    """Give every module back the `forward` that it had, whatever the body puts in its place.

    A trainer of TRL puts a fused head there, and accelerate a cast to float32, around what it finds: on a model that is
    trained again and again they would nest, until calling it exceeds Python's depth.
    """
    names = ("forward", "_original_forward")
    before = {
        module: {name: vars(module)[name] for name in names if name in vars(module)} for module in model.modules()
    }
    try:
        yield
    finally:
        for module, found in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(found)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    return _outermost(model, lambda module: isinstance(module, GradientCheckpointingLayer))


def _outermost(inside: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules below one that are wanted, without what lies in them."""
    found: list[nn.Module] = []
    for child in inside.children():
        found += [child] if wanted(child) else _outermost(child, wanted)
    return found


def _mixes_tokens(module: nn.Module) -> bool:
    return not _OF_OTHER_TOKENS.isdisjoint(inspect.signature(type(module).forward).parameters)
