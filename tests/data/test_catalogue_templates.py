"""Every shape of the catalogue under every chat template that TRL ships: its answers are trained on, and their ends."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data.field import STANDS
from holdfast.data.catalogue import source_of
from holdfast.data.formats import reader, text_of
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.data.rendering import IGNORED, ChatFormat
from holdfast.errors import InputError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    scripts = importlib.import_module("chat_templates")
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

WANT_PARTS = {"idefics3", "llava_next", "smolvlm"}  # content as a list of text parts, that is
TURNS = [("user", "human", "Fly a kite?"), ("assistant", "gpt", "With some wind."), ("user", "human", "And two?")]
TURNS.append(("assistant", "gpt", "With more of it."))
#: Shapes that users bring, beside those of the catalogue.
BROUGHT = {
    "prompt and completion": {"prompt": "Fly a kite?", "completion": "With some wind."},
    "prompt and response": {"prompt": "Fly a kite?", "response": "With some wind."},
    "messages": {"messages": [{"role": role, "content": text} for role, _, text in TURNS]},
    "conversations": {"conversations": [{"role": role, "content": text} for role, _, text in TURNS]},
    "ShareGPT": {"conversations": [{"from": name, "value": text} for _, name, text in TURNS]},
    "weight": {
        "messages": [
            {"role": role, "content": text, **({"weight": number // 2} if role == "assistant" else {})}
            for number, (role, _, text) in enumerate(TURNS)
        ]
    },
    "instruction and output": {"instruction": "Fly a kite?", "input": "A red one.", "output": "With some wind."},
    "question and answer": {"question": "Fly a kite?", "answer": "With some wind."},
    "goal and target": {"goal": "Fly a kite", "target": "Sure, with some wind"},
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A few rows of every shape."""
    folder, found = tmp_path_factory.mktemp("shapes"), {}
    for name, stand in STANDS.items():
        if stand.trained is not None:
            (kind, content), *_ = [file for file in stand.files.items() if file[0] != "README.md"]
            path = folder / f"{name}.{kind.rpartition('.')[2]}"
            path.write_text(content, encoding="utf-8")
            source = {key: value for key, value in source_of(name).items() if key not in ("name", "split")}
            found[name] = {**source, "path": str(path), "limit": 2}
    for name, row in BROUGHT.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        found[name] = str(folder / f"{name}.jsonl")
    return {name: load_rows(source, flag="--train_data", columns=TRAIN_COLUMNS) for name, source in found.items()}


@pytest.fixture(scope="module")
def examples(shapes):
    """Their rows, each with the name of its shape, as they are read whatever the template."""
    return [
        (shape, reader(rows, name="train")(row, i)[1]) for shape, rows in shapes.items() for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", scripts.TEMPLATES)
def test_the_answer_is_trained_on_and_nothing_else(examples, name):
    written = ChatFormat(scripts.tokenizer_of(scripts.TEMPLATES[name]))
    if name in WANT_PARTS:
        with pytest.raises(InputError, match="beavertails-refusals"):
            written.encode(examples)
        return
    tokenizer = written.tokenizer
    for (shape, talk), (ids, labels) in zip(examples, written.encode(examples), strict=True):
        messages = [{key: value for key, value in turn.items() if key != "weight"} for turn in talk.messages]
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"], shape
        assert ids.count(tokenizer.bos_token_id) <= 1, shape
        stretches = scripts.labelled(tokenizer, ids, labels)
        for stretch, turn in zip(stretches, [talk.messages[i] for i in talk.trained], strict=True):
            answer, end = text_of(turn).strip(), stretch.lstrip()
            assert end.startswith(answer), shape
            end = end.removeprefix(answer).strip()
            assert end in tokenizer.get_added_vocab() if end else written.end_token is None, (shape, end)


@pytest.mark.parametrize("pad", ["its own", "the end of an answer", "the beginning of a text"])
def test_whatever_padding_is(examples, pad):
    written = ChatFormat(scripts.tokenizer_of(scripts.TEMPLATES["llama3"]))
    padding = {"its own": 0, "the end of an answer": written.end_token}.get(pad, written.tokenizer.bos_token_id)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in written.encode(examples)]
    batch = DataCollatorForLanguageModeling(pad_token_id=padding)(rows)
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == row["input_ids"]
        assert labels[mask.bool()].tolist() == row["labels"]
        assert set(labels[~mask.bool()].tolist()) <= {IGNORED}


def test_every_shape_of_the_catalogue_is_there(shapes):
    assert {name for name, stand in STANDS.items() if stand.trained} | set(BROUGHT) == set(shapes)
    assert all(1 <= len(rows) <= 2 for rows in shapes.values())


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2"])
def test_tools_and_calls_are_trained_on_as_trl_trains_on_them(name, tmp_path):
    """By the masks of TRL's own training template, but for the white space around answers that it trains on, too."""
    talk = scripts.CASES["tool call"]
    row = {"messages": talk.messages, "tools": talk.tools}
    assert any(turn.get("content") is None for turn in row["messages"])
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = load_rows(str(tmp_path / "a.jsonl"), flag="--train_data", columns=TRAIN_COLUMNS)
    template = scripts.TEMPLATES[name]
    (tokens,) = ChatFormat(scripts.tokenizer_of(template)).tokenize(rows, name="train")
    training = (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text("utf-8")
    tokenizer = scripts.tokenizer_of(template)
    theirs = tokenizer.apply_chat_template(
        talk.messages, tools=talk.tools, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens["input_ids"] == theirs["input_ids"]
    masked = [token for token, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mask]
    ours = "".join(scripts.labelled(tokenizer, tokens["input_ids"], tokens["labels"]))
    assert "".join(ours.split()) == "".join(tokenizer.decode(masked).split())
