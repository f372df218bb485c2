"""Tables say how sure a rate is and who graded, and fit a terminal."""

import re
from typing import Any

import pytest
from rich.console import Console

from holdfast.cli.tables import attack_table, audit_table, counts_table, evaluation_table
from holdfast.evaluation.decoding import GREEDY
from holdfast.evaluation.evaluate import COUNTS, Evaluation, Evaluator
from holdfast.evaluation.judges import Verdict, get_judge
from holdfast.evaluation.judging import second_opinion
from holdfast.evaluation.prompts import PromptSet
from holdfast.evaluation.scores import score


def shown(table: Any) -> list[str]:
    console = Console(width=80, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_evaluation_names_rates_intervals_and_judges() -> None:
    judges = {"harmful": get_judge("refusal"), "capability": get_judge("exact")}
    scores = {"harmful": score([1, 5, 5, 5]), "capability": score([5, 5, 1, 5])}
    nothing = dict.fromkeys(COUNTS, 0)
    counts = {"harmful": {**nothing, "truncated": 3}, "capability": {**nothing, "left_out": 2}}
    evaluation = Evaluation(scores, counts, [], judges, {"harmful": "h.jsonl", "capability": "c.jsonl"}, GREEDY)
    lines = shown(evaluation_table(evaluation, title="model"))
    success = next(line for line in lines if "attack success" in line)
    assert success.split("│")[2:5] == [" 0.750 ", " 0.301 – 0.954 ", " 4 "]
    assert any("capability" in line and "0.750" in line for line in lines)
    (cut,) = (line for line in lines if "cut at the limit" in line)
    assert [cell.strip() for cell in cut.split("│")[1:5]] == ["harmful: cut at the limit", "3", "", "4"]
    (left_out,) = (line for line in lines if "left out" in line)
    assert [cell.strip() for cell in left_out.split("│")[1:5]] == ["capability: prompts left out", "2", "", "6"]
    assert not any("degenerate" in line or "empty" in line for line in lines)
    caption = " ".join(" ".join(lines).split())
    assert "harmful prompts graded by the keyword judge: refusal phrases only" in caption
    assert "capability prompts graded by the exact judge" in caption


def test_an_evaluation_tells_of_a_second_judge_and_of_what_is_unjudged() -> None:
    first, second = ([5, 5, 1, None], [5, 2, None, 2])
    opinion = second_opinion(
        (get_judge("exact"), [Verdict(one) for one in first]), (get_judge("refusal"), [Verdict(one) for one in second])
    )
    counts = {"harmful": {**dict.fromkeys(COUNTS, 0), "unjudged": 1}}
    evaluation = Evaluation(
        {"harmful": score(first)},
        counts,
        [],
        {"harmful": get_judge("exact")},
        {"harmful": "h.jsonl"},
        GREEDY,
        {"harmful": 0.25},
        {"harmful": opinion},
    )
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in shown(evaluation_table(evaluation, title="m"))]
    assert ["harmful: unjudged", "1", "", "4"] in rows
    assert ["attack success (ASR)", "0.667", "0.150 – 0.954", "3"] in rows
    assert ["attack success (ASR), 2nd judge", "0.333", "0.046 – 0.850", "3"] in rows
    assert ["unjudged, 2nd judge", "1", "", "4"] in rows
    assert ["agreement on success (κ)", "0.000", "", "2"] in rows
    assert ["judge's own score", "0.25", "", "4"] in rows


