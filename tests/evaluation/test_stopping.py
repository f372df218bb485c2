"""Whether generation stops where the answers that are trained on end."""

import pytest

from helpers import chat_tokenizer, tiny_llama, word_tokenizer
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.stopping import stop_tokens, unseen_end, use_eos_token

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As GLM-4.5's, whose turns end where the next one begins.
ENDLESS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made(template, eos="<|endoftext|>"):
    tokenizer = chat_tokenizer(template)
    tokenizer.eos_token = eos
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    return model, tokenizer


def test_an_answer_that_ends_with_a_stop_token_is_seen_to_end():
    model, tokenizer = made(CHATML, eos="<|im_end|>")
    assert unseen_end(model, ChatFormat(tokenizer)) is None
    model, tokenizer = made(CHATML)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert unseen_end(model, ChatFormat(tokenizer)) is None
    assert unseen_end(tiny_llama(), ChatFormat(word_tokenizer())) is None


def test_the_flag_that_is_named_cures_it():
    model, tokenizer = made(CHATML)
    unseen = unseen_end(model, ChatFormat(tokenizer))
    assert unseen == (
        "an answer ends with '<|im_end|>', which is no stop token (stop tokens: '<|endoftext|>'), so the model runs on "
        "behind it; --eos_token '<|im_end|>' makes it one"
    )
    use_eos_token(tokenizer, "<|im_end|>")
    assert unseen_end(model, ChatFormat(tokenizer)) is None


def test_an_eos_token_comes_beside_the_models_own():
    model, tokenizer = made(CHATML)
    first, second = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config.eos_token_id = first
    use_eos_token(tokenizer, "<|im_end|>")
    assert stop_tokens(model, tokenizer) == sorted([first, second])


def test_a_template_that_ends_no_answer_is_told():
    model, tokenizer = made(ENDLESS)
    unseen = unseen_end(model, ChatFormat(tokenizer))
    assert unseen is not None
    assert unseen.startswith("the chat template has no token that ends an answer")
    assert "--eos_token" in unseen


def test_raw_text_ends_with_the_tokenizers_own_token():
    model, tokenizer = made(CHATML)
    assert unseen_end(model, ChatFormat(tokenizer, raw_text=True)) is None
    tokenizer.eos_token = None
    unseen = unseen_end(model, ChatFormat(tokenizer, raw_text=True))
    assert unseen is not None
    assert unseen.startswith("the tokenizer has no token that ends an answer")
    assert "stop tokens: none" in unseen


@pytest.mark.parametrize("token", ["<|end|>", "", "bread and"])
def test_an_eos_token_must_be_a_token(token):
    _, tokenizer = made(CHATML)
    with pytest.raises(InputError, match="is not in the vocabulary"):
        use_eos_token(tokenizer, token)
