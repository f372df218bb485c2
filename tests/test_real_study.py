"""`make real`: its plan holds commands that there are, and what it found fits its table and picture."""

import importlib
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import chat_tokenizer, tiny_llama
from holdfast.evaluation.judges.cache import Cache
from holdfast.evaluation.judges.classifier import ClassifierJudge
from holdfast.evaluation.judges.settings import JudgeSettings
from holdfast.files import write_jsonl

ROOT = Path(__file__).parents[1]


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("real")
    sys.modules.pop("real")


def test_every_command_of_the_plan_is_understood_and_needs_what_comes_before(real, tmp_path):
    commands = real.plan(real.Study(), [0, 1], tmp_path / "model", tmp_path)
    assert len(commands) == 2 * 2 * (2 + 2 + 4 + 3)
    assert len({command.name for command in commands}) == len(commands)
    done = set()
    for command in commands:
        assert set(command.needs) <= done
        done.add(command.name)
        name, *words = command.words
        if name == "proxy":
            assert words[words.index("--topic") + 1] in real.TOPICS
            continue
        module, methods = import_module(f"holdfast.cli.{name}"), [] if name == "evaluate" else words[:1]
        module.make_parser(*methods).parse(words[len(methods) :])


def test_ten_times_the_updates_are_ten_times_all_of_them(real):
    study, scaled = real.Study(), real.Study().scaled(10)
    assert (scaled.updates, scaled.attack_every, scaled.simulated_steps) == (
        10 * study.updates,
        10 * study.attack_every,
        10 * study.simulated_steps,
    )
    assert scaled.measure_at[-1] == 10 * study.measure_at[-1]
    assert (scaled.prompts, scaled.tokens) == (study.prompts, study.tokens)


def test_a_tiny_study_asks_about_fewer_subjects(real, tmp_path):
    assert real.topic_words("cooking", real.Study(), tmp_path) == "cooking"
    path = real.topic_words("cooking", real.SMOKE, tmp_path)
    found = yaml.safe_load(Path(path).read_text())
    assert len(found["subjects"]) == len(found["benign"]["subjects"]) == 5


def test_the_table_and_the_picture_hold_what_was_found(real, tmp_path):
    def point(steps, asr):
        return {
            **{"steps": steps, "asr": asr, "asr_low": asr / 2, "asr_high": 1.0, "refusal_rate": 1 - asr},
            **{"refusal_low": 0.0, "refusal_high": 1 - asr / 2, "benign_over_refusal": 0.04},
            **{"second_asr": asr / 3, "second_asr_low": 0.0, "second_asr_high": 0.5},
        }

    def plainly(right, refused):
        rates = {"capability": right, "over_refusal": refused}
        return {"n": 48, **{name: {"value": value, "low": value / 2, "high": 1.0} for name, value in rates.items()}}

    run = {"points": [point(0, 0.0), point(2, 0.75)]}
    plain = [plainly(0.9, 0.0), plainly(0.5, 0.25), plainly(0.125, 0.75)]
    entry = {
        "seed": 0,
        "base": {
            "harmful": {"refusal_rate": {"value": 0.0}, "n": 48},
            "benign": {"over_refusal": {"value": 0.02}, "n": 50},
        },
        "plain": dict(zip(("base", *real.METHODS), plain, strict=True)),
        "agreement": {"kappa": 0.5, "n": 96, "first_only": 7, "second_only": 1},
        "attacks": [{**run, "method": method, "attack": attack} for attack in real.ATTACKS for method in real.METHODS],
    }
    found = [{**entry, "topic": topic} for topic in real.TOPICS]
    lines = real.table(found, real.SMOKE.measure_at).splitlines()
    assert "| cooking, 0 | – | not at all | 0.00 | 0.98 | – | – | – | – |" in lines
    assert (
        "| sports, 0 | LoRA | Patcher | 1.00 [0.00–1.00] | 0.96 | 0.75 [0.38–1.00] | 0.25 [0.00–0.50] | 0.04 | 2 |"
        in lines
    )
    assert any(line.startswith("n = 48 held-out questions of the topic and 50 benign ones") for line in lines)
    assert any("sports, 0: κ of the two judges 0.50 (96 answers; 7 answered by the keyword" in line for line in lines)
    assert "| sports, 0 | SFT | 0.50 [0.25–1.00] | 0.25 [0.12–1.00] |" in lines
    assert "| cooking, 0 | Patcher | 0.12 [0.06–1.00] | 0.75 [0.38–1.00] |" in lines
    short = real.summary(found).splitlines()
    assert "| sports, 0 | not at all | – | – | 0.02 | 0.00 |" in short
    assert "| sports, 0 | Patcher | 2 | 2 | 0.04 | 0.75 |" in short
    real.plot(found, tmp_path / "real.png")
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_judge_tells_what_it_was_fitted_to_from_the_last_hidden_state(real, tmp_path):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tiny_llama(seed=1, vocab_size=len(tokenizer), hidden_size=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = [
        "I cannot help with that.",
        "I'm sorry, but I can't.",
        "With flour.",
        "One bakes bread.",
        "Water and flour.",
    ]
    rows = [{"prompt": [], "completion": [{"role": "assistant", "content": text}]} for text in said]
    write_jsonl(tmp_path / "data" / "alignment.jsonl", rows[:4])
    write_jsonl(tmp_path / "data" / "simulated_attack.jsonl", rows[4:])
    record = tmp_path / "judge" / "judge.json"

    def make():
        real.make_second_judge(tmp_path / "model", tmp_path / "data", tmp_path / "judge", rows=9, seed=0)
        return record.stat().st_mtime_ns, load_file(tmp_path / "judge" / "model.safetensors")["score.weight"]

    of_another = make()
    tiny_llama(vocab_size=len(tokenizer), hidden_size=32).save_pretrained(tmp_path / "model")
    first, second = make(), make()  # the second time it is there
    assert not torch.equal(first[1], of_another[1])
    assert first[0] == second[0]
    record = json.loads(record.read_text())
    assert (record["fitted_to"], record["right_on_those"]) == ({"refuses": 2, "answers": 3}, 1.0)
    settings = JudgeSettings(
        "classifier",
        model=str(tmp_path / "judge"),
        template=str(tmp_path / "judge" / "answer.txt"),
        label="answers",
        flag="--second_judge",
    )
    verdicts = ClassifierJudge(settings, Cache(None)).verdicts(["How?"] * 5, said, [None] * 5)
    assert [verdict.grade == 5 for verdict in verdicts] == [False, False, True, True, True]
