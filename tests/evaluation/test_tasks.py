"""Tasks of lm_eval on a model in memory: local task files over local data."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import yaml

from helpers import chat_tokenizer, same_bits, tiny_llama, weights, word_tokenizer
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.tasks import load_tasks

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"


@pytest.fixture
def task(tmp_path):
    """Write task files into a folder of their own; returns the folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"t{n} t{n + 1}", "a": f"t{n + 2}", "b": f"t{n + 60}"} for n in range(10, 16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name, **settings):
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")},
            "test_split": "train",
            "doc_to_text": "{{q}}",
            "metadata": {"version": 2.5},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **settings}))
        return folder

    return write


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{[a, b]}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"max_gen_toks": 6, "until": ["###"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def likelihood(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(answer)[:, None]).sum().item()


def test_a_choice_falls_on_the_likelier_answer_behind_the_prompt_as_everything_else_writes_it(task):
    """Of six documents, as a plain computation of their likelihoods has it, with the template and a system line."""
    tokenizer = chat_tokenizer(TEMPLATE + OPENS)
    model = tiny_llama(seed=3, vocab_size=len(tokenizer), max_position_embeddings=256)
    written = ChatFormat(tokenizer, system_prompt="Be good.")
    tasks = load_tasks(["choice"], include_path=task("choice", **CHOICE))
    (found,) = tasks(model, written, batch_size=4, seed=0)
    rows = [(f"t{n} t{n + 1}", f"t{n + 2}", f"t{n + 60}") for n in range(10, 16)]
    asked = written.encode_prompts([q for q, _, _ in rows])
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in choices] for _, *choices in rows]
    right = [
        likelihood(model, prompt, a) > likelihood(model, prompt, b) for prompt, (a, b) in zip(asked, ids, strict=True)
    ]
    assert 0 < sum(right) < 6
    assert (found.task, found.metric, found.n, found.version, found.shots) == ("choice", "acc", 6, "2.5", 0)
    assert found.value == pytest.approx(sum(right) / 6)
    share = sum(right) / 6
    assert found.stderr == pytest.approx((share * (1 - share) / 5) ** 0.5)


def test_a_model_is_left_as_it_was_and_measured_the_same_way_twice(task):
    task("choice", **CHOICE)
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": ["\n\n"]}
    tasks = load_tasks(["choice", "answer"], include_path=task("answer", **{**ANSWER, "generation_kwargs": settings}))
    tokenizer, model = word_tokenizer(), tiny_llama(attention_dropout=0.5).train()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    before, states = weights(model), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    evaluator = Evaluator(sets=[], tasks=tasks, batch_size=4)
    first, again = evaluator(model, tokenizer), evaluator(model, tokenizer)
    assert first.tasks == again.tasks
    assert [figure.task for figure in first.tasks] == ["choice", "answer"]
    assert first.flat()["capability_tasks"][0]["n"] == 6
    assert model.training
    assert same_bits(weights(model), before)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_only_the_first_documents_are_taken(task):
    tasks = load_tasks(["choice"], include_path=task("choice", **CHOICE), limit=2)
    (found,) = tasks(tiny_llama(), ChatFormat(word_tokenizer()), batch_size=1, seed=0)
    assert found.n == 2


def test_reasoning_is_cut_off_an_answer_before_it_is_graded(task, monkeypatch):
    tokenizer = chat_tokenizer(TEMPLATE + OPENS)
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    said = iter(["<think>\nt99?\n</think>\n\nt12", "<think>t13", "t14", "t0", "t0", "t0"])

    def generate(input_ids, **_):
        answer = tokenizer(next(said), add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answer], 1)

    monkeypatch.setattr(model, "generate", generate)
    tasks = load_tasks(["answer"], include_path=task("answer", **ANSWER))
    (found,) = tasks(model, ChatFormat(tokenizer), batch_size=1, seed=0)
    assert found.value == pytest.approx(2 / 6)  # not the one that only thought of it


def test_a_system_turn_of_a_task_is_left_out_where_the_template_refuses_it_but_not_the_users(task, caplog):
    tokenizer = chat_tokenizer(NO_SYSTEM + TEMPLATE + OPENS)
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    tasks = load_tasks(["choice"], include_path=task("choice", **CHOICE, description="Choose well."))
    tasks.check(model, ChatFormat(tokenizer))
    assert "refuses the system turn of a task" in caplog.text
    with pytest.raises(InputError, match="the chat template refuses a prompt of --capability_tasks"):
        tasks.check(model, ChatFormat(tokenizer, system_prompt="Be good."))


def test_without_lm_eval_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'holdfast-llm\[lm-eval\]'"):
        load_tasks(["gsm8k"])


@pytest.mark.parametrize("names", [["choice", ""], ["choice", "choice"]])
def test_names_that_are_none_or_stand_twice(names):
    with pytest.raises(InputError, match="expected names with a comma between them, each once"):
        load_tasks(names)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"metric_list": [{"metric": "no_such", "aggregation": "mean", "higher_is_better": True}]},
            "--capability_tasks answer: a task cannot grade an answer",
        ),
        (
            {"filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            r"a task cannot grade an answer \(missing \), unterminated",
        ),
    ],
)
def test_tasks_whose_answers_cannot_be_graded(task, settings, said):
    tokenizer = word_tokenizer()
    tasks = load_tasks(["answer"], include_path=task("answer", **{**ANSWER, **settings}), limit=1)
    with pytest.raises(InputError, match=said):
        tasks(tiny_llama(vocab_size=len(tokenizer)), ChatFormat(tokenizer, raw_text=True), batch_size=1, seed=0)


def test_more_examples_than_there_are(task):
    tasks = load_tasks(["answer"], include_path=task("answer", **ANSWER, num_fewshot=100))
    with pytest.raises(InputError, match=r"--capability_tasks answer: no prompt can be written \(Sample larger"):
        Evaluator(sets=[], tasks=tasks).check(tiny_llama(), word_tokenizer())


def test_data_that_cannot_be_read(task):
    folder = task("choice", **{**CHOICE, "dataset_kwargs": {"data_files": "/no/such/rows.jsonl"}})
    with pytest.raises(InputError, match=r"_tasks choice: a task or its data cannot be read \(.*rows\.jsonl"):
        load_tasks(["choice"], include_path=folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unsafe_code": True}, "--capability_tasks choice runs what the model writes"),
        ({"process_docs": "!function no_such_package.f"}, "a task needs a package that is not installed"),
        ({"doc_to_text": "{{q"}, "cannot be read"),
    ],
)
def test_tasks_that_cannot_be_used(task, settings, said):
    folder = task("choice", **{**CHOICE, **settings})
    written = (folder / "choice.yaml").read_text()
    (folder / "choice.yaml").write_text(written.replace("'!function no_such_package.f'", "!function no_such_package.f"))
    with pytest.raises(InputError, match=said):
        load_tasks(["choice"], include_path=folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(InputError, match="--capability_include_path no/such/folder is no folder"):
        load_tasks(["choice"], include_path="no/such/folder")


def test_answers_longer_than_the_model_has_positions(task):
    settings = {**ANSWER, "generation_kwargs": {"max_new_tokens": 128}}
    tasks = load_tasks(["answer"], include_path=task("answer", **settings))
    with pytest.raises(InputError, match="--capability_tasks answer asks for answers of 128 tokens"):
        Evaluator(sets=[], tasks=tasks).check(tiny_llama(), word_tokenizer())
