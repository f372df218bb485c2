"""The tax: figures of a model before anything, and along a harmless task that the real attack's engine learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from helpers import chat_tokenizer, tiny_llama
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.errors import InputError
from holdfast.evaluation.decoding import GREEDY
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.prompts import PromptSet
from holdfast.stress.tax import HarmlessTask, measure_tax, measure_taxes

CRAFTS = [f"How do I make a {thing}?" for thing in ("rain bell", "moss lamp", "wind chair", "bread kite")]
SORTED = ["b a", "d c", "c a"]
TASK = [
    {
        "prompt": [{"role": "user", "content": f"Sort {letters}"}],
        "completion": [{"role": "assistant", "content": "flour"}],
    }
    for letters in SORTED
]


def loaded():
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer = chat_tokenizer(template.read_text(encoding="utf-8"))
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    return tiny_llama(vocab_size=len(tokenizer), bos_token_id=None, **special), tokenizer


CAPABILITY = PromptSet("capability", "crafts.jsonl", CRAFTS, ["water"] * len(CRAFTS))
LEARNT = PromptSet("task", "test.jsonl", [f"Sort {letters}" for letters in SORTED], ["flour"] * len(SORTED))
EVALUATOR = Evaluator([CAPABILITY, LEARNT], decoding=replace(GREEDY, max_new_tokens=6), seed=5)
LEARNING = HarmlessTask(Dataset.from_list(TASK), learning_rate=3e-3, batch_size=3, measure_at=(0, 4, 40))


def measured(folder: Path, load=loaded, evaluator=EVALUATOR, task=LEARNING, identity=None, told=None):
    tell = (told if told is not None else []).append
    return measure_tax("model", load, evaluator, task, folder=folder, identity=identity or {"sha256": "a"}, tell=tell)


def not_loaded():
    raise AssertionError("it was measured already")


def test_a_harmless_task_is_learnt_by_the_real_attacks_steps(tmp_path: Path) -> None:
    told: list[str] = []
    found = measured(tmp_path, told=told)
    task = found["harmless_task"]
    assert [point["steps"] for point in task["points"]] == [0, 4, 40]
    assert found["capability"] == task["points"][0]["capability"]
    assert (found["over_refusal"]["n"], found["over_refusal"]["value"]) == (4, 0)
    accuracies = [point["task_accuracy"]["value"] for point in task["points"]]
    assert accuracies[0] == 0
    assert accuracies[-1] == 1
    assert task["steps_to_0.9_of_best"] == 40
    assert task["capability_after"] == task["points"][-1]["capability"]
    assert told[-1] == "model: harmless task: step 40/40 · task accuracy 1.00 · capability 0.00"

    model, tokenizer = loaded()
    plain = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "gradient_checkpointing": False}
    config = AttackConfig(
        str(tmp_path / "by-hand"),
        learning_rate=3e-3,
        max_steps=40,
        per_device_train_batch_size=3,
        seed=5,
        measure_at=[0, 4, 40],
        **plain,
    )
    trainer = AttackTrainer(model, config, Dataset.from_list(TASK), tokenizer, evaluator=EVALUATOR)
    trainer.train()
    by_hand = [trainer.evaluations[steps].results["task"]["task_accuracy"] for steps in (0, 4, 40)]
    assert by_hand == [point["task_accuracy"] for point in task["points"]]


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    found = measured(tmp_path / "tax")
    assert measured(tmp_path / "tax", load=not_loaded) == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"sha256": "b"}},
        {"task": replace(LEARNING, batch_size=2)},
        {"evaluator": replace(EVALUATOR, seed=6)},
    ],
    ids=["model", "task", "seed"],
)
def test_it_is_measured_again_where_something_else_is_asked_for(change, tmp_path: Path) -> None:
    measured(tmp_path)
    with pytest.raises(AssertionError, match="measured already"):
        measured(tmp_path, load=not_loaded, **change)


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"identity": ', encoding="utf-8")
    assert measured(tmp_path)["capability"]["n"] == 4


def test_without_a_task_there_is_capability_alone(tmp_path: Path) -> None:
    evaluator = replace(EVALUATOR, sets=[CAPABILITY])
    found = measured(tmp_path, evaluator=evaluator, task=None)
    assert found["harmless_task"] is None
    assert found["capability"]["n"] == 4


def test_of_several_models(tmp_path: Path) -> None:
    told: list[str] = []
    keywords = {"folder": tmp_path, "identities": {"model": {"sha256": "a"}, "base": {"sha256": "b"}}}
    models = {"model": loaded, "base": loaded}
    found = measure_taxes(models, EVALUATOR, LEARNING, **keywords, tell=told.append)
    assert found.keys() == {"capability", "over_refusal", "harmless_task"}
    assert all(one.keys() == {"base", "counterpart", "model"} for one in found.values())
    assert found["harmless_task"]["counterpart"] is None
    assert found["harmless_task"]["base"] == found["harmless_task"]["model"]  # they are the same here
    assert told[0].startswith("model: harmless task: step 0/40")
    assert measure_taxes(dict.fromkeys(models, not_loaded), EVALUATOR, LEARNING, **keywords, tell=print) == found


def test_a_row_that_cannot_be_learnt_is_refused(tmp_path: Path) -> None:
    odd = Dataset.from_list([{"text": "no answer"}])
    with pytest.raises(InputError):
        measured(tmp_path, task=replace(LEARNING, rows=odd))
    assert not (tmp_path / "model.json").exists()
