"""What writes to the residual stream of a decoder, found by structure on transformers' architectures.

Attention, or what a hybrid model has in its place, and the feed-forward network add their outputs to the stream through
a matrix each, every expert through one of its own; embeddings begin it. Each is named as the parameter that it is, with
the dimension that runs over the stream: in a `Linear` the first of (out, in), in GPT-2's `Conv1D` the last of (in,
out), in an embedding the last of (tokens, width), in experts the second of (experts, out, in), or the last where they
are stored the other way round. In a LoRA adapter it is the factor B of each of these matrices, in (out, rank): what the
adapter itself writes, beside a base that is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.errors import InputError
from holdfast.layers import token_mixers
from holdfast.parameters import trainable_parameters

Kind = Literal["attention", "mlp", "embedding"]

WRITING = (
    r"(^|\.)(o_proj(\.linear)?|o_b_proj|out_proj|output_linear|dense|c_proj|[Ww]o|"
    r"down_proj|proj_down|fc_out|fc2|w2|dense_4h_to_h)$"
)
"""What transformers' architectures call the module, or the experts' parameter, that writes to the stream.

Llama, Qwen, Mistral, Gemma and most others; DeepSeek V4; OPT, Phi, LFM2; GPT-2, Starcoder; GPT-J; ModernBERT's decoder;
GPT-NeoX, Falcon, BLOOM, Persimmon; xLSTM; Granite's hybrids.
"""

WRITES_HELP = (
    "Regular expression that is searched for in the names of modules, and finds those that write to the residual "
    "stream; if not given, what transformers' architectures call them."
)
"""What the knob says by which an attack is told of others."""


class Writer(NamedTuple):
    """A parameter that writes to the residual stream.

    Attributes:
        name: As `named_parameters` has it.
        kind: What it belongs to.
        layer: The number of its decoder layer, from 0; None for embeddings.
        dim: Its dimension that runs over the stream.
        is_bias: Whether it is a bias, which is added to the stream as it is.
    """

    name: str
    kind: Kind
    layer: int | None
    dim: int
    is_bias: bool


def decoder_layers(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The decoder layers, in the model's order; the stream runs from one's output to the next.

    Raises:
        InputError: None are found.
    """
    names = list(token_mixers(model))
    if not names:
        raise InputError(f"no decoder layers are found in a {type(model).__name__}, which attacks and retention go by")
    return [model.get_submodule(name) for name in names]


def layer_number(layer: int, count: int) -> int:
    """The number of a layer that may be counted from the last, -1.

    Raises:
        InputError: There is no such layer.
    """
    if not -count <= layer < count:
        raise InputError(f"there is no layer {layer}: the model has {count} layers, numbered from 0 to {count - 1}")
    return layer % count


def layer_matrices(model: PreTrainedModel | PeftModel) -> list[str]:
    """The names of all matrices in decoder layers, stacked ones included; of an adapter its own, which are trained."""
    inside, alone = places(model), isinstance(model, PeftModel)
    return [
        name
        for name, p in _parameters(model).items()
        if inside[name].layer is not None and p.dim() > 1 and (p.requires_grad or not alone)
    ]


