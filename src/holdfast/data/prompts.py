"""Prompts as a model reads them: through the chat template, up to where the answer begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.data.load import Prompt
from holdfast.errors import InputError


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Turn prompts into token ids.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Text or messages each. If the tokenizer has a chat template, text becomes one user turn.
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.

    Returns:
        The token ids of every prompt, without padding.

    Raises:
        InputError: If messages or a system prompt need a chat template that is not there, or a prompt is empty; the
            row is named, counted from 1.
    """
    if not prompts:
        return []
    if not tokenizer.chat_template:
        for row, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise InputError(f"prompt {row} is made of messages, but the tokenizer has no chat template")
        if system_prompt is not None:
            raise InputError("--system_prompt needs a chat template, which the tokenizer does not have")
        ids = list(tokenizer(list(prompts))["input_ids"])
    else:
        rendered = []
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if system_prompt is not None and all(message["role"] != "system" for message in messages):
                messages = [{"role": "system", "content": system_prompt}, *messages]
            rendered.append(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
                )
            )
        # The template writes the special tokens itself.
        ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    for row, tokens in enumerate(ids, 1):
        if not tokens:
            raise InputError(f"prompt {row} is empty; expected at least one token")
    return ids
