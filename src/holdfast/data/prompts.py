"""Prompts as a model reads them: in the format of the run, up to where the answer begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    raw_text: bool = False,
) -> list[list[int]]:
    """Turn prompts into token ids. The settings are those of `ChatFormat`, whose `encode_prompts` does the work."""
    return ChatFormat(tokenizer, system_prompt, chat_template_kwargs, raw_text).encode_prompts(prompts)
