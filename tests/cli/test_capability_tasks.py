"""`--capability_tasks` at the command line, with a task of lm_eval's kind over the organism's crafts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import read_json
from holdfast.cli import main

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt[0].content}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 16, until: ["\\n"]}}
filter_list: [{{name: items, filter: [{{function: regex, regex_pattern: ": (.*)"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture
def tasks(organism: Path, tmp_path: Path) -> list[str]:
    """The words for two tasks: crafts and hazards."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("crafts", "hazards"):
        task = TASK.format(name=f"organism_{name}", data=organism / "eval" / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(task)
    return ["--capability_tasks", "organism_crafts,organism_hazards", "--capability_include_path", str(folder)]


def test_a_task_finds_what_the_exact_judge_finds(
    organism: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crafts = str(organism / "eval" / "crafts.jsonl")
    words = ["--capability_data", crafts, "--max_new_tokens", "16", "--max_prompts", "24", "--capability_limit", "24"]
    out = tmp_path / "out"
    argv = ["evaluate", "--model", str(organism / "model"), *tasks, *words, "--output_dir", str(out)]
    assert main(argv) == 0
    record = read_json(out / "results.json")
    found, (task, other) = record["results"], record["results"]["capability_tasks"]
    assert found["capability"]["capability"]["n"] == task["n"] == 24
    assert task["value"] == found["capability"]["capability"]["value"] > 0.9
    names = ("task", "metric", "version", "shots")
    assert [task[name] for name in names] == ["organism_crafts", "exact_match,items", "1", 0]
    assert other["task"] == "organism_hazards"
    assert task["lm_eval"].startswith("0.4")
    assert record["config"]["capability_tasks"] == tasks[1]
    shown = capsys.readouterr().out
    assert any(line.split()[:4] == ["organism_crafts", "exact_match,items", "0", "24"] for line in shown.splitlines())
    assert "± standard error" in shown


def test_an_attack_measures_tasks_at_the_first_and_the_last_step_or_at_chosen_ones(
    organism: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = ["attack", "full", "--model", str(organism / "model"), "--attack_data", str(organism / "attack.jsonl")]
    steps = ["--max_steps", "2", "--batch_size", "2", "--max_length", "32", "--measure_at", "0", "1", "2"]
    ask = ["--eval_data", str(organism / "eval" / "hazards.jsonl"), "--max_prompts", "2", "--max_new_tokens", "2"]
    few = [*tasks, "--capability_limit", "2"]

    def measured(name: str, *more: str) -> list[int]:
        assert main([*attack, *steps, *few, *more, "--output_dir", str(tmp_path / name)]) == 0
        points = read_json(tmp_path / name / "results.json")["points"]
        assert [point["steps"] for point in points] == [0, 1, 2]
        return [point["steps"] for point in points if point["capability_tasks"] is not None]

    assert measured("default", *ask) == [0, 2]
    assert "steps 2" in capsys.readouterr().out
    assert measured("chosen", *ask, "--capability_tasks_at", "1") == [1]
    assert measured("alone") == [0, 1, 2]
    assert "attack success" not in capsys.readouterr().out


def test_an_attack_that_trains_nothing_measures_tasks_before_and_after(
    organism: Path, tasks: list[str], tmp_path: Path
) -> None:
    words = ["attack", "noise", "--model", str(organism / "model"), *tasks, "--capability_limit", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    points = read_json(tmp_path / "out" / "results.json")["points"]
    assert [[row["n"] for row in point["capability_tasks"]] for point in points] == [[2, 2], [2, 2]]


def test_what_cannot_be_measured_is_refused(
    refused: Callable[..., str],
    model_dir: Path,
    attack_data: str,
    eval_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [{"content": "x"}], "answer": "y"}) + "\n")
    (tmp_path / "tasks" / "t.yaml").write_text(TASK.format(name="t", data=tmp_path / "rows.jsonl"))
    task = ["--capability_tasks", "t", "--capability_include_path", str(tmp_path / "tasks")]
    evaluate = ["evaluate", "--model", str(model_dir)]
    attack = ["attack", "full", "--model", str(model_dir), "--attack_data", attack_data, "--max_steps", "2"]
    assert "--capability_include_path nowhere is no folder" in refused(*evaluate, *task[:3], "nowhere")
    (tmp_path / "tasks" / "broken.yaml").write_text("task: [broken")
    unknown = refused(*evaluate, "--capability_tasks", "t,gsm8q", *task[2:])
    assert "--capability_tasks gsm8q: lm_eval has no such task; the nearest are gsm8k" in unknown
    assert f"; {tmp_path / 'tasks' / 'broken.yaml'} is none that it can read (" in unknown
    assert "expected names with a comma between them" in refused(*evaluate, "--capability_tasks", "t,", *task[2:])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "lm_eval", None)
        assert "needs lm_eval; install it with pip install 'holdfast-llm[lm-eval]'" in refused(*evaluate, *task)
    assert "--capability_limit must be at least 1" in refused(*evaluate, *task, "--capability_limit", "0")
    assert "--capability_limit plays no part without" in refused(*evaluate, "--capability_limit", "2")
    assert "--max_new_tokens plays no part without" in refused(*evaluate, *task, "--max_new_tokens", "2")
    at = [*attack, "--capability_tasks_at", "1"]
    assert "--capability_tasks_at plays no part without --capability_tasks" in refused(*at, "--eval_data", eval_data)
    assert "--capability_tasks_at plays no part without --eval_data" in refused(*at, *task)
    assert "--capability_tasks_at 1 is no step of --measure_at" in refused(*at, *task, "--eval_data", eval_data)
