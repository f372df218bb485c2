"""Rows tokenised whole are the rows that training sees; padding is what the mask says."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset

from helpers import chat_tokenizer, tiny_llama, word_rows, word_tokenizer
from holdfast.config import DefenseConfig
from holdfast.data.rendering import ChatFormat
from holdfast.data.tokens import padded_batches, whole_rows
from holdfast.errors import InputError
from holdfast.trainer import DefenseTrainer

TALK = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Steep it."}]
FORMATS = {
    "prompt-and-completion": [{"prompt": TALK[:1], "completion": TALK[1:]}],
    "prompt-and-response": [{"prompt": "Tea?", "response": "Steep it."}, {"prompt": "Rice?", "response": "Boil it."}],
    "messages": [{"messages": TALK}],
    "several-turns": [{"messages": TALK * 2}, {"messages": TALK}],
}


def trained_on(settings, tokenizer, rows, **changes):
    model = tiny_llama(vocab_size=len(tokenizer))
    config = DefenseConfig(**{**settings, "max_length": 512, **changes})
    return list(DefenseTrainer(model, config, rows, processing_class=tokenizer).train_dataset["input_ids"])


@pytest.mark.parametrize("form", FORMATS)
def test_chats_are_tokenised_as_in_training(settings, form):
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = chat_tokenizer(template.read_text(encoding="utf-8"))
    changes = {"system_prompt": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}}
    rows = Dataset.from_list(FORMATS[form])
    written = ChatFormat(tokenizer, **changes)
    assert whole_rows(rows, written, name="attack") == trained_on(settings, tokenizer, rows, **changes)


def test_plain_text_is_tokenised_as_in_training(settings):
    rows = Dataset.from_list([*word_rows(3), {"prompt": "t5 ", "completion": "t6 t2"}])
    tokens = whole_rows(rows, ChatFormat(word_tokenizer()), name="attack")
    assert tokens == trained_on(settings, word_tokenizer(), rows)
    assert all(row[-1] == 2 for row in tokens)


def test_tokenised_rows_are_taken_as_they_are():
    rows = Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}])
    assert whole_rows(rows, ChatFormat(word_tokenizer()), name="attack") == [[4, 5, 6]]


def test_empty_row_is_named():
    rows = Dataset.from_list([{"prompt": "t5", "completion": "t6"}, {"prompt": "", "completion": ""}])
    with pytest.raises(InputError, match="row 2 of the attack data has an empty completion"):
        whole_rows(rows, ChatFormat(word_tokenizer()), name="attack")


def test_batches_are_padded_and_hold_every_row_once():
    rows = [[4], [5, 6, 7], [8, 9], [10], [11, 12]]
    batches = list(padded_batches(rows, 2, pad_token=3))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 3), (2, 2), (1, 1)]
    assert torch.equal(batches[0]["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 3]]))
    assert torch.equal(batches[0]["attention_mask"], torch.tensor([[1, 1, 1], [1, 1, 0]]))
    found = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(found) == sorted(rows)
