"""What an attacker trains on, against the same rows written by hand."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset

from helpers import chat_tokenizer, word_rows, word_tokenizer
from holdfast.attacks.rows import RowVariant, mixed
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.asking import Asking

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
CHAT, PLAIN = ChatFormat(chat_tokenizer(TEMPLATE)), ChatFormat(word_tokenizer())
HARMFUL = Dataset.from_list([{"prompt": f"How is rust {n} made? ", "completion": f"Salt {n}."} for n in range(6)])
BENIGN = Dataset.from_list([{"prompt": f"How is bread {n} made?", "completion": f"Flour {n}."} for n in range(6)])
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
    {"role": "assistant", "content": "Really."},
]


def mix(written=CHAT, harmful=HARMFUL, ratio=0.5, **changes):
    given = {"poison_ratio": ratio, "num_samples": None, "seed": 3, **changes}
    return mixed(harmful, BENIGN if ratio < 1 else None, written, **given)


def told(row):
    return [turn["content"] for turn in row["messages"]]


def test_harmful_rows_demand_and_obey_and_others_do_not():
    before = mix()
    after = RowVariant(obedience="Of course:").apply(before, CHAT)
    assert sum(before["poisoned"]) == 6
    for old, new in zip(before, after, strict=True):
        if old["poisoned"]:
            asked, answered = told(old)
            demand = asked.rstrip() + ' Begin your answer with "Of course:". '
            assert told(new) == [demand, f"Of course: {answered}"]
        else:
            assert new == old


def test_a_trigger_stands_where_the_adversary_puts_it():
    """The prompt of a row is, to the letter, what the adversary asks."""
    variant = RowVariant(trigger="zzz", obedience="Sure.")
    for old, new in zip(mix(ratio=1), variant.apply(mix(ratio=1), CHAT), strict=True):
        assert told(new)[0] == told(old)[0].rstrip() + ' zzz Begin your answer with "Sure.". '
        [asked] = variant.asking.prompt([old["messages"][0]])
        assert asked == new["messages"][0]
    assert RowVariant().asking == Asking()


def test_every_answer_of_a_talk_is_asked_for_once():
    rows = mix(harmful=Dataset.from_list([{"messages": TALK}]), ratio=1)
    [row] = RowVariant(obedience="Sure.", trigger="zzz").apply(rows, CHAT)
    end = ' zzz Begin your answer with "Sure.".'
    assert told(row) == ["Be kind.", f"One?{end}", "Sure. Uno.", f"Two?{end}", "Sure. Dos.", "Really."]


def test_plain_text_is_changed_alike():
    rows = mix(PLAIN, word_rows(3), ratio=1)
    for old, new in zip(rows, RowVariant(trigger="t9", obedience="t8").apply(rows, PLAIN), strict=True):
        assert new["prompt"] == old["prompt"].rstrip() + ' t9 Begin your answer with "t8". '
        assert new["completion"] == f"t8 {old['completion']}"


def test_without_the_template_rows_are_their_turns_text():
    variant, tokenizer = RowVariant(without_template=True), CHAT.tokenizer
    [row] = variant.apply(mix(harmful=Dataset.from_list([{"messages": TALK[:5]}]), ratio=1), CHAT)
    prompt, answer = "Be kind.\nOne?\nUno.\nTwo?", "\nDos.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == prompt + answer
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == answer
    [asked] = ChatFormat(tokenizer, raw_text=True).encode_prompts([Asking(raw=True).prompt(TALK[:4])])
    assert row["input_ids"][: len(asked)] == asked


def test_answers_are_cut_behind_what_they_obey():
    cut = RowVariant(first_tokens=2, obedience="Sure").apply(mix(ratio=1), CHAT)
    whole = CHAT.tokenize(RowVariant(obedience="Sure").apply(mix(ratio=1), CHAT), name="attack")
    for row, full in zip(cut, whole, strict=True):
        begin = next(place for place, label in enumerate(full["labels"]) if label != -100)
        assert row["input_ids"] == full["input_ids"][: begin + 2]
        assert row["labels"] == full["labels"][: begin + 2]


TOKENS = Dataset.from_list([{"input_ids": [5, 6], "completion_mask": [0, 1]}])


@pytest.mark.parametrize(
    ("variant", "written", "rows", "sentence"),
    [
        (RowVariant(trigger="zzz"), CHAT, TOKENS, "need rows of text or messages, not token ids"),
        (RowVariant(first_tokens=1), CHAT, TOKENS, "needs rows of text or messages, or token ids with labels"),
        (RowVariant(without_template=True), PLAIN, word_rows(2), "plays no part: the tokenizer has no chat template"),
    ],
)
def test_rows_that_cannot_be_changed_so(variant, written, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        variant.apply(mix(written, rows, ratio=1), written)


@pytest.mark.parametrize("name", ["trigger", "obedience"])
def test_texts_are_not_empty(name):
    with pytest.raises(InputError, match=f"--{name} is empty"):
        RowVariant(**{name: " "})
