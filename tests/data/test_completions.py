"""What truncation leaves of rows, and what a model can read of them."""

import pytest
from datasets import Dataset

from helpers import chat_tokenizer, tiny_llama, word_tokenizer
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.trainer import DefenseTrainer


def prepared(settings, rows, model=None, **changes):
    config = DefenseConfig(**{**settings, **changes})
    return DefenseTrainer(model or tiny_llama(), config, rows, processing_class=word_tokenizer()).train_dataset


def row(prompt, completion):
    return {"prompt": " ".join(["t4"] * prompt) + " ", "completion": " ".join(["t5"] * completion)}


def test_the_end_that_is_kept_may_hold_an_answer_that_the_start_does_not(settings):
    rows = Dataset.from_list([row(12, 2), row(2, 2)])
    with pytest.raises(
        InputError, match="1 of 2 rows of the train data keep no completion token within --max_length 8"
    ):
        prepared(settings, rows, max_length=8)
    long, short = prepared(settings, rows, max_length=8, truncation_mode="keep_end")
    assert long["input_ids"] == [4, 4, 4, 4, 4, 5, 5, 2]
    assert long["labels"] == [-100] * 5 + [5, 5, 2]
    assert short["input_ids"] == [4, 4, 5, 5, 2]


def test_the_start_that_is_cut_may_hold_the_only_answer(settings):
    """Of a talk that the user has the last word in."""
    ids = [4] * 3 + [5] * 2 + [6] * 10
    labels = [-100] * 3 + [5] * 2 + [-100] * 10
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert len(prepared(settings, rows, max_length=8)) == 2
    with pytest.raises(InputError, match=r"1 of 2 rows .* \(the first is row 1\)"):
        prepared(settings, rows, max_length=8, truncation_mode="keep_end")
    # The first token that is left is not predicted.
    with pytest.raises(InputError, match="1 of 2 rows"):
        prepared(settings, rows, max_length=11, truncation_mode="keep_end")
    assert len(prepared(settings, rows, max_length=12, truncation_mode="keep_end")) == 2


def test_packing_keeps_the_end_too(settings):
    rows = Dataset.from_list([row(12, 2), row(2, 2)])
    packed = prepared(settings, rows, max_length=8, truncation_mode="keep_end", packing=True)
    assert sorted(packed["input_ids"], key=len) == [[4, 4, 5, 5, 2], [4, 4, 4, 4, 4, 5, 5, 2]]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_past_the_models_positions_are_refused(settings, mode):
    model = tiny_llama(max_position_embeddings=16)
    rows = Dataset.from_list([row(2, 2), row(10, 10)])
    problem = "row 2 of the train data has 21 tokens, but the model has 16 positions; cut rows with --max_length 16"
    for length in (None, 64):
        with pytest.raises(InputError, match=problem):
            prepared(settings, rows, model, max_length=length, truncation_mode=mode)
    assert len(prepared(settings, rows, model, max_length=16, truncation_mode=mode)) == 2
    assert len(prepared(settings, rows.select([0]), model, max_length=64)) == 1


def test_packed_rows_past_the_models_positions_are_refused(settings):
    model = tiny_llama(max_position_embeddings=16)
    rows = Dataset.from_list([row(4, 4)] * 4)
    wrapped = {"packing": True, "packing_strategy": "wrapped"}
    with pytest.raises(
        InputError, match="a packed row of the train data has 20 tokens, but the model has 16 positions"
    ):
        prepared(settings, rows, model, max_length=20, **wrapped)
    assert max(map(len, prepared(settings, rows, model, max_length=16, **wrapped)["input_ids"])) == 16
    prepared(settings, rows, model, max_length=64, packing=True)  # whose rows each begin at position 0


def test_refusals_are_held_to_the_same(settings):
    from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer

    config = AntibodyConfig(**{**settings, "refusal": " ".join(["t6"] * 20)})
    rows = Dataset.from_list([row(2, 2)] * 4)
    with pytest.raises(
        InputError, match="row 1 of the train data with its refusal has 23 tokens, but the model has 16 positions"
    ):
        AntibodyTrainer(tiny_llama(max_position_embeddings=16), config, rows, processing_class=word_tokenizer())


def test_several_processes_tokenise_the_same(settings):
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    rows = Dataset.from_list([{"prompt": f"Tea {i}?", "completion": "Steep."} for i in range(8)])
    found = []
    for workers in (None, 2):
        tokenizer = chat_tokenizer(template)
        config = DefenseConfig(**{**settings, "dataset_num_proc": workers})
        model = tiny_llama(vocab_size=len(tokenizer))
        found.append(DefenseTrainer(model, config, rows, processing_class=tokenizer).train_dataset.to_list())
    assert found[0] == found[1]


@pytest.mark.parametrize("given", [{"labels": [-100, 5]}, {"completion_mask": [0, 1]}])
def test_a_token_without_a_label_is_refused(settings, given):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6], **given}])
    with pytest.raises(InputError, match="row 1 of the train data has 2 labels for 3 tokens"):
        prepared(settings, rows)
