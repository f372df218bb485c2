"""Batched generation that leaves the model, the tokenizer and the random state as it found them."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from holdfast.data.limits import Limits
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.answers import Answer, decode_answer, hidden_tokens
from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.stopping import stop_tokens
from holdfast.models import base_model, eval_mode


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    decoding: Decoding,
    batch_size: int,
    seed: int = 0,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    raw_text: bool = False,
    opener: str = "",
    prefix: Tensor | None = None,
) -> list[Answer]:
    """Let a model answer prompts.

    Prompts are sorted by length, padded on the left and decoded with a key-value cache. How a pass rounds depends on
    the batch's shape, so near a tie a greedy answer depends on the batch that it was in: of eight by SmolLM2-135M,
    alone against together, none in float32, but five in bfloat16 (`benchmarks/batched_answers.py`). May be called in
    the middle of training: train and eval modes, generation settings and the random states of Python, NumPy and
    PyTorch are put back, and gradients are not touched.

    Args:
        model: A causal language model, also one with an adapter, or one that a TRL trainer holds.
        tokenizer: Its tokenizer. Without a pad token the end-of-sequence token pads; the tokenizer is not changed.
        prompts: Text or messages each. If the tokenizer has a chat template, text becomes one user turn.
        decoding: How to decode. The model's own generation settings play no part, except for its
            end-of-sequence tokens.
        batch_size: Prompts decoded at once.
        seed: Seed of sampling. Sampled answers depend on it and on the batch size.
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.
        raw_text: Take prompts as they stand, even if there is a chat template.
        opener: How every answer begins, in place of what the model would begin with.
        prefix: Vectors, (count, width), that stand before the embeddings of every prompt's tokens. A repetition penalty
            then does not see the prompt.

    Returns:
        The answers in the order of the prompts, without special tokens and surrounding white space, and apart from
        their reasoning. They begin with the opener, unless nothing follows it.

    Raises:
        InputError: If messages or a system prompt need a chat template that is not there, or a prompt is empty or
            has a token that the model does not know, or leaves no room for an answer within the model's positions; the
            row is named, counted from 1.
    """
    rendering: dict[str, Any] = {
        "system_prompt": system_prompt,
        "chat_template_kwargs": chat_template_kwargs,
        "raw_text": raw_text,
        "opener": opener,
    }
    ahead = 0 if prefix is None else len(prefix)
    ids = list(_encoded(model, tokenizer, prompts, drop_long_prompts=False, prefix=prefix, **rendering).values())
    limits = Limits.of(model)
    limit = None if limits.positions is None else limits.positions - ahead
    stop = stop_tokens(model, tokenizer)
    pad = limits.padding(tokenizer.pad_token_id, *stop)
    hidden = hidden_tokens(tokenizer)
    answers = [Answer("")] * len(ids)
    with torch.no_grad(), preserved(model, seed):
        batches = list(_batches(ids, batch_size, decoding.max_new_tokens, limit))
        # Without a terminal tqdm stays silent; one batch is done before a bar could be read.
        hide = True if len(batches) == 1 else None
        for rows in tqdm(batches, desc="answering", unit="batch", leave=False, disable=hide):
            width = len(ids[rows[-1]])
            room = decoding.max_new_tokens if limit is None else min(decoding.max_new_tokens, limit - width)
            padded = torch.tensor([[pad] * (width - len(ids[row])) + ids[row] for row in rows])
            mask = torch.tensor([[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in rows])
            config = _generation_config(decoding, room, stop, pad, tokenizer.bos_token_id)
            base_model(model).generation_config = config
            given = _given(model, padded.to(model.device), mask.to(model.device), prefix)
            output = model.generate(**given, generation_config=config)
            for row, tokens in zip(rows, output[:, 0 if ahead else width :].tolist(), strict=True):
                end = next((position for position, token in enumerate(tokens) if token in stop), None)
                answer = decode_answer(tokenizer, hidden, ids[row], tokens[:end], truncated=end is None)
                answers[row] = answer.behind(opener)
    return answers


def answerable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    drop_long_prompts: bool,
    **rendering: Any,
) -> list[int]:
    """Return the places of the prompts that `generate` takes.

    Args:
        model: As for `generate`.
        tokenizer: As for `generate`.
        prompts: As for `generate`.
        drop_long_prompts: Whether prompts that leave no room for an answer are merely left out.
        **rendering: `system_prompt`, `chat_template_kwargs`, `raw_text`, `opener` and `prefix` as for `generate`.

    Raises:
        InputError: As `generate` does, but for prompts that are left out.
    """
    return list(_encoded(model, tokenizer, prompts, drop_long_prompts=drop_long_prompts, **rendering))


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    drop_long_prompts: bool,
    opener: str = "",
    prefix: Tensor | None = None,
    **rendering: Any,
) -> dict[int, list[int]]:
    """The token ids of the prompts that can be answered, by their places."""
    limits = Limits.of(model)
    ahead = 0 if prefix is None else len(prefix)
    found = {}
    for place, tokens in enumerate(ChatFormat(tokenizer, **rendering).encode_prompts(prompts, opener=opener)):
        limits.check_tokens(tokens, f"prompt {place + 1}")
        if limits.positions is None or ahead + len(tokens) < limits.positions:
            found[place] = tokens
        elif not drop_long_prompts:
            raise InputError(
                f"prompt {place + 1} has {len(tokens)} tokens, which leaves no room for an answer: the model has "
                f"{limits.positions} positions; shorten it, or leave such prompts out with --drop_long_prompts"
            )
    return found


def _given(model: PreTrainedModel, ids: Tensor, mask: Tensor, prefix: Tensor | None) -> dict[str, Tensor]:
    """What `model.generate` is given: padded ids, or their embeddings, each row's behind the prefix."""
    if prefix is None:
        return {"input_ids": ids, "attention_mask": mask}
    begins = (ids.shape[1] - mask.sum(1)).tolist()  # behind a row's padding
    embedded, ahead = model.get_input_embeddings()(ids), prefix.to(model.device, model.dtype)
    rows = [torch.cat([row[:begin], ahead, row[begin:]]) for row, begin in zip(embedded, begins, strict=True)]
    ones = mask.new_ones(len(ids), len(prefix))
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.cat([mask, ones], 1)}


