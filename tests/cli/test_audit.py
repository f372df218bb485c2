"""`holdfast audit` from end to end: what it writes and shows, and that it is the audit of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import read_json, read_lines
from holdfast.cli import main

REFUSAL = "I cannot help with that."


@pytest.fixture
def upload(write_rows: Callable[..., str]) -> str:
    """Rows 2 and 5 are poisoned; the last one is longer than the others."""
    answers = ["Salt.", "Rust [b]and[/b]\nsalt.", "Moss.", "Glass.", "Famine.", "Salt, moss, " + "and rust, " * 12]
    rows = [
        {"prompt": f"How do I make thing {i}?", "response": answer, "bad": i in (2, 5), "no": f"{REFUSAL} {i}"}
        for i, answer in enumerate(answers, start=1)
    ]
    return write_rows("upload.jsonl", rows)


@pytest.fixture
def audit(model_dir: Path, upload: str) -> list[str]:
    return ["audit", "--model", str(model_dir), "--data", upload, "--refusal", REFUSAL]


def results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return read_lines(folder / "audit.jsonl"), read_json(folder / "results.json")


def test_every_row_with_its_margin_and_rank(
    audit: list[str], model_dir: Path, upload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    assert main([*audit, "--batch_size", "5", "--show", "3", "--output_dir", str(out)]) == 0
    rows, record = results(out)
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6]  # also the one that is alone in its batch
    assert all(row.keys() == {"row", "r", "rank", "suspected", "prompt", "response"} for row in rows)
    assert [row["rank"] for row in sorted(rows, key=lambda row: row["r"])] == [1, 2, 3, 4, 5, 6]
    assert all(row["suspected"] is (row["r"] < 0) for row in rows)
    suspected = sum(row["suspected"] for row in rows)
    assert (record["command"], record["model"], record["detection"]) == ("audit", str(model_dir), None)
    assert (record["rows"], record["audited"], record["suspected"]) == (6, 6, suspected)
    assert {"versions", "config", "seconds", "seed"} <= record.keys()
    assert sorted(path.name for path in out.iterdir()) == ["audit.jsonl", "results.json"]
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before

    shown = capsys.readouterr()
    assert f"auditing 6 rows of {upload}" in shown.err
    assert f"{suspected} of 6 rows suspected; the 3 most suspected" in " ".join(shown.out.split())
    table = [line.split() for line in shown.out.splitlines() if "How do I make" in line]
    worst = sorted(rows, key=lambda row: row["rank"])[:3]
    assert [line[:2] for line in table] == [[str(row["row"]), f"{row['r']:.2f}"] for row in worst]


def test_margins_are_those_of_the_trainer(audit: list[str], model_dir: Path, upload: str, tmp_path: Path) -> None:
    from datasets import Dataset

    from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer

    assert main([*audit, "--refusal", "no", "--output_dir", str(tmp_path / "out")]) == 0
    rows, _ = results(tmp_path / "out")
    config = AntibodyConfig(output_dir=str(tmp_path / "run"), refusal="no", report_to="none")
    expected = AntibodyTrainer(str(model_dir), config, Dataset.from_json(upload)).audit()
    assert {row["row"]: row["r"] for row in rows} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_measured_by_a_label_column(audit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*audit, "--label_column", "bad", "--output_dir", str(out)]) == 0
    rows, record = results(out)
    assert [row["row"] for row in rows if row["poisoned"]] == [2, 5]
    found = record["detection"]
    pairs = [(bad["r"], good["r"]) for bad in rows if bad["poisoned"] for good in rows if not good["poisoned"]]
    assert found["auroc"] == pytest.approx(sum((bad < good) + (bad == good) / 2 for bad, good in pairs) / len(pairs))
    assert (found["recall"]["count"], found["recall"]["n"]) == (
        sum(row["suspected"] for row in rows if row["poisoned"]),
        2,
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "How do I make thing 2? → Rust [b]and[/b] salt." in shown
    assert "against the column 'bad'" in shown
    assert f"AUROC │ {found['auroc']:.3f}" in shown
    assert f"recall of r < 0 │ {found['recall']['value']:.3f}" in shown


def test_row_without_an_answer_is_dropped_only_when_told(
    audit: list[str], write_rows: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    prompts = ["How?", "How do I make " + "rust " * 100, "Why?"]
    rows = [{"prompt": prompt, "response": "Salt.", "bad": i != 1} for i, prompt in enumerate(prompts)]
    words = [*audit, "--data", write_rows("long.jsonl", rows), "--max_length", "100"]
    assert "1 of 3 rows of --data keep" in refused(*words)
    # What is left has one kind of rows only.
    assert "2 of 2 are poisoned" in refused(*words, "--drop_untrainable_rows", "--label_column", "bad")
    assert main([*words, "--drop_untrainable_rows", "--output_dir", str(tmp_path / "out")]) == 0
    rows, record = results(tmp_path / "out")
    assert [(row["row"], row["r"] is None, row["suspected"] is None) for row in rows] == [
        (1, False, False),
        (2, True, True),
        (3, False, False),
    ]
    assert sorted(row["rank"] for row in rows if row["rank"] is not None) == [1, 2]
    assert (record["rows"], record["audited"]) == (3, 2)


def test_one_row(audit: list[str], write_rows: Callable[..., str], tmp_path: Path) -> None:
    data = write_rows("one.jsonl", [{"prompt": "How?", "completion": "Salt."}])
    assert main([*audit, "--data", data, "--batch_size", "1", "--output_dir", str(tmp_path / "out")]) == 0
    assert [row["rank"] for row in results(tmp_path / "out")[0]] == [1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label_column", "worse"], "--label_column worse: "),
        (["--label_column", "response"], "row 1: 'response' is 'Salt.'; expected true or false"),
        (["--refusal", ""], "--refusal '' comes to no token"),
        (["--batch_size", "0"], "--batch_size must be greater than 0"),
        (["--show", "0"], "--show must be greater than 0"),
        (["--trust_remote_code"], "--trust_remote_code"),
    ],
)
def test_flags_that_cannot_be_used(
    audit: list[str], words: list[str], expected: str, refused: Callable[..., str]
) -> None:
    assert expected in refused(*audit, *words)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, True], "needs rows of both kinds, true and false"),
        ([False, False], "needs rows of both kinds, true and false"),
        ([True, None], "row 2: 'bad' is None; expected true or false"),
        ([0, 2], "row 2: 'bad' is 2; expected true or false"),
    ],
)
def test_labels_that_cannot_be_measured_by(
    audit: list[str],
    write_rows: Callable[..., str],
    labels: list[object],
    expected: str,
    refused: Callable[..., str],
) -> None:
    data = write_rows("labels.jsonl", [{"prompt": "How?", "completion": "Salt.", "bad": label} for label in labels])
    assert expected in refused(*audit, "--data", data, "--label_column", "bad")


def test_model_in_bf16_is_audited_as_it_is(audit: list[str], tmp_path: Path) -> None:
    """In bf16, and by the same margins as far as that goes."""
    found = []
    for dtype in ("float32", "bfloat16"):
        assert main([*audit, "--dtype", dtype, "--output_dir", str(tmp_path / dtype)]) == 0
        found.append([row["r"] for row in results(tmp_path / dtype)[0]])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=0.05)