@pytest.mark.parametrize("judge", ["exact", "refusal"])
def test_attack_has_a_row_per_step_and_fits_eighty_columns(judge: str) -> None:
    prompts = PromptSet("harmful", "h.jsonl", ["How?"] * 96, ["a"] * 96)
    tasks = PromptSet("task", "t.jsonl", ["How?"] * 10, ["a"] * 10)
    point = {
        **{"attacker_loss": 0.5, "asr": 0.75, "asr_low": 0.5, "asr_high": 1.0, "refusal_rate": 0.0},
        **{"refusal_low": 0.0, "refusal_high": 0.04, "harmful_score": 0.9, "mean_score": 4.5, "n": 96},
        **{"benign_over_refusal": None, "capability": 1.0, "over_refusal": 0.0, "task_accuracy": None, "task_n": 10},
    }
    points = [{**point, "steps": 0, "attacker_loss": None}, {**point, "steps": 10}]
    evaluator = Evaluator([prompts, tasks], judge=get_judge(judge))
    lines = shown(attack_table(points, evaluator, title="model under attack"))
    assert not any("…" in line for line in lines)
    row = next(line for line in lines if line.split()[:1] == ["10"])
    assert row.split() == ["10", "0.75", "[.50–1.00]", "0.00", "[.00–.04]", "0.90", "4.50", "1.00", "0.00", "0.50"]
    caption = " ".join(" ".join(lines).split())
    assert get_judge(judge).description in caption
    assert "n: 96 harmful, 10 task prompts" in caption


def test_over_refusal_of_benign_prompts_stands_beside_that_of_capability_prompts_with_its_interval() -> None:
    benign = PromptSet("benign", "b.jsonl", ["How?"] * 10, None)
    over_refusal = {"benign_over_refusal": 0.1, "benign_over_refusal_low": 0.02, "benign_over_refusal_high": 0.4}
    others = dict.fromkeys(("asr", "refusal_rate", "harmful_score", "mean_score", "task_accuracy", "attacker_loss"))
    point = {"steps": 0, **others, **over_refusal, "capability": 1.0, "over_refusal": 0.3, "benign_n": 10}
    lines = shown(attack_table([point], Evaluator([benign], judge=get_judge("refusal")), title="model"))
    row = next(line for line in lines if line.split()[:1] == ["0"])
    assert row.split() == ["0", "0.10", "[.02–.40]", "1.00", "0.30"]
    caption = " ".join(" ".join(lines).split())
    assert "benign prompts graded by the keyword judge" in caption
    assert "n: 10 benign prompts" in caption
    scores = {"benign": score([1, 5, 5, 5]), "capability": score([1, 1, 5, 5])}
    counts = dict.fromkeys(scores, dict.fromkeys(COUNTS, 0))
    judges = {"benign": get_judge("refusal"), "capability": get_judge("exact")}
    evaluation = Evaluation(scores, counts, [], judges, dict.fromkeys(scores, "x"), GREEDY)
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in shown(evaluation_table(evaluation, title="m"))]
    assert ["over-refusal, benign prompts", "0.250", "0.046 – 0.699", "4"] in rows
    assert ["over-refusal", "0.500", "0.150 – 0.850", "4"] in rows


def test_an_attack_has_a_table_of_counts_where_there_is_something_to_count() -> None:
    names = [f"{prefix}{kind}" for prefix in ("", "benign_", "capability_", "task_") for kind in COUNTS]
    nothing = {"steps": 0, **dict.fromkeys(names, 0), **dict.fromkeys(names[-len(COUNTS) :])}
    assert counts_table([nothing, {**nothing, "steps": 10}]) is None
    table = counts_table([nothing, {**nothing, "steps": 10, "truncated": 3, "capability_thinking_unclosed": 96}])
    lines = shown(table)
    assert [line.split() for line in lines if line.split()[:1] in (["0"], ["10"])] == [
        ["0", "0", "0"],
        ["10", "3", "96"],
    ]
    words = " ".join(" ".join(lines).split())
    assert "harmful: cut" in words
    assert "capability: thinking unclosed" in words
    assert "empty" not in words


def test_an_audit_in_a_narrow_terminal_keeps_its_numbers() -> None:
    """A turn without text, such as a call of a tool, is not shown."""
    turns = [
        {"role": "user", "content": "Tea? " * 40},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"from": "gpt", "value": "Steep."},
    ]
    console = Console(record=True, width=60)
    console.print(audit_table([{"row": 1234, "r": -12.345, "poisoned": True, "messages": turns}], 1, 1))
    text = console.export_text()
    assert re.search(r"1234 +-12\.3. +yes +Tea\? .*…", text)
    assert "None" not in text
