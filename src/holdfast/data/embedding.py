"""Prompts as vectors: the mean of a model's last hidden state, kept beside the data for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from holdfast.data.formats import Conversation
from holdfast.data.limits import Limits
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.files import write_bytes
from holdfast.models import base_model, eval_mode

# What a file of embeddings holds; to be changed when the same model and prompts are to give other embeddings.
_CONTENT = "mean of the last hidden state, 1"
# Entries of a model's config that differ between a model in memory and the same model saved and loaded again, or that
# training changes, and that no hidden state depends on. (The precision is that of the weights.)
_BOOKKEEPING = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}

logger = logging.getLogger(__name__)


def embed_prompts(
    model: PreTrainedModel | PeftModel,
    written: ChatFormat,
    prompts: Sequence[Prompt | Conversation],
    *,
    batch_size: int = 32,
    data_file: Path | str | None = None,
) -> Tensor:
    """Embed prompts by the model itself: the mean, over a prompt's tokens, of its last hidden state.

    Prompts are sorted by length and padded on the right; padding takes no part. No logits are computed. May be called
    in the middle of training: train and eval modes are put back, gradients and random states are not touched.

    With `data_file`, the embeddings are kept in `<data file>.embeddings-<hash>.safetensors` beside it. The hash is
    over the prompts' tokens and the model's config, weights and adapters, so that nothing stale is ever used; a file
    that is damaged is computed anew, and where none can be written a warning says so.

    Args:
        model: A causal language model, also one with an adapter, or one that a TRL trainer holds.
        written: How the run writes prompts.
        prompts: As for `ChatFormat.encode_prompts`.
        batch_size: Prompts embedded at once.
        data_file: The file that the prompts are from. Without one, nothing is read or written.

    Returns:
        The embeddings in the order of the prompts, (n, width of the hidden state), in float32 on the CPU.

    Raises:
        InputError: If there are no prompts, the adapter is a learned prompt, or a prompt cannot be encoded or is longer
            than the model's positions; the row is named, counted from 1.
    """
    if not prompts:
        raise InputError("there are no prompts to embed; expected at least one")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise InputError(
            f"prompts cannot be embedded with an adapter of type {model.active_peft_config.peft_type.value}; "
            "expected one that changes the model's layers, such as LoRA"
        )
    ids, limits = written.encode_prompts(prompts), Limits.of(model)
    for row, tokens in enumerate(ids, 1):
        limits.check_tokens(tokens, f"prompt {row}")
        if limits.positions is not None and len(tokens) > limits.positions:
            raise InputError(f"prompt {row} has {len(tokens)} tokens, but the model has {limits.positions} positions")
    if data_file is None:
        return _embed(model, ids, batch_size)
    key = _key(model, ids)
    data_file = Path(data_file).expanduser()
    path = data_file.with_name(f"{data_file.name}.embeddings-{key[:16]}.safetensors")
    embeddings = _read(path, key)
    if embeddings is None:
        embeddings = _embed(model, ids, batch_size)
        _write(path, key, embeddings)
    return embeddings


def _embed(model: PreTrainedModel | PeftModel, ids: list[list[int]], batch_size: int) -> Tensor:
    """The embeddings of encoded prompts, (n, width)."""
    backbone = base_model(model).base_model
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    means = []
    # Without a terminal tqdm stays silent; one batch is done before a bar could be read.
    hide = True if len(ids) <= batch_size else None
    with torch.no_grad(), eval_mode(model):
        for start in tqdm(range(0, len(ids), batch_size), desc="embedding", unit="batch", leave=False, disable=hide):
            batch = [ids[row] for row in order[start : start + batch_size]]
            width = len(batch[-1])
            # Any token may pad, since none looks ahead and the mean leaves the padding out.
            padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in batch], device=model.device)
            lengths = torch.tensor([len(tokens) for tokens in batch], device=model.device)
            mask = torch.arange(width, device=model.device) < lengths[:, None]
            hidden = backbone(input_ids=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
            means.append((hidden.float() * mask[..., None]).sum(dim=1).div(lengths[:, None]).cpu())
    sorted_means = torch.cat(means)
    embeddings = torch.empty_like(sorted_means)
    embeddings[order] = sorted_means
    return embeddings


def _key(model: PreTrainedModel | PeftModel, ids: list[list[int]]) -> str:
    """A hash of everything that embeddings depend on, but for rounding."""
    base = base_model(model)
    config = {name: value for name, value in base.config.to_dict().items() if name not in _BOOKKEEPING}
    adapters = [
        (name, type(layer).__name__, layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    digest = hashlib.sha256()
    for part in (_CONTENT, type(base).__name__, config, adapters, ids):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {_digest(tensor)}\n".encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor's type, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, key: str) -> Tensor | None:
    """The embeddings of an earlier run, or None if there are none that are whole."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            recorded = file.metadata() or {}
            embeddings: Tensor = file.get_tensor("embeddings").clone()  # so that the file may change
        if recorded.get("seal") == _seal(key, embeddings):
            return embeddings
        problem = "is damaged"
    except (SafetensorError, OSError) as error:
        problem = f"cannot be read ({error})"
    logger.warning("%s %s; the embeddings are computed anew", path, problem)
    return None


def _write(path: Path, key: str, embeddings: Tensor) -> None:
    """Keep embeddings for later runs, if that is possible."""
    try:
        write_bytes(path, save({"embeddings": embeddings}, {"seal": _seal(key, embeddings)}))
    except OSError as error:
        logger.warning("%s cannot be written (%s); the embeddings are not kept", path, error.strerror)


def _seal(key: str, embeddings: Tensor) -> str:
    """What shows that a file holds the embeddings of this key, every bit of them."""
    return hashlib.sha256(f"{key} {_digest(embeddings)}".encode()).hexdigest()
