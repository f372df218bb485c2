"""Antidote (2408.09600): after fine-tuning, take out the weights that harmful data uses most.

One shot, without training. Harmful prompts with harmful answers go once through the model as it is; X holds the inputs
that a targeted linear layer of weight W (rows × columns) then sees, one row for every token, those of the prompt
included. By Wanda's score,

    score = |W| · ‖X_column‖₂,    and in every row of W the columns − ⌊columns·(1 − ratio)⌋ highest become 0.

Targets, as in the paper: the matrices of a LoRA adapter at ratio 0.1, or the query, key and value projections of a full
model at ratio 1e-5, which is one weight a row. Of ‖X_column‖₂ only a running sum of squares is kept.

Our own addition: with the model as it was before fine-tuning, harmful weights take its values instead of 0.

Examples:
    A fine-tuned model, repaired in place::

        repair = prune_harmful(model, [tokenizer(texts, padding=True, return_tensors="pt")])
        repair.total                                              # weights that are 0 now
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.errors import InputError
from holdfast.layers import token_mixers
from holdfast.models import eval_mode

logger = logging.getLogger(__name__)

#: Ratios of the paper's scripts: 0.01 to 0.2 on adapters, 0.1 being the usual one.
LORA_RATIO, FULL_RATIO = 0.1, 1e-5

_LORA = re.compile(r"\.lora_[AB]\.[^.]+$")
# Separate (Llama, Qwen, Mistral, Gemma, OPT, GPT-J), fused (Phi-3; GPT-NeoX, Falcon, BLOOM; GPT-2; MPT, DBRX), and the
# low-rank factors that DeepSeek's are made of; of linear attention (Qwen3.5; Qwen3-Next, with its gate).
_QUERY_KEY_VALUE = re.compile(
    r"(^|\.)([qkv]_proj|qkv_proj|query_key_value|c_attn|Wqkv|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|in_proj_qkvz?)$"
)


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        ratio: The share of every row that was pruned, before it was rounded up to whole weights.
        tokens: Harmful tokens that went through the model, without padding.
        pruned: Harmful weights found in every targeted layer, which now are 0 or the aligned model's.
        weights: How many weights each of these layers has.
    """

    ratio: float
    tokens: int
    pruned: dict[str, int]
    weights: dict[str, int]

    @property
    def total(self) -> int:
        """Harmful weights in all layers."""
        return sum(self.pruned.values())


def check_ratio(ratio: float) -> None:
    """Raise InputError if `ratio` is not a share of weights that can be pruned."""
    if not 0 < ratio < 1:
        raise InputError(f"--ratio must lie between 0 and 1, both excluded, got {ratio}")


def pruned_per_row(columns: int, ratio: float) -> int:
    """Weights pruned of a row: columns − ⌊columns·(1 − ratio)⌋, `ratio` taken as the decimal number it is written as.

    So 1e-5 prunes one weight of any row up to 100 000 columns, and 0.1 prunes 10 of 100. In floating point 1 − 0.9
    falls short of 0.1, and the ratio 0.9 would prune 91 of 100.

    Raises:
        InputError: The ratio is outside (0, 1).
    """
    check_ratio(ratio)
    return math.ceil(columns * Fraction(str(ratio)))  # the same number: columns is whole


def wanda_mask(weight: Tensor, inputs: Tensor, ratio: float) -> Tensor:
    """The weights that these inputs use most, row by row.

    Args:
        weight: (rows, columns); every row makes one output.
        inputs: (tokens, columns), or with more dimensions in front, as (batch, length, columns): what the layer saw.
        ratio: Share of every row to take, rounded up.

    Returns:
        (rows, columns), True where a weight is harmful. Of equal scores the later columns are taken.

    Raises:
        InputError: The ratio is outside (0, 1), the shapes do not fit, or weight or inputs hold numbers that are not
            finite.
    """
    if weight.dim() != 2 or inputs.dim() < 2 or inputs.shape[-1] != weight.shape[1]:
        raise InputError(
            f"inputs of shape {tuple(inputs.shape)} do not fit a weight of shape {tuple(weight.shape)}; expected (…, "
            "tokens, columns) and (rows, columns)"
        )
    squares = _sum_of_squares(inputs)
    _require_finite(squares, "inputs")
    _require_finite(weight, "weight")
    return _harmful(weight, squares, ratio)