def writers(model: PreTrainedModel | PeftModel, pattern: str | None = None, *, nameable: bool = True) -> list[Writer]:
    """Everything that writes to the residual stream, layer by layer and then the embeddings.

    Args:
        model: A causal language model of transformers, sharded by FSDP2 or not; or a LoRA adapter on one, of which what
            it adds itself is found.
        pattern: A regular expression, searched for in the names of modules and of experts' parameters in the decoder
            layers; by default `WRITING`.
        nameable: Whether who reads an error could have given a pattern, with --writes.

    Returns:
        The writers. A matrix counts if one of its dimensions is as wide as the stream where it should be.

    Raises:
        InputError: A module that mixes tokens, or a feed-forward network, has no matrix that is known to write to the
            stream; one is quantized; it cannot be told which dimension of experts runs over the stream; or
            the pattern is not a regular expression.
    """
    wanted = _compiled(pattern)
    width = model.get_input_embeddings().weight.shape[1]
    names = {id(parameter): name for name, parameter in _parameters(model).items()}
    found: list[Writer] = []
    for number, (layer, mixers) in enumerate(token_mixers(model).items()):
        matrices = _adapted if isinstance(model, PeftModel) else _matrices
        candidates = list(matrices(model.get_submodule(layer), layer, width))
        blocks: dict[str, Kind] = {**dict.fromkeys(mixers, "attention"), layer: "mlp"}
        for block, kind in blocks.items():
            inside = [c for c in candidates if (_within(c.path, mixers) or layer) == block]
            writing = [c for c in inside if c.width == width and wanted.search(c.path)]
            if inside and not writing and not isinstance(model, PeftModel):
                raise InputError(
                    f"no matrix in {block} is known to write to the residual stream ({inside[-1].path} is one of "
                    f"{len(inside)} in it)"
                    + ("; name those that do by a regular expression with --writes" if nameable else "")
                )
            for one in writing:
                found += _as_writers(one, kind, number, names)
    if not found:
        raise InputError(
            f"nothing that writes to the residual stream is found in a {type(model).__name__}"
            + (f" by --writes {pattern}" if pattern is not None else "")
            + (
                ": its adapter is on other modules; expected one on those, too, as --lora_target_modules all-linear "
                "makes it"
                if isinstance(model, PeftModel)
                else ""
            )
        )
    if isinstance(model, PeftModel):
        return found
    in_layers = {module for layer in decoder_layers(model) for module in layer.modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module not in in_layers and module.weight.shape[1] == width:
            found.append(Writer(_name(module.weight, f"{path}.weight", names), "embedding", None, 1, False))
    return found


class Place(NamedTuple):
    """Where a parameter belongs.

    Attributes:
        kind: To a token mixer, to the rest of a decoder layer, its norms included, or to what lies outside of all.
        layer: The number of its decoder layer, from 0; None outside.
    """

    kind: Literal["attention", "mlp", "outside"]
    layer: int | None


def places(model: PreTrainedModel | PeftModel) -> dict[str, Place]:
    """Where every parameter belongs, by its name."""
    layers = token_mixers(model)
    found = {}
    for name in _parameters(model):
        layer = _within(name, list(layers))
        if layer is None:
            found[name] = Place("outside", None)
        else:
            mixes = _within(name, layers[layer]) is not None
            found[name] = Place("attention" if mixes else "mlp", list(layers).index(layer))
    return found


class _Matrix(NamedTuple):
    """A matrix in a decoder layer: its path, the width of what it writes, and its parameters with their dimensions."""

    path: str
    width: int
    parts: list[tuple[str, Tensor, int, bool]]


def _matrices(layer: nn.Module, prefix: str, width: int) -> Iterator[_Matrix]:
    for inner, module in layer.named_modules():
        path = f"{prefix}.{inner}"
        if isinstance(module, nn.Linear | Conv1D):
            dim = 1 if isinstance(module, Conv1D) else 0
            parts = [(f"{path}.weight", module.weight, dim, False)]
            if module.bias is not None:
                parts.append((f"{path}.bias", module.bias, 0, True))
            yield _Matrix(path, module.weight.shape[dim], parts)
        else:
            yield from _experts(module, path, width)


def _adapted(layer: nn.Module, prefix: str, width: int) -> Iterator[_Matrix]:
    """What an adapter adds to matrices; each under the name of what it is added to."""
    for inner, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            for name, factor in module.lora_B.items():
                path = f"{prefix}.{inner}"
                yield _Matrix(path, factor.weight.shape[0], [(f"{path}.lora_B.{name}.weight", factor.weight, 0, False)])


def _experts(module: Any, path: str, width: int) -> Iterator[_Matrix]:
    """Experts hold all matrices of a kind in one parameter of (experts, …, …), and their biases in (experts, …)."""
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        if parameter.dim() != 3 or not re.search(WRITING, name):
            continue
        if (is_transposed := getattr(module, "is_transposed", None)) is None:
            fits = [dim for dim in (1, 2) if parameter.shape[dim] == width]
            if len(fits) != 1:
                raise InputError(
                    f"{path}.{name} has the shape {tuple(parameter.shape)}, of which it cannot be told which dimension "
                    f"runs over the residual stream of width {width}"
                )
            dim = fits[0]
        else:
            dim = 2 if is_transposed else 1
        parts = [(f"{path}.{name}", parameter, dim, False)]
        if (bias := own.get(f"{name}_bias")) is not None:
            parts.append((f"{path}.{name}_bias", bias, 1, True))
        yield _Matrix(f"{path}.{name}", parameter.shape[dim], parts)


def _as_writers(matrix: _Matrix, kind: Kind, layer: int, names: dict[int, str]) -> Iterator[Writer]:
    for path, parameter, dim, is_bias in matrix.parts:
        yield Writer(_name(parameter, path, names), kind, layer, dim, is_bias)


def _name(parameter: Tensor, path: str, names: dict[int, str]) -> str:
    """The name under which a parameter is trained; tied ones have another's."""
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise InputError(f"{path} is quantized; load the model unquantized to attack it")
    return names[id(parameter)]


def _parameters(model: PreTrainedModel | PeftModel) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones once; under FSDP2 the shards."""
    trainable_parameters(model)  # drops weights that were gathered for a forward pass
    return dict(model.named_parameters())


def _within(path: str, modules: list[str]) -> str | None:
    """The module among these that a parameter or another module is part of."""
    return next((module for module in modules if path.startswith(f"{module}.")), None)


def _compiled(pattern: str | None) -> re.Pattern[str]:
    try:
        return re.compile(WRITING if pattern is None else pattern)
    except re.error as error:
        raise InputError(f"--writes {pattern!r} is not a regular expression ({error})") from error
