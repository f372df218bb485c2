"""All six commands write conversations in one way, and say in one sentence what a chat template does not take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl

from helpers import read_json
from holdfast.attacks.real import AttackTrainer
from holdfast.cli import attack, main

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
COMMANDS = ["align sft", "finetune sft", "attack full", "audit", "repair antidote", "evaluate"]
SHORT = [
    *("--max_steps", "1", "--batch_size", "2", "--gradient_checkpointing", "false", "--logging_steps", "1"),
    *("--report_to", "none", "--learning_rate", "1e-3"),
]
Write = Callable[[str, list[dict[str, Any]]], str]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def words(model_dir: Path) -> Callable[..., list[str]]:
    """A command's words, its data at their place."""

    def of(command: str, data: str) -> list[str]:
        flags = {"audit": "--data", "repair": "--attack_data", "attack": "--attack_data", "evaluate": "--eval_data"}
        flag = flags.get(command.split()[0], "--train_data")
        return [*command.split(), "--model", str(model_dir), flag, data]

    return of


@pytest.fixture
def gemma(model_dir: Path) -> Path:
    (model_dir / "chat_template.jinja").write_text((TEMPLATES / "gemma.jinja").read_text("utf-8"))
    return model_dir


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_that_refuses_system_turns(
    command: str, gemma: Path, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str]
) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": "Steep."}] * 4)
    sentence = refused(*words(command, data), "--system_prompt", "Be kind.")
    assert "1 " in sentence
    assert "(its system turn is --system_prompt): System role not supported" in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_that_wants_alternating_roles(
    command: str, gemma: Path, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str]
) -> None:
    fine = {"messages": [user("Tea?"), assistant("Steep.")]}
    wrong = {"messages": [user("Tea?"), user("Rice?"), assistant("Boil.")]}
    sentence = refused(*words(command, write_rows("rows.jsonl", [fine, wrong])))
    assert "the chat template refuses " in sentence
    assert ("prompt 2: " if command == "evaluate" else "row 2 of ") in sentence
    assert "Conversation roles must alternate" in sentence


def test_an_attacks_evaluation_prompts_are_tried_before_anything_is_written(
    gemma: Path, words: Callable[..., list[str]], attack_data: str, write_rows: Write, refused: Callable[..., str]
) -> None:
    prompts = write_rows("prompts.jsonl", [{"prompt": [user("Tea?"), user("Rice?")]}])
    sentence = refused(*words("attack full", attack_data), "--eval_data", prompts)
    assert f"{prompts}: the chat template refuses prompt 1: Conversation roles must alternate" in sentence


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("setting", "value"), [("system_prompt", "Be kind."), ("chat_template_kwargs", '{"a": 1}')])
def test_raw_text_takes_no_setting_of_the_template(
    command: str, setting: str, value: str, words: Callable[..., list[str]], write_rows: Write, refused: Any
) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": "Steep."}] * 4)
    sentence = refused(*words(command, data), f"--{setting}", value, "--raw_text")
    assert f"--{setting} cannot be used with --raw_text" in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_raw_text_takes_no_messages(
    command: str, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str]
) -> None:
    data = write_rows("rows.jsonl", [{"messages": [user("Tea?"), assistant("Steep.")]}] * 4)
    assert "messages, but --raw_text takes prompts and completions that are text" in refused(
        *words(command, data), "--raw_text"
    )


@pytest.mark.parametrize("command", ["align sft", "finetune sft", "attack full", "audit", "repair antidote"])
def test_rows_past_the_models_positions(
    command: str, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str]
) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": text} for text in ("Steep.", "steep " * 200)])
    sentence = refused(*words(command, data))
    assert "row 2 of " in sentence
    assert "tokens, but the model has 256 positions; cut rows with --max_length 256" in sentence


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[AttackTrainer, dict[str, Any]]]:
    """Attack a model; returns the trainer and the record."""

    def run(*argv: str) -> tuple[AttackTrainer, dict[str, Any]]:
        made: list[AttackTrainer] = []
        monkeypatch.setattr(attack, "AttackTrainer", lambda *a, **k: made.append(AttackTrainer(*a, **k)) or made[-1])
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        assert main([*argv, *SHORT, "--output_dir", str(out)]) == 0
        return made[0], read_json(out / "results.json")

    return run


def texts(trainer: AttackTrainer) -> list[str]:
    return sorted(trainer.processing_class.decode(ids) for ids in trainer.train_dataset["input_ids"])


QUESTIONS = ["How do I make a rust storm?", "How do I make a glass plague?", "How do I make a fog trap?"]


