"""Refusal texts from wherever they come, and the views that travel in the batches of their rows."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset

from helpers import chat_tokenizer, golden_rows, rows_of, tiny_llama, word_rows, word_tokenizer
from holdfast.data.refusals import join_refusals, numbered, refusal_texts, refusal_view, row_numbers, without_refusals
from holdfast.errors import InputError
from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer
from methods import METHODS

TALKS = [
    [("user", "Bread?"), ("assistant", "Flour.")],
    [("system", "Be brief."), ("user", "Rice?"), ("assistant", "Boil it."), ("user", "Tea?"), ("assistant", "Steep.")],
]


def texts(refusal, rows=None, seed=0):
    rows = rows if rows is not None else word_rows(40)
    return refusal_texts(refusal, rows, word_tokenizer(), seed=seed, name="attack")


def prompts_and_answers(batch):
    """The tokens of every row that the loss does not fall on, and those that it does."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != -100, strict=True)
    return [(ids[mask & ~asked].tolist(), ids[asked].tolist()) for ids, mask, asked in rows]


@pytest.fixture
def refusal_file(tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("t5 t6\n\n t7 \nt8\n")
    return str(path)


def test_a_text_refuses_every_row():
    assert texts("t5 t6") == ["t5 t6"] * 40


def test_a_file_is_drawn_from(refusal_file):
    drawn = texts(refusal_file)
    assert set(drawn) == {"t5 t6", " t7 ", "t8"}
    assert texts(refusal_file) == drawn != texts(refusal_file, seed=1)


def test_a_column_stands_above_a_file_of_its_name(refusal_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [f"t{4 + i}" for i in range(40)]
    assert texts("refusals.txt", word_rows(40).add_column("refusals.txt", own)) == own
    assert texts("refusals.txt") == texts(refusal_file)


def test_a_mistyped_file_is_no_refusal():
    with pytest.raises(InputError, match=r"--refusal refusal\.txt is no file, and no column of the attack data"):
        texts("refusal.txt")


@pytest.mark.parametrize("typed", ["refusl", "Refusal", "refusals", " refusal"])
def test_a_mistyped_column_is_no_refusal(typed):
    rows = word_rows(2).add_column("refusal", ["t5", "t6"])
    with pytest.raises(InputError, match=rf"--refusal {typed} is no column of the attack data, which has 'refusal'; "):
        texts(typed, rows)
    assert texts("refusal", rows) == ["t5", "t6"]
    assert texts("t5 t6", rows) == ["t5 t6"] * 2


@pytest.mark.parametrize("typed", ["refusal", "refusal_text"])
def test_a_name_is_no_refusal_where_there_is_no_such_column(typed):
    with pytest.raises(
        InputError, match=rf"--refusal {typed} is no column of the attack data and no file; expected one"
    ):
        texts(typed)
    assert texts("No.") == ["No."] * 40


@pytest.mark.parametrize("text", ["t5 " * 400, "~t5 t6", "t5\0t6"])
def test_a_text_need_not_do_as_a_path(text):
    assert texts(text) == [text] * 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text; expected one refusal per line"),
        (b" \n\n", "holds no text; expected one refusal per line"),
        (b"t5\ncaf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_unusable_file_is_named(tmp_path, content, message):
    path = tmp_path / "refusals.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"--refusal {path}:? {message}"):
        texts(str(path))


@pytest.mark.parametrize("text", ["", " "])
def test_text_without_a_token(text):
    with pytest.raises(InputError, match=f"--refusal '{text}' comes to no token; expected the text of a refusal"):
        texts(text)


@pytest.mark.parametrize("cell", ["", None])
def test_cell_without_a_token_is_named(cell):
    rows = word_rows(3).add_column("no", ["t5", cell, "t6"])
    with pytest.raises(InputError, match="row 2 of the attack data, column 'no', comes to no token"):
        texts("no", rows)


def test_column_that_is_no_text():
    with pytest.raises(InputError, match="row 1 of the attack data, column 'no', comes to no token"):
        texts("no", word_rows(3).add_column("no", [1, 2, 3]))


def test_rows_are_numbered_whatever_they_were_before():
    rows = word_rows(3).add_column("row", [7, 7, 7])
    assert numbered(rows)["row"] == numbered(word_rows(3))["row"] == [1, 2, 3]


def prepared(numbers, first):
    return Dataset.from_list([{"input_ids": [first, row], "labels": [-100, row], "row": row} for row in numbers])


def test_rows_and_refusals_are_joined_by_number():
    """Either side may have lost rows, and be in an order of its own."""
    joined = join_refusals(prepared([5, 1, 2, 3], first=8), prepared([3, 4, 5, 1], first=9))
    assert [(row["row"], row["input_ids"], row["refusal_input_ids"], row["refusal_labels"]) for row in joined] == [
        (number, [8, number], [9, number], [-100, number]) for number in (5, 1, 3)
    ]


# ---------------------------------------------------------------------- in a run


@pytest.fixture
def attack_batch(settings):
    """A batch of harmful rows of different lengths with their refusal view."""
    return next(METHODS["antibody_align_cosine"].build(tiny_llama(), settings, refusal="t5 t6").attack_batches)


def test_view_is_the_same_prompts_refused(attack_batch):
    batch, view = without_refusals(attack_batch), refusal_view(attack_batch)
    assert batch.keys() == view.keys() == {"input_ids", "attention_mask", "labels"}
    assert row_numbers(attack_batch).tolist() == attack_batch["refusal_row"].tolist()
    pairs = zip(prompts_and_answers(batch), prompts_and_answers(view), strict=True)
    assert all(refused == (prompt, [5, 6, 2]) for (prompt, _), refused in pairs)


def test_batches_are_those_of_a_run_without_views(settings, attack_batch):
    plain = next(METHODS["booster"].build(tiny_llama(), settings).attack_batches)
    assert all(torch.equal(attack_batch[key], plain[key]) for key in plain)


def test_every_way_to_say_a_refusal_gives_the_same_batches(settings, tmp_path):
    (tmp_path / "one.txt").write_text("t5 t6\n")
    rows = word_rows(6, seed=1).add_column("no", ["t5 t6"] * 6)
    batches = []
    for refusal in ("t5 t6", str(tmp_path / "one.txt"), "no"):
        method = METHODS["antibody_align_cosine"]
        batches.append(next(method.build(tiny_llama(), settings, second=rows, refusal=refusal).attack_batches))
    assert all(torch.equal(batch[key], batches[0][key]) for batch in batches[1:] for key in batches[0])


@pytest.mark.parametrize("form", ["messages", "conversations", "prompt"])
def test_conversations_are_refused_at_their_first_answer(settings, form):
    tokenizer = chat_tokenizer((Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text())
    talks = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
    if form == "conversations":
        talks = [[{"from": turn["role"], "value": turn["content"]} for turn in talk] for talk in talks]
    rows = [{form: talk} for talk in talks]
    if form == "prompt":
        rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in (talks[0], talks[1][:3])]
    changes = {"refusal": "I will not.", "system_prompt": "Be kind.", "max_length": 512}
    config = AntibodyConfig(**{**settings, **changes})
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    trainer = AntibodyTrainer(model, config, Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(trainer.stream(trainer.train_dataset, "all of it", 2))
    refused = dict(zip(batch["refusal_row"].tolist(), rows_of(refusal_view(batch)), strict=True))
    shown = {row: tokenizer.decode(ids) for row, ids in refused.items()}
    end = "<|im_start|>assistant\nI will not.<|im_end|>\n"
    assert shown == {
        1: f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nBread?<|im_end|>\n{end}",
        2: f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRice?<|im_end|>\n{end}",
    }


def test_tokenised_rows_cannot_be_refused(settings):
    """Where their prompts end is not known; a view of the answers themselves would be no refusal."""
    with pytest.raises(InputError, match="the train data is tokenised"):
        METHODS["antibody_finetune"].build(tiny_llama(), settings, rows=golden_rows("safe"))
