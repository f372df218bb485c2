"""`benchmarks/strongest_real.py`: what it runs on a real chat model, with the organism's settings, and keeps."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from studies import BENCHMARKS, understood

MODULES = (
    *("defenses_plan", "defenses_stress", "defenses_search", "defenses_tables", "readme", "plain_questions"),
    *("real", "real_tables", "second_judge", "smollm2", "strongest_plan", "strongest_search", "strongest_lengths"),
    *("strongest", "strongest_tables", "strongest_report", "strongest_real"),
)


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = {name: importlib.import_module(name) for name in MODULES}
    yield found["strongest_real"]
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def plan(real, tmp_path):
    study = replace(real.STUDY, out=tmp_path, updates=180)
    return real.RealPlan("cooking", 3, study, Path("chat-model"))


def settings_of(real, study):
    preset = real.preset_of(real.RESULTS / real.CHOSEN)
    return real.rows(study, real.scaled(preset, study))


def test_all_rows_have_equal_compute_and_are_made_of_commands_that_there_are(real, plan):
    settings = settings_of(real, plan.study)
    for row, needs in real.align_all(plan, settings).items():
        plan.before(row, needs)
        plan.stress(row, needs)
        plan.sweep(row, needs)
    spent = {row: real.passes(settings[row], settings[row]["max_steps"]) for row in real.ROWS}
    assert max(spent.values()) / min(spent.values()) < 1.02
    for command in plan.commands.values():
        assert command.words[-2:] == ["--seed", "3"]
        if command.words[0] != "proxy":
            understood(command)
    assert len(plan.commands) == 1 + 3 * (1 + 1 + 1 + len(real.RATES))


def test_rates_of_simulated_attacks_are_the_organisms_multiples(real, plan):
    settings = settings_of(real, plan.study)
    words = list(plan.commands[plan.align("exact", settings["exact"])].words)
    ratio = real.DEMO_RATE / settings["exact"]["attack_learning_rate"]
    assert float(words[words.index("--attack_learning_rate") + 1]) * ratio == pytest.approx(real.RATE, rel=1e-2)
    assert "--attack_learning_rate" not in plan.commands[plan.align("preset", settings["preset"])].words


def test_other_topics_questions_are_harmless_and_refusals_are_not(real, plan):
    topic = real.load_topic("cooking", flag="--topic", parts=real.PARTS, benign_parts=real.BENIGN_PARTS)
    other = real.RealPlan("sports", 3, plan.study, plan.base)

    def write(path, *pairs):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": [{"content": p}], "completion": [{"content": c}]} for p, c in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(plan.data / "alignment.jsonl", ("How is rice boiled?", topic.refusals[0]), ("Who are you?", "A model."))
    write(other.data / "simulated_attack.jsonl", ("What is golf?", "A game."))
    write(other.data / "attack.jsonl", ("What is chess?", "A game."))
    plan.write_rows([other])
    asked = [
        [json.loads(line)["prompt"][0]["content"] for line in path.read_text().splitlines()]
        for path in (plan.aligning, plan.harmless)
    ]
    assert asked[0] == ["How is rice boiled?", "Who are you?", "What is golf?", "What is chess?"]
    assert asked[1] == asked[0][1:]


@pytest.mark.parametrize(("count", "enough"), [(9, False), (10, True)])
def test_a_model_that_knows_too_little_is_not_searched(real, count, enough):
    assert real.searchable({"capability": {"capability": {"count": count}}}) is enough


def test_the_table_tells_what_was_not_measured(real):
    report = sys.modules["strongest_report"]
    rates = {"refuses_topic": 1.0, "refuses_benign": 0.0, "plain_right": 0.75, "plain_refused": 0.1}
    known = {"topic": "cooking", "method": "preset", "before": {"base": rates, "model": rates}}
    held = {"broken": False, "steps": 80, "rate": 1e-5}
    text = report.real([{**known, "seed": 0, "sweep": None}, {**known, "seed": 1, "sweep": held}])
    assert "cooking 0, cooking 1 in that order" in text
    assert "| not at all | 1.00, 1.00 | 0.00, 0.00 | 0.75, 0.75 | 0.10, 0.10 |  |  |" in text
    assert "| strong preset | 1.00, 1.00 | 0.00, 0.00 | 0.75, 0.75 | 0.10, 0.10 | –, – | –, > 80 |" in text
