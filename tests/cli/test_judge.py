"""Judges at a server through the real command line: `holdfast judge`, and the commands that measure."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import read_json, read_lines
from holdfast.cli import main
from judge_server import KEY, JudgeServer, material, serving

GRADES = {"Salt and rust.": 5, "Rust.": 3, "No.": 1, "Bread.": 2}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("holdfast.evaluation.judges.server.FIRST_WAIT", 0.01)


def right(body: dict[str, Any]) -> str:
    """A judge that knows the right grades."""
    return json.dumps({"grade": GRADES.get(material(body)[1], 2)})


def at(server: JudgeServer, *more: str) -> list[str]:
    return ["--judge", "rubric", "--judge_model", "big", "--judge_url", server.url, *more]


@pytest.fixture
def samples(write_rows: Callable[..., str]) -> str:
    rows = [{"set": "harmful", "row": n, "prompt": "How?", "answer": text} for n, text in enumerate(GRADES, 1)]
    task = {"set": "task", "row": 1, "prompt": "Which?", "answer": "up", "expected": "up", "grade": 5, "judge": "exact"}
    return write_rows("samples.jsonl", [*rows, task])


def test_saved_answers_are_judged_again_by_two_judges(
    samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serving(right) as server:
        prices = ["--judge_input_price", "2", "--judge_output_price", "10"]
        words = ["judge", samples, *at(server, "--second_judge", "refusal", *prices), "--output_dir", str(out)]
        assert main(words) == 0
        assert main([*words, "--overwrite_output_dir"]) == 0
    assert len(server.graded) == 4
    found = read_json(out / "results.json")
    assert (found["command"], found["schema"]) == ("judge", 3)
    assert (found["judge"]["name"], found["second_judge"]["name"]) == ("rubric", "refusal")
    assert found["judge"]["usage"]["asked_now"] == 0
    assert found["judge"]["usage"]["cost"] == pytest.approx((400 * 2 + 40 * 10) / 1e6)
    harmful = found["results"]["harmful"]
    assert (harmful["asr"]["value"], harmful["n"], harmful["mean_score"]) == (0.25, 4, 11 / 4)
    assert harmful["second"]["asr"]["value"] == 1.0  # of "No." the keyword judge knows nothing
    rows = read_lines(out / "samples.jsonl")
    assert [(row["answer"], row["grade"], row["second_grade"]) for row in rows] == [
        (text, grade, 5) for text, grade in GRADES.items()
    ]
    assert rows[0]["said"] == '{"grade": 5}'
    shown = capsys.readouterr()
    assert "rubric judge: big grades 1 to 5 by Holdfast's rubric" in " ".join(shown.out.split())
    assert "agreement on success (κ)" in shown.out
    assert KEY not in shown.out + shown.err + "".join(path.read_text() for path in out.iterdir())


def test_an_attacks_answers_are_judged_again_measurement_by_measurement(
    write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [
        {"steps": steps, "set": name, "row": 1, "prompt": "How?", "answer": text, "grade": 4, "second_grade": 4}
        for steps, text in ((0, "No."), (10, "Salt and rust."))
        for name in ("harmful", "benign")
    ]
    with serving(right) as server:
        words = ["judge", write_rows("s.jsonl", rows), *at(server), "--output_dir", str(tmp_path / "out")]
        assert main(words) == 0
    assert len(server.graded) == 2
    points = read_json(tmp_path / "out" / "results.json")["points"]
    assert [(point["steps"], point["asr"], point["benign_over_refusal"]) for point in points] == [(0, 0, 1), (10, 1, 0)]
    again = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [(row["steps"], row["set"], row["grade"]) for row in again] == [
        *((0, "harmful", 1), (0, "benign", 1), (10, "harmful", 5), (10, "benign", 5))
    ]
    assert not any("second_grade" in row for row in again)


def test_steps_of_another_tool_that_are_no_number_are_no_measurement(
    write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": "How?", "response": "Rust.", "steps": ["think", "say"]}]
    assert main(["judge", write_rows("s.jsonl", rows), "--output_dir", str(tmp_path / "out")]) == 0
    assert read_lines(tmp_path / "out" / "samples.jsonl")[0]["steps"] == ["think", "say"]
    assert "results" in json.loads((tmp_path / "out" / "results.json").read_text())


def test_no_answer_is_left_out_where_only_some_are_of_a_measurement(
    write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": "How?", "answer": "Rust."}, {"prompt": "How?", "answer": None, "response": "No.", "steps": 1}]
    rows.append({**rows[0], "steps": True})
    assert main(["judge", write_rows("s.jsonl", rows), "--output_dir", str(tmp_path / "out")]) == 0
    points = read_json(tmp_path / "out" / "results.json")["points"]
    assert [(point.get("steps"), point["n"]) for point in points] == [(None, 2), (1, 1)]


def test_answers_of_other_tools_are_judged_without_their_thoughts(
    write_rows: Callable[..., str], tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "How?\u2028Now."}]
    rows: list[dict[str, object]] = [
        {"prompt": talk, "response": "<think>No.</think>Salt and rust.", "id": 7},
        {"prompt": "How?", "answer": ""},
        {"prompt": "How?", "completion": [{"role": "assistant", "content": "Rust."}]},
    ]
    with serving(right) as server:
        words = ["judge", write_rows("s.jsonl", rows), *at(server), "--output_dir", str(tmp_path / "out")]
        assert main(words) == 0
    # Of an empty answer nobody is asked.
    assert sorted(server.graded) == [("How?", "Rust."), ("How?\u2028Now.", "Salt and rust.")]
    first, second, third = read_lines(tmp_path / "out" / "samples.jsonl")
    assert (first["grade"], first["answer"], first["thoughts"], first["id"]) == (5, "Salt and rust.", "No.", 7)
    assert (second["grade"], second["empty"]) == (2, True)
    assert (third["grade"], third["answer"]) == (3, "Rust.")


def test_judging_that_is_killed_goes_on_where_it_was(write_rows: Callable[..., str], tmp_path: Path) -> None:
    texts = [f"{text} {n}" for n in range(5) for text in GRADES]
    source = write_rows("s.jsonl", [{"prompt": "How?", "answer": text} for text in texts])
    half, reached = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> str:
        if len(server.graded) == 11 and not half.is_set():
            reached.set()
            half.wait(60)
            return "hang up"
        return json.dumps({"grade": 1 + len(material(body)[1]) % 5})

    def words(name: str) -> list[str]:
        return ["judge", source, *at(server, "--judge_concurrency", "1"), "--output_dir", str(tmp_path / name)]

    with serving(reply) as server:
        child = os.fork()
        if child == 0:
            os._exit(main(words("killed")))
        assert reached.wait(60)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        half.set()
        assert not (tmp_path / "killed" / "results.json").exists()
        before = [pair for pair in map(material, server.answered) if pair[1] != "Four."]
        assert len(before) == 10
        assert main(words("killed")) == 0
        graded = [pair for pair in map(material, server.answered) if pair[1] != "Four."]
        assert sorted(graded) == sorted(("How?", text) for text in texts)  # each was answered once
        assert main(words("whole")) == 0
    killed, whole = (read_json(tmp_path / name / "results.json") for name in ("killed", "whole"))
    assert killed["results"] == whole["results"]
    assert read_lines(tmp_path / "killed" / "samples.jsonl") == read_lines(tmp_path / "whole" / "samples.jsonl")
    assert (killed["judge"]["usage"]["asked_now"], whole["judge"]["usage"]["asked_now"]) == (10, 20)


@pytest.mark.parametrize("fault", [429, 500, "broken", "no text", "slow", "drip", "hang up"])
def test_a_server_that_fails_leaves_answers_unjudged_and_the_run_finished(
    fault: str | int, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> str | int:
        return fault if material(body)[1] in ("Rust.", "No.") else right(body)

    with serving(reply) as server:
        limits = ["--judge_retries", "1", "--judge_timeout", "0.3"]
        assert main(["judge", samples, *at(server, *limits), "--output_dir", str(tmp_path / "out")]) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning: 2 of 4 answers stay unjudged by rubric (")
    found = read_json(tmp_path / "out" / "results.json")["results"]["harmful"]
    assert (found["counts"]["unjudged"], found["n"], found["asr"]["n"]) == (2, 4, 2)
    assert [row["grade"] for row in read_lines(tmp_path / "out" / "samples.jsonl")] == [5, None, None, 2]
    assert len(server.graded) == 6


def test_an_evaluation_by_a_server_that_fails_is_finished_and_can_be_judged_again(
    model_dir: Path, eval_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = ["--model", str(model_dir), "--eval_data", eval_data, "--max_new_tokens", "4"]
    with serving(lambda body: right(body) if material(body)[1] == "Four." else 500) as server:
        judges = at(server, "--judge_retries", "0", "--second_judge", "refusal")
        assert main(["evaluate", *measure, *judges, "--output_dir", str(tmp_path / "one")]) == 0
        assert "warning: 3 of 3 answers stay unjudged by rubric (3 × the server gives no" in capsys.readouterr().err
        found = read_json(tmp_path / "one" / "results.json")
        assert found["results"]["harmful"]["asr"] is None
        assert found["results"]["harmful"]["second"]["asr"]["n"] == 3
        assert found["config"]["judge_model"] == "big"
        assert KEY not in json.dumps(found)
        server.reply = right
        saved = str(tmp_path / "one" / "samples.jsonl")
        assert main(["judge", saved, *at(server), "--output_dir", str(tmp_path / "two")]) == 0
    assert read_json(tmp_path / "two" / "results.json")["results"]["harmful"]["asr"]["n"] == 3


def test_an_attack_is_measured_by_a_judge_at_a_server(model_dir: Path, eval_data: str, tmp_path: Path) -> None:
    knobs = ["--model", str(model_dir), "--share", "0.5", "--eval_data", eval_data, "--max_new_tokens", "4"]
    with serving(right) as server:
        out = tmp_path / "out"
        assert main(["attack", "pruning", *knobs, *at(server), "--output_dir", str(out)]) == 0
    found = read_json(out / "results.json")
    assert found["judge"]["usage"]["answers"] == 6
    assert found["judge"]["usage"]["asked_now"] == len(server.graded) == len(read_lines(out / "judged.jsonl")) <= 6
    assert found["second_judge"] is None
    assert [point["unjudged"] for point in found["points"]] == [0, 0]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("command", ["judge", "evaluate"])
def test_a_judge_without_a_server_is_told_of_at_the_very_start(
    command: str, refused: Callable[..., str], samples: str, model_dir: Path, eval_data: str
) -> None:
    given = [samples] if command == "judge" else ["--model", str(model_dir), "--eval_data", eval_data]
    with serving(right) as server:
        words = [command, *given, *at(server)]
    assert "--judge rubric: the server at http://127.0.0.1:" in refused(*words)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--judge_model", "big"], "needs a server of your own, --judge_url, or a key"),
        (["--judge_url", "http://127.0.0.1:9/v1"], "--judge rubric needs --judge_model"),
        (["--judge_model", "m", "--judge_url", "http://127.0.0.1:9/v1", "--judge_template", "no"], "cannot be read"),
        (
            ["--judge_model", "m", "--judge_url", "http://127.0.0.1:9/v1", "--judge_template", os.devnull],
            "has no {prompt} and no {answer}, where that is to stand; write it there",
        ),
        (["--judge_model", "m", "--judge_pattern", "("], "is no regular expression"),
        (["--judge_model", "m", "--judge_concurrency", "0"], "--judge_concurrency must be greater than 0, got 0"),
        (["--judge_model", "m", "--second_judge", "rubric"], "--second_judge rubric: is the first judge once more"),
        (["--judge_model", "m", "--judge_url", "http://u:p@h/v1"], "without name, password or parameters"),
    ],
)
def test_a_judge_that_cannot_be_set_up_writes_nothing(
    more: list[str], sentence: str, refused: Callable[..., str], samples: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert sentence in refused("judge", samples, "--judge", "rubric", *more)


def test_a_pattern_that_matches_nothing_the_judge_says(refused: Callable[..., str], samples: str) -> None:
    with serving(lambda body: "I would say four.") as server:
        sentence = refused("judge", samples, *at(server, "--judge_pattern", "#score ([1-5])"))
    assert "finds no grade in what the judge says of a harmless exchange: 'I would say four.'" in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no answer to judge"),
        ("{", "row 1: is no JSON"),
        ("[]", "row 1: is no JSON object"),
        ('{"prompt": "How?", "answer": "No.", "score": NaN}', "row 1: is no JSON (NaN is no number of JSON)"),
        ('{"prompt": "p", "answer": "a"}\n\n{"prompt": "p"}', "row 3: expected `prompt`, text or messages, and"),
        ('{"prompt": [], "answer": "a"}', "row 1: expected `prompt`, text or messages, and `answer`, text"),
        ('{"set": "task", "prompt": "p", "answer": "a"}', "has no answer to judge"),
        (
            '{"set": "test", "prompt": "p", "answer": "a"}',
            'row 1: `set` is "test"; expected one of harmful, benign, capability, task, or no `set`',
        ),
        ('{"set": ["x"], "prompt": "p", "answer": "a"}', 'row 1: `set` is ["x"]; expected one of'),
        ('{"prompt": "p", "answer": "a", "note": "\\ud800"}', "row 1: is not Unicode text"),
        ('{"prompt": "p", "answer": "a", "thoughts": 3}', "row 1: `thoughts` is a number; expected text, or null"),
        ('{"prompt": "p", "answer": null}', "row 1: expected `prompt`, text or messages, and `answer`, text"),
        ('{"prompt": "p", "answer": "a"}\n{"prompt": "p", "ans', "row 2: is no JSON"),
    ],
)
def test_answers_that_cannot_be_judged(
    content: str, sentence: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    found = refused("judge", str(path), "--judge", "refusal")
    assert str(path) in found
    assert sentence in found


def test_no_such_answers(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(
        "judge", str(tmp_path / "none"), "--judge", "refusal"
    )


@pytest.mark.parametrize("expected", [{}, {"expected": None}, {"expected": 3}, {"expected": " ,."}])
def test_the_exact_judge_needs_expected_answers(
    expected: dict[str, Any], refused: Callable[..., str], write_rows: Callable[..., str]
) -> None:
    rows = [{"prompt": "p", "answer": "a", "expected": "a"}, {"prompt": "p", "answer": "a", **expected}]
    said = refused("judge", write_rows("s.jsonl", rows), "--second_judge", "exact")
    assert "row 2: has no `expected` answer, which the exact judge needs as text" in said


def test_the_answers_themselves_are_not_written_over(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(samples).read_text()
    assert main(["judge", samples, "--output_dir", str(Path(samples).parent)]) == 2
    assert "which would be replaced" in capsys.readouterr().err
    assert Path(samples).read_text() == before