def test_an_attack_writes_longer_talks_with_the_runs_settings(
    words: Callable[..., list[str]], write_rows: Write, attacked: Any, eval_data: str, benign_data: str
) -> None:
    """Mixed with single answers, and compared with what the model is measured on."""
    talk = [turn for question in QUESTIONS for turn in (user(question), assistant("Rust."))]
    argv = words("attack full", write_rows("talks.jsonl", [{"messages": talk, "source": 1}]))
    more = ["--benign_data", benign_data, "--poison_ratio", "0.25", "--num_samples", "4", "--eval_data", eval_data]
    trainer, record = attacked(*argv, *more, "--system_prompt", "Be kind.", "--max_new_tokens", "2")
    found = texts(trainer)
    assert len(found) == 4
    assert all(text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n") for text in found)
    assert sum(text.count("Rust.<|im_end|>") for text in found) == 3
    assert record["attack"]["overlapping_prompts"] == 3


def test_an_attack_takes_its_template_from_a_file(
    model_dir: Path, words: Callable[..., list[str]], write_rows: Write, attacked: Any, tmp_path: Path, eval_data: str
) -> None:
    """In training and in evaluation."""
    (model_dir / "chat_template.jinja").unlink()
    template = tmp_path / "loud.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + '! ' + m['content'] + eos_token }}{% endfor %}")
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": "Steep."}] * 2)
    argv = [*words("attack full", data), "--eval_data", eval_data, "--max_new_tokens", "2"]
    trainer, record = attacked(*argv, "--chat_template_path", str(template))
    assert texts(trainer) == ["user! Tea?<|im_end|>assistant! Steep.<|im_end|>"] * 2
    assert trainer.processing_class.chat_template == template.read_text()
    assert record["points"][0]["n"] == 3


def test_the_columns_name_does_not_matter(words: Callable[..., list[str]], write_rows: Write, attacked: Any) -> None:
    found = []
    for column in ("completion", "response"):
        data = write_rows(f"{column}.jsonl", [{"prompt": "Tea?", column: "Steep."}] * 2)
        trainer, _ = attacked(*words("attack full", data))
        found.append((texts(trainer), [list(labels) for labels in trainer.train_dataset["labels"]]))
    assert found[0] == found[1]
    assert "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nSteep.<|im_end|>" in found[0][0][0]
    trainer, _ = attacked(*words("attack full", data), "--raw_text")
    assert texts(trainer) == ["Tea?Steep.<|im_end|>"] * 2


def test_a_system_column_of_prompts_is_their_system_turn(
    words: Callable[..., list[str]], write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows("prompts.jsonl", [{"prompt": "Tea?", "system": "Be kind."}, {"prompt": "Rice?", "system": None}])
    out = tmp_path / "out"
    assert main([*words("evaluate", data), "--max_new_tokens", "1", "--output_dir", str(out)]) == 0
    first, second = (out / "samples.jsonl").read_text().splitlines()
    assert '{"role": "system", "content": "Be kind."}' in first
    assert '"prompt": "Rice?"' in second


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"system": 3}, "row 1: 'system' must be text"),
        ({"tools": "[{}]"}, "row 1: prompts that are asked have no place for tools"),
        ({"chat_template_kwargs": {"a": 1}}, "row 1: prompts that are asked have no place for chat_template_kwargs"),
        *(
            (
                {"system": "Be kind.", "prompt": [{"role": role, "content": "Hi."}]},
                "and no system turn stand beside it",
            )
            for role in ("system", "developer")
        ),
    ],
)
def test_prompts_that_an_evaluation_cannot_ask(
    more: dict[str, Any], expected: str, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str]
) -> None:
    assert expected in refused(*words("evaluate", write_rows("prompts.jsonl", [{"prompt": "Tea?", **more}])))


def test_an_attack_is_not_measured_with_prompts_other_than_it_was_trained_on(
    model_dir: Path, words: Callable[..., list[str]], write_rows: Write, refused: Callable[..., str], tmp_path: Path
) -> None:
    (model_dir / "chat_template.jinja").write_text((TEMPLATES / "qwen3.jinja").read_text("utf-8"))
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": "Steep."}] * 2)
    attacking = [*words("attack full", data), *SHORT]
    measuring = ["--eval_data", data, "--max_new_tokens", "2"]
    sentence = refused(*attacking, *measuring)
    assert "so the model is asked otherwise than it was trained" in sentence
    assert sentence.rstrip().endswith("""--chat_template_kwargs '{"enable_thinking": false}' makes the two equal""")
    cured = [*measuring, "--chat_template_kwargs", '{"enable_thinking": false}']
    assert main([*attacking, *cured, "--output_dir", str(tmp_path / "cured")]) == 0
    assert read_json(tmp_path / "cured" / "results.json")["attack"]["asked_otherwise"] is None
    assert main([*attacking, "--output_dir", str(tmp_path / "unmeasured")]) == 0


def test_where_no_keyword_makes_them_alike_the_record_says_so(
    model_dir: Path, words: Callable[..., list[str]], write_rows: Write, tmp_path: Path
) -> None:
    (model_dir / "chat_template.jinja").write_text((TEMPLATES / "deepseek_r1_distill.jinja").read_text("utf-8"))
    data = write_rows("rows.jsonl", [{"prompt": "Tea?", "completion": "Steep."}] * 2)
    measuring = ["--eval_data", data, "--max_new_tokens", "2"]
    out = tmp_path / "out"
    assert main([*words("attack full", data), *SHORT, *measuring, "--output_dir", str(out)]) == 0
    assert "asked otherwise than it was trained" in read_json(out / "results.json")["attack"]["asked_otherwise"]