@torch.no_grad()
def prune_harmful(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ratio: float | None = None,
    targets: str | None = None,
    aligned: PreTrainedModel | PeftModel | None = None,
) -> Repair:
    """Repair a model in place. Nothing is changed before all batches have gone through, nor if an error is raised.

    Args:
        model: A model, or one with a LoRA adapter. Of the latter only the adapter is repaired (merge it first to repair
            the whole). It runs without dropout.
        batches: Harmful prompts with their harmful answers, tokenised: `input_ids` and `attention_mask`, both
            (batch, length), the mask 0 on padding. They are gone through once.
        ratio: Share of every row to prune, rounded up to whole weights; by default 0.1 on an adapter and 1e-5 on a full
            model.
        targets: A regular expression, searched for in the names of linear layers; by default an adapter's matrices, or
            the query, key and value projections of a full model.
        aligned: The model, or the adapter, as it was before fine-tuning: harmful weights take its values instead of 0.

    Returns:
        What was pruned. A layer that saw no token has nothing harmful in it and is left as it is, with a warning.

    Raises:
        InputError: The ratio is outside (0, 1); the targets match no layer, or one whose weight is tied or quantized or
            that does not see one input per token; without targets, a hybrid model's layer has no query, key or value
            projection; the aligned model is of another kind; the batches are empty, or lack a mask; weights or inputs
            are not finite.
    """
    is_lora = _is_lora(model)
    ratio = ratio if ratio is not None else LORA_RATIO if is_lora else FULL_RATIO
    check_ratio(ratio)
    layers = _targets(model, targets)
    replacements = None if aligned is None else _counterparts(model, aligned, layers)
    squares, tokens = _run(model, layers, batches)
    for name, layer in layers.items():
        _require_finite(layer.weight, f"weight of {name}")
        if name in squares:
            _require_finite(squares[name], f"inputs of {name}")

    pruned = dict.fromkeys(layers, 0)
    for name in squares:
        weight = _matrix(layers[name])
        harmful = _harmful(weight, squares[name], ratio)
        if replacements is None:
            weight.masked_fill_(harmful, 0)
        else:
            weight.copy_(torch.where(harmful, replacements[name].to(weight), weight))
        pruned[name] = int(harmful.sum())
    unseen = layers.keys() - squares.keys()
    if unseen:
        logger.warning("%d layers saw no token and were left as they are (%s, ...)", len(unseen), min(unseen))
    return Repair(ratio, tokens, pruned, {name: layer.weight.numel() for name, layer in layers.items()})


def _sum_of_squares(inputs: Tensor) -> Tensor:
    """(…, tokens, columns) → (columns,), in float32 at least."""
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32)).square().flatten(0, -2).sum(0)


def _harmful(weight: Tensor, squares: Tensor, ratio: float) -> Tensor:
    """The mask, from ‖X_column‖₂² for every column."""
    scores = weight.abs() * squares.sqrt()
    order = scores.sort(dim=1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, -pruned_per_row(weight.shape[1], ratio) :], True)


