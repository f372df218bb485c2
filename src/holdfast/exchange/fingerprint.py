"""What the jobs of an exchange must have in common, in a few short hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from holdfast.models import base_model
from holdfast.parameters import trainable_parameters

# What every config holds (paths, dtype, what to output), and settings that leave the trained function alone but that
# trainers change or loading loses.
_INCIDENTAL = {*PreTrainedConfig().to_dict(), "use_cache", "initializer_range"} - {"model_type"}


def fingerprint_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    exchanged: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """What weights from another job must fit: 16 hexadecimal digits of a SHA-256 for each part.

    Neither the values of weights nor their dtype or sharding have a part in it, so a model in memory, in a folder and
    spread over devices has one fingerprint.

    Args:
        model: As it is trained: an adapter's parameters count.
        tokenizer: Its tokenizer.
        exchanged: What is exchanged instead of what is trained: all parameters of the model below an adapter.

    Returns:
        "model" (architecture, and names and shapes of all parameters), "tokenizer" (vocabulary and chat template) and
        "trained parameters" (names and shapes of those that training moves).
    """
    trained = trainable_parameters(model)  # drops gathered weights, so that no shard is missed below
    architecture = _architecture(base_model(model).config.to_dict())
    return {
        "model": _hash([architecture, _shapes(exchanged or dict(model.named_parameters()))]),
        "tokenizer": _hash([tokenizer.get_vocab(), tokenizer.chat_template]),
        "trained parameters": _hash(_shapes(exchanged or trained)),
    }


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _architecture(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not (key in _INCIDENTAL or key.startswith("_") or key.endswith("_token_id") or "drop" in key)
    }


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in parameters.items()}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
