"""Every accepted format, under real chat templates, is trained on its assistant tokens only."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset

from helpers import chat_tokenizer, tiny_llama
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.config import DefenseConfig
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.trainer import DefenseTrainer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
END = {"qwen": "<|im_end|>", "llama": "<|eot_id|>"}
FAMILIES = {
    "qwen2_5": "qwen",
    "qwen3": "qwen",
    "qwen3_instruct_2507": "qwen",
    "llama3": "llama",
    "llama3_1": "llama",
    "llama3_2": "llama",
}


def tokenizer_of(name):
    return chat_tokenizer((TEMPLATES / f"{name}.jinja").read_text(), FAMILIES[name])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TALKS = [("How does one bake bread?", "With flour and water."), ("And rice?", "Boil it."), ("Tea?", "Steep it.")]
FORMATS = {
    "prompt and completion": [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in TALKS],
    "text and completion": [{"prompt": q, "completion": a} for q, a in TALKS],
    "prompt and response": [{"prompt": q, "response": a} for q, a in TALKS],
    "messages and response": [{"prompt": [user(q)], "response": a} for q, a in TALKS],
    "messages": [{"messages": [user(q), assistant(a)]} for q, a in TALKS],
    "conversations": [
        {"conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]} for q, a in TALKS
    ],
    "ShareGPT": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in TALKS],
}


def prepared(settings, tokenizer, rows, **changes):
    """The train set as the trainer has prepared it."""
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    config = DefenseConfig(**{**settings, "max_length": 512, **changes})
    return DefenseTrainer(model, config, Dataset.from_list(rows), processing_class=tokenizer).train_dataset


def trained_on(tokenizer, row):
    """The stretches of text that the loss falls on."""
    stretches, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            current.append(token)
        elif current:
            stretches.append(current)
            current = []
    stretches += [current] if current else []
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.replace(" ", "-"))
def test_loss_falls_on_the_assistants_tokens_only(settings, name, form):
    tokenizer = tokenizer_of(name)
    rows = prepared(settings, tokenizer, FORMATS[form])
    assert len(rows) == len(TALKS)
    for row, (question, answer) in zip(rows, TALKS, strict=True):
        whole = tokenizer.apply_chat_template([user(question), assistant(answer)], tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == whole
        (text,) = trained_on(tokenizer, row)
        assert text == answer + END[FAMILIES[name]]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_is_what_generation_starts_from(settings, name):
    tokenizer = tokenizer_of(name)
    row = prepared(settings, tokenizer, FORMATS["messages"])[0]
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    written = ChatFormat(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert [row["input_ids"][:first]] == written.encode_prompts([TALKS[0][0]])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_every_assistant_turn_of_a_longer_talk_is_trained(settings, name, form):
    tokenizer = tokenizer_of(name)
    turns = [turn for question, answer in TALKS for turn in (user(question), assistant(answer))]
    if form == "messages":
        rows = [{"messages": turns}, {"messages": turns[:2]}]
    else:
        speakers = {"user": "human", "assistant": "gpt"}
        told = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]
        rows = [{"conversations": told}, {"conversations": told[:2]}]
    long, short = prepared(settings, tokenizer, rows)
    assert list(long["input_ids"]) == list(tokenizer.apply_chat_template(turns)["input_ids"])
    end = END[FAMILIES[name]]
    assert trained_on(tokenizer, long) == [answer + end for _, answer in TALKS]
    assert trained_on(tokenizer, short) == [TALKS[0][1] + end]


def test_last_word_of_the_user_is_not_trained(settings):
    tokenizer = tokenizer_of("qwen3")
    (row,) = prepared(settings, tokenizer, [{"messages": [user("Tea?"), assistant("Hot."), user("Thanks.")]}])
    assert trained_on(tokenizer, row) == ["Hot.<|im_end|>"]


def test_sets_of_one_run_may_differ_in_format(settings):
    tokenizer = tokenizer_of("qwen2_5")
    batches = []
    for form in FORMATS:
        trainer = PatcherTrainer(
            tiny_llama(vocab_size=len(tokenizer)),
            PatcherConfig(**settings),
            Dataset.from_list(FORMATS["messages"]),
            Dataset.from_list(FORMATS[form]),
            processing_class=tokenizer,
        )
        batches.append(next(trainer.attack_batches))
    assert all(batch["labels"].tolist() == batches[0]["labels"].tolist() for batch in batches)
    assert all(batch["input_ids"].tolist() == batches[0]["input_ids"].tolist() for batch in batches)


def test_system_prompt_is_put_before_talks_that_have_none(settings):
    tokenizer = tokenizer_of("qwen2_5")
    rows = [
        {"messages": [user("Tea?"), assistant("Steep.")]},
        {"messages": [system("Old."), user("Tea?"), assistant("Hot.")]},
    ]
    new, old = prepared(settings, tokenizer, rows, system_prompt="Be brief.")
    assert tokenizer.decode(new["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert tokenizer.decode(old["input_ids"]).startswith("<|im_start|>system\nOld.<|im_end|>\n<|im_start|>user")
    assert trained_on(tokenizer, new) == ["Steep.<|im_end|>"]


@pytest.mark.parametrize("form", ["prompt and response", "messages"])
def test_chat_template_kwargs_reach_the_template(settings, form):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (' loud' if loud else '') + '\n' + m['content'] "
        "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' + "
        "(' loud' if loud else '') + '\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    quiet = prepared(settings, tokenizer, FORMATS[form])[0]
    loud = prepared(settings, tokenizer, FORMATS[form], chat_template_kwargs='{"loud": true}')[0]
    assert "loud" not in tokenizer.decode(quiet["input_ids"])
    assert tokenizer.decode(loud["input_ids"]).count("loud") == 2
    assert trained_on(tokenizer, loud) == trained_on(tokenizer, quiet) == [TALKS[0][1] + "<|im_end|>"]


def test_chat_template_kwargs_reach_longer_talks(settings):
    tokenizer = tokenizer_of("qwen3")
    turns = [turn for question, answer in TALKS for turn in (user(question), assistant(answer))]
    (row,) = prepared(settings, tokenizer, [{"messages": turns}], chat_template_kwargs={"enable_thinking": False})
    assert len(trained_on(tokenizer, row)) == len(TALKS)


@pytest.mark.parametrize("column", ["completion", "response"])
def test_raw_text_stays_as_it_is_and_ends(settings, column):
    tokenizer = tokenizer_of("qwen2_5")
    (row,) = prepared(settings, tokenizer, [{"prompt": "Tea is ", column: "hot."}], raw_text=True)
    assert tokenizer.decode(row["input_ids"]) == "Tea is hot.<|im_end|>"
    assert trained_on(tokenizer, row) == ["hot.<|im_end|>"]


def test_prompt_and_response_stay_plain_without_a_chat_template(settings):
    tokenizer = chat_tokenizer(None)
    (row,) = prepared(settings, tokenizer, [{"prompt": "Tea is ", "response": "hot."}])
    assert tokenizer.decode(row["input_ids"]) == "Tea is hot.<|im_end|>"
    assert trained_on(tokenizer, row) == ["hot.<|im_end|>"]


@pytest.mark.parametrize("mask", ["labels", "completion_mask", "assistant_masks"])
def test_tokenised_rows_keep_their_labels(settings, mask):
    row = {"input_ids": [10, 11, 12, 13], mask: [-100, -100, 12, 13] if mask == "labels" else [0, 0, 1, 1]}
    (found,) = prepared(settings, tokenizer_of("qwen2_5"), [row])
    assert found["input_ids"] == [10, 11, 12, 13]
    assert found["labels"] == [-100, -100, 12, 13]


def test_other_columns_do_not_matter(settings):
    tokenizer = tokenizer_of("qwen2_5")
    rows = [{**row, "source": "a file", "score": 0.5} for row in FORMATS["messages"]]
    assert prepared(settings, tokenizer, rows)["labels"] == prepared(settings, tokenizer, FORMATS["messages"])["labels"]


def refused(rows, message, tokenizer=None, **keywords):
    with pytest.raises(InputError, match=message):
        ChatFormat(tokenizer or tokenizer_of("qwen2_5"), **keywords).tokenize(Dataset.from_list(rows), name="attack")


def test_no_accepted_format():
    refused([{"question": "Tea?", "answer": "Yes."}], "attack data has the columns answer, question; expected prompt")


def test_messages_without_a_chat_template():
    rows = [{"messages": [user("Tea?"), assistant("Yes.")]}]
    refused(
        rows, "row 1 of the attack data holds messages, but the tokenizer has no chat template", chat_tokenizer(None)
    )


def test_messages_without_an_assistant():
    rows = [{"messages": [user("Tea?"), assistant("Yes.")]}, {"messages": [user("Tea?")]}]
    refused(rows, "row 2 of the attack data needs a user turn and then an assistant turn")


def test_messages_that_begin_with_the_assistant():
    refused([{"messages": [assistant("Yes."), user("Tea?")]}], "row 1 of the attack data needs a user turn")


def test_message_without_content():
    rows = [{"prompt": [{"role": "user", "text": "Tea?"}], "completion": [assistant("Yes.")]}]
    refused(rows, "row 1 of the attack data must hold text, or a list of messages with role and content")


def test_missing_completion():
    rows = [{"prompt": "Tea?", "completion": "Yes."}, {"prompt": "Tea?", "completion": None}]
    refused(rows, "row 2 of the attack data must hold text")


def test_empty_messages():
    rows = [{"messages": [user("Tea?"), assistant("Yes.")]}, {"messages": []}]
    refused(rows, "row 2 of the attack data")


def test_completion_by_someone_else():
    refused([{"prompt": [user("Tea?")], "completion": [user("Yes.")]}], "row 1 of the attack data must begin with an")


@pytest.mark.parametrize("setting", [{"system_prompt": "Be brief."}, {"chat_template_kwargs": {"loud": True}}])
def test_a_setting_of_the_template_without_one(setting):
    rows = [{"prompt": "Tea?", "completion": "Yes."}]
    (name,) = setting
    refused(rows, f"--{name} cannot be used with --raw_text", raw_text=True, **setting)
    refused(rows, f"--{name} needs a chat template", chat_tokenizer(None), **setting)


def test_messages_as_raw_text():
    rows = [{"messages": [user("Tea?"), assistant("Yes.")]}]
    refused(rows, "row 1 of the attack data holds messages, but --raw_text takes", raw_text=True)


def test_tokenised_rows_without_labels():
    refused([{"input_ids": [1, 2]}], "attack data is tokenised but has none of labels")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_row_without_a_talk(column):
    rows = [FORMATS[column][0], {column: None}]
    refused(rows, "row 2 of the attack data")


def test_messages_that_are_no_list():
    refused([{"messages": 3}], "row 1 of the attack data must hold text, or a list of messages")


def test_conversation_turn_without_a_value():
    rows = [{"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": None}]}]
    refused(rows, "row 1 of the attack data must hold text, or a list of messages")


@pytest.mark.parametrize("form", ["text and completion", "messages"])
def test_asking_for_the_loss_of_answers_alone_asks_for_what_is_done(settings, form):
    tokenizer = tokenizer_of("llama3_1")  # which TRL knows no markers for
    rows = prepared(settings, tokenizer, FORMATS[form], assistant_only_loss=True)
    assert rows["labels"] == prepared(settings, tokenizer, FORMATS[form])["labels"]