def _require_finite(tensor: Tensor, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise InputError(f"the {what} hold numbers that are not finite; mend the model, or load it in --dtype float32")


def _matrix(layer: Any) -> Tensor:
    """The weight as (rows, columns), sharing its memory; GPT-2's `Conv1D` holds it the other way round."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _is_lora(model: nn.Module) -> bool:
    return any(_LORA.search(name) for name in _linear_layers(model))


def _targets(model: nn.Module, targets: str | None) -> dict[str, Any]:
    """The layers to repair, by name."""
    candidates = _linear_layers(model)
    pattern = _QUERY_KEY_VALUE
    if _is_lora(model):
        candidates, pattern = {name: layer for name, layer in candidates.items() if _LORA.search(name)}, _LORA
    elif isinstance(model, PeftModel):
        raise InputError("the adapter has no LoRA matrices, which are what is repaired; merge it into its base first")
    if targets is not None:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"--targets {targets!r} is not a regular expression ({error})") from error
    layers = {name: layer for name, layer in candidates.items() if pattern.search(name)}
    if not layers:
        wanted = f"--targets {targets!r} matches" if targets is not None else "by default --targets matches"
        example = f"; one is {next(iter(candidates))}" if candidates else ""
        raise InputError(f"{wanted} no linear layer of the model{example}")
    if pattern is _QUERY_KEY_VALUE:
        _require_in_every_mixer(model, layers)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            raise InputError(f"--targets: the weight of {name} is tied to another layer's, which would change with it")
        if not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
            raise InputError(f"--targets: the weight of {name} is quantized; load the model unquantized")
    return layers


def _require_in_every_mixer(model: Any, layers: Mapping[str, Any]) -> None:
    """Hybrid models have convolutions or state-space mixers beside attention: whether to repair those is not known."""
    mixers = list(itertools.chain(*token_mixers(model).values()))
    without = [mixer for mixer in mixers if not any(name.startswith(f"{mixer}.") for name in layers)]
    if without:
        raise InputError(
            f"{len(without)} of the model's {len(mixers)} modules that mix tokens have no query, key or value "
            f"projection, as {without[0]}; name the layers to repair with --targets"
        )


def _counterparts(model: Any, aligned: Any, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The aligned model's weights for the layers to repair, as (rows, columns)."""
    kinds = ["a LoRA adapter" if _is_lora(one) else "a full model" for one in (model, aligned)]
    if kinds[0] != kinds[1]:
        raise InputError(f"--aligned_model is {kinds[1]}, but --model is {kinds[0]}; expected the same of both")
    for attribute, what in (("model_type", "architecture"), ("vocab_size", "vocabulary size")):
        found, expected = (getattr(one.config.get_text_config(), attribute) for one in (aligned, model))
        if found != expected:
            raise InputError(f"--aligned_model has the {what} {found}, but --model has {expected}")
    others = _linear_layers(aligned)
    matrices = {}
    for name, layer in layers.items():
        if name not in others:
            raise InputError(f"--aligned_model has no layer {name}, which --model has")
        matrices[name] = _matrix(others[name])
        found, expected = (tuple(matrix.shape) for matrix in (matrices[name], _matrix(layer)))
        if found != expected:
            raise InputError(f"--aligned_model has a {name} of shape {found}, but --model has one of {expected}")
        _require_finite(matrices[name], f"aligned weight of {name}")
    return matrices


def _run(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], int]:
    """Send harmful data through: ‖X_column‖₂² of every layer that saw any of it, and how many tokens there were."""
    squares: dict[str, Tensor] = {}
    is_token: Tensor

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            # (batch, length, columns), perhaps with a dimension of one head. What a router sends to an expert has two
            # dimensions, and so have DoRA's identity matrices: there, padding cannot be told from tokens.
            sizes, expected = ([size for size in shape if size > 1] for shape in (inputs.shape[:-1], is_token.shape))
            if inputs.dim() < 3 or sizes != expected:
                raise InputError(
                    f"--targets: {name} is given inputs of shape {tuple(inputs.shape)}, which are not one for every "
                    f"token of a batch of shape {tuple(is_token.shape)}; leave it out"
                )
            counted = is_token.flatten().to(inputs.device)
            seen = _sum_of_squares(inputs.reshape(-1, inputs.shape[-1])[counted])
            squares[name] = squares[name] + seen if name in squares else seen

        return hook

    tokens = 0
    device = next(model.parameters()).device
    hooks = [layer.register_forward_pre_hook(accumulate(name)) for name, layer in layers.items()]
    try:
        with eval_mode(model):
            for batch in batches:
                lacking = [name for name in ("input_ids", "attention_mask") if name not in batch]
                if lacking:
                    raise InputError(f"a batch of attack data lacks {' and '.join(lacking)}")
                attention_mask = batch["attention_mask"].to(device)
                is_token = attention_mask.bool()
                model(input_ids=batch["input_ids"].to(device), attention_mask=attention_mask, use_cache=False)
                tokens += int(is_token.sum())
    finally:
        for handle in hooks:
            handle.remove()
    if not tokens:
        raise InputError("the attack data have no tokens to find harmful weights with")
    if not squares:
        raise InputError(f"--targets: none of the {len(layers)} layers saw a token; an adapter must not be merged")
    return squares, tokens
