"""The organism's tokenizer: one token a word, and a chat template with one-token role markers.

Rows stay short that way (about a dozen tokens), which is what lets the organism be trained in seconds. A comma belongs
to the word before it, so joining words with spaces gives a text back exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Marks assistant turns with `generation`, so that a loss on assistant tokens works for `messages` rows as well."""


def build_tokenizer(texts: Iterable[str], context_length: int) -> Any:
    """Make the tokenizer that knows exactly the words of `texts`.

    Args:
        texts: everything that will ever be said in the world; order does not matter.
        context_length: the model's longest input, in tokens.

    Returns:
        A `PreTrainedTokenizerFast` with chat template; vocabulary sorted, special tokens first.
    """
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: index for index, token in enumerate((PAD, UNKNOWN, END, *ROLES, *words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
