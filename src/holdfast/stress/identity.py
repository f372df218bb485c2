"""What was measured, by content: hashes of models, tokenizers, chat templates and data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from holdfast.data.load import fingerprint
from holdfast.errors import InputError
from holdfast.files import digest
from holdfast.hub import reason
from holdfast.models import base_of, load_tokenizer
from holdfast.stress.costs import canonical

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
)


def describe_model(source: str, *, base_model: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Say which model a source is, by what its files hold; the name of its folder has no part in it.

    Args:
        source: A model folder, an adapter folder (with which its base model counts) or a Hub id.
        base_model: What an adapter stands on instead of the base model that it names.
        revision: Of the Hub.

    Returns:
        `source`, `sha256` (configuration and weights), `tokenizer_sha256`, `template_sha256` (None without a chat
        template) and `parameters`, how many numbers the weight files hold.

    Raises:
        InputError: The source cannot be read.
    """
    tokenizer = load_tokenizer(source, base_model=base_model, revision=revision)
    base = base_of(source, base_model, revision)
    own_tokenizer = source if base is None or any(_files(source, _TOKENIZER[:1], revision)) else base
    template = tokenizer.chat_template
    return {
        "source": source,
        "sha256": _hash(_contents(source, base, revision)),
        "tokenizer_sha256": _hash({path.name: digest(path) for path in _files(own_tokenizer, _TOKENIZER, revision)}),
        "template_sha256": None if template is None else _hash(template),
        "parameters": _parameters(source, revision) + (0 if base is None else _parameters(base, None)),
    }


def describe_data(source: str, taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say which data a source is.

    Args:
        source: As typed.
        taken: What `load_rows` noted of it.

    Returns:
        `source`, `taken`, their `sha256` (see `holdfast.data.load.fingerprint`) and `rows`, how many were taken.
    """
    rows = sum(one["taken"] for one in taken)
    return {"source": source, "taken": list(taken), "sha256": fingerprint(taken), "rows": rows}


def _contents(source: str, base: str | None, revision: str | None) -> dict[str, Any]:
    """The digests of a model's files by name, and those of the model that an adapter stands on."""
    names = (CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME)
    own = {path.name: digest(path) for path in (*_files(source, names, revision), *_weights(source, revision))}
    return own if base is None else {"adapter": own, "base": _contents(base, None, None)}


def _weights(source: str, revision: str | None) -> list[Path]:
    """The weight files, as transformers and peft choose them."""
    for name in (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME):
        if found := list(_files(source, [name], revision)):
            return found
    for index in _files(source, [SAFE_WEIGHTS_INDEX_NAME], revision):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return list(_files(source, shards, revision))
    raise InputError(f"model {source} has no {SAFE_WEIGHTS_NAME}; expected weights in safetensors")


def _files(source: str, names: Sequence[str], revision: str | None) -> Iterator[Path]:
    """Those of these files that a model has; of the Hub they are fetched where its cache has none."""
    folder = Path(source).expanduser()
    for name in names:
        try:
            found = cached_file(
                str(folder) if folder.is_dir() else source,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as error:
            raise InputError(f"model {source}: {name} cannot be read ({reason(error)})") from error
        if found is not None:
            yield Path(found)


def _parameters(source: str, revision: str | None) -> int:
    total = 0
    for path in _weights(source, revision):
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"model {source}: {path.name} cannot be read ({reason(error)})") from error
    return total


def _hash(content: Any) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()
