"""Prompts are encoded up to where the answer begins, by the chat template where there is one."""

import pytest

from helpers import chat_tokenizer, word_tokenizer
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if brief is defined %}brief{% endif %}{% endif %}"
)


def texts(prompts, **settings):
    tokenizer = chat_tokenizer(TEMPLATE)
    return [tokenizer.decode(ids) for ids in ChatFormat(tokenizer, **settings).encode_prompts(prompts)]


def test_without_a_template_text_is_taken_as_it_is():
    assert ChatFormat(word_tokenizer()).encode_prompts(["t5 t6", "t7"]) == [[5, 6], [7]]


def test_text_is_a_user_turn_and_messages_are_rendered():
    rendered = "<|im_start|>user\nbread?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(["bread?", [{"role": "user", "content": "bread?"}]]) == [rendered, rendered]


def test_a_system_prompt_and_settings_reach_the_template():
    (text,) = texts(["bread?"], system_prompt="Be kind.", chat_template_kwargs={"brief": True})
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert text.endswith("assistant\nbrief")


def test_no_prompts_have_no_tokens():
    assert ChatFormat(word_tokenizer()).encode_prompts([]) == []


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [(["t5", ""], "prompt 2 is empty"), (["t5", [{"role": "user", "content": "t5"}]], "prompt 2 is made of messages")],
)
def test_a_prompt_that_cannot_be_encoded_is_refused_by_number(prompts, problem):
    with pytest.raises(InputError, match=problem):
        ChatFormat(word_tokenizer()).encode_prompts(prompts)