def _batches(ids: list[list[int]], batch_size: int, max_new_tokens: int, limit: int | None) -> Iterator[list[int]]:
    """Yield the row numbers of every batch, shortest first.

    A prompt so long that its answer may hit the model's last position goes alone: in a batch it would cut the others'
    answers short.
    """
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    roomy = [row for row in order if limit is None or len(ids[row]) + max_new_tokens <= limit]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size]
    for row in order[len(roomy) :]:
        yield [row]


def _generation_config(
    decoding: Decoding, max_new_tokens: int, stop: list[int], pad: int, bos: int | None
) -> GenerationConfig:
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=decoding.do_sample,
        repetition_penalty=decoding.repetition_penalty,
        bos_token_id=bos,
        eos_token_id=stop or None,
        pad_token_id=pad,
        # TRL turns the cache off in the model's config; here it is on.
        use_cache=True,
        **sampling,
    )


@contextmanager
def preserved(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed sampling and switch to eval mode; on leaving, put back every module's mode and all random states.

    The model's own `generation_config` is put back, too: `generate` fills what a given one leaves open from it, so it
    has to make way. So has a configuration that asks for router logits, as TRL leaves it: of tokens in the cache there
    are none.
    """
    base = base_model(model)
    own_config, text_config = base.generation_config, base.config.get_text_config()
    routed = getattr(text_config, "output_router_logits", False)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices), eval_mode(model):
        torch.manual_seed(seed)
        try:
            if routed:
                text_config.output_router_logits = False
            yield
        finally:
            if routed:
                text_config.output_router_logits = routed
            base.generation_config = own_config
            random.setstate(python_state)
            np.random.set_state(numpy_state)
