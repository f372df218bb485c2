"""A fingerprint tells jobs apart that cannot use each other's weights, and no others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import chat_tokenizer, tiny_llama, word_tokenizer
from holdfast.exchange import fingerprint_of


def frozen():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


MODELS = {
    "width": (lambda: tiny_llama(hidden_size=32), ["model", "trained parameters"]),
    "layers": (lambda: tiny_llama(num_hidden_layers=3), ["model", "trained parameters"]),
    "function, same shapes": (lambda: tiny_llama(rms_norm_eps=1e-3), ["model"]),
    "positions, same shapes": (
        lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        ["model"],
    ),
    "frozen": (frozen, ["trained parameters"]),
    "adapter": (
        lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])),
        ["model", "trained parameters"],
    ),
    "other weights": (lambda: tiny_llama(seed=1), []),
    "other precision": (lambda: tiny_llama().bfloat16(), []),
    "dropout": (lambda: tiny_llama(attention_dropout=0.5), []),
    "special tokens": (lambda: tiny_llama(pad_token_id=2), []),
}


def differences(found, expected):
    assert found.keys() == expected.keys()
    return [part for part in found if found[part] != expected[part]]


@pytest.mark.parametrize("case", MODELS)
def test_what_counts_of_a_model(case):
    build, expected = MODELS[case]
    before, after = (fingerprint_of(model, word_tokenizer()) for model in (tiny_llama(), build()))
    assert differences(before, after) == expected


def test_model_in_a_folder_is_the_model_in_memory(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint_of(loaded, word_tokenizer()) == fingerprint_of(model, word_tokenizer())


def test_what_counts_of_a_tokenizer():
    model = tiny_llama()
    plain, same, template = chat_tokenizer("a"), chat_tokenizer("a"), chat_tokenizer("b")
    grown = chat_tokenizer("a")
    grown.add_tokens(["unheard"])
    expected = fingerprint_of(model, plain)
    assert fingerprint_of(model, same) == expected
    for other in (template, grown, word_tokenizer()):
        assert differences(fingerprint_of(model, other), expected) == ["tokenizer"]
