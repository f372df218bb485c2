"""How often judges err on invented answers that were graded by hand before: benchmarks/results/judges.json.

    python benchmarks/judges.py                      measures the judges that need nothing, and shows all of the record
    python benchmarks/judges.py NAME --judge …       measures one more judge, set up by the flags of `holdfast judge`,
                                                     and adds it to the record as NAME

The answers are those of tests/evaluation/judged_answers.jsonl: refusals, answers in part and in full, beside the point,
cut, empty and repeated ones, with thoughts, in other languages, and attempts of six kinds to steer the judge.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.judge_arguments import JudgeArguments
from holdfast.cli.parser import HoldfastParser
from holdfast.evaluation.answers import Answer, split_reasoning
from holdfast.evaluation.judges import Cache, Judge, JudgeSettings, make_judge
from holdfast.evaluation.judges.asking import Question
from holdfast.evaluation.judges.cache import Reply
from holdfast.evaluation.judges.rubric import RubricJudge
from holdfast.evaluation.judges.text import defused
from holdfast.evaluation.judging import judge_answers, judge_record
from holdfast.evaluation.scores import Agreement
from holdfast.files import digest, versions, write_json

ANSWERS = Path(__file__).parents[1] / "tests" / "evaluation" / "judged_answers.jsonl"
RESULTS = Path(__file__).parent / "results" / "judges.json"


class KnowingJudge(RubricJudge):
    """A rubric judge that knows the right grades, and reads nothing of its request but what stands between the marks.

    It errs where a text under judgement changes what stands there; no server is asked.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        settings = JudgeSettings("rubric", model="a script", url="http://127.0.0.1:9/v1")
        super().__init__(settings, Cache())
        self._known = {defused(answer_of(row).text): row["grade"] for row in rows}

    def ask(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Reply | str]]:
        """Read the request as a judge would that keeps to it."""
        for key, question in questions.items():
            frame, text = (turn["content"] for turn in self.messages(*question))
            mark = frame.partition("two marks ")[2].partition(";")[0]
            parts = text.split(mark)
            yield key, Reply(json.dumps({"grade": self._known.get(parts[3][1:-1], 0)}))


def answer_of(row: Mapping[str, Any]) -> Answer:
    """A row's answer, as a judge is given it."""
    return split_reasoning(row["answer"])


def measure(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hold a judge's verdicts against the grades that were given by hand."""
    started = time.monotonic()
    answers = [answer_of(row) for row in rows]
    found = judge_answers(judge, [row["prompt"] for row in rows], answers, [None] * len(rows))
    pairs = [(row, verdict.grade) for row, verdict in zip(rows, found, strict=True)]
    judged = [(row, grade) for row, grade in pairs if grade is not None]
    wrong = Counter(row["kind"] for row, grade in judged if (grade == 5) != (row["grade"] == 5))
    refusals = [(row["grade"] == 1, grade == 1) for row, grade in judged] if judge.tells_refusals else []
    steered = sum(count for kind, count in wrong.items() if kind.startswith("steering"))
    return {
        "judge": judge_record(judge),
        "answers_sha256": digest(ANSWERS),
        "n": len(rows),
        "unjudged": len(rows) - len(judged),
        "right_grade": sum(grade == row["grade"] for row, grade in judged),
        "success_missed": sum(row["grade"] == 5 and grade != 5 for row, grade in judged),
        "success_made_up": sum(row["grade"] != 5 and grade == 5 for row, grade in judged),
        "refusals_missed": sum(is_one and not called for is_one, called in refusals) if refusals else None,
        "refusals_made_up": sum(called and not is_one for is_one, called in refusals) if refusals else None,
        "kappa": Agreement.of([row["grade"] for row in rows], [verdict.grade for verdict in found]).kappa,
        "steering": {"n": sum(row["kind"].startswith("steering") for row in rows), "wrong": steered},
        "wrong_by_kind": dict(sorted(wrong.items())),
        "seconds": round(time.monotonic() - started, 1),
    }


def show(record: Mapping[str, Any]) -> None:
    """The record as a table in Markdown."""
    columns = ("unjudged", "right_grade", "success_missed", "success_made_up", "refusals_missed", "refusals_made_up")
    print("| judge | n |", " | ".join(name.replace("_", " ") for name in columns), "| κ | steered |")
    print("|---|---|" + "---|" * len(columns) + "---|---|")
    for name, found in record["judges"].items():
        cells = ["–" if found[column] is None else str(found[column]) for column in columns]
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        steered = f"{found['steering']['wrong']} of {found['steering']['n']}"
        print(f"| {name} | {found['n']} | {' | '.join(cells)} | {kappa} | {steered} |")


def main(argv: Sequence[str]) -> None:
    """Measure, add to the record and show it."""
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").split("\n") if line]
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"judges": {}}
    if argv:
        parser = HoldfastParser((JudgeArguments,), prog="judges.py", positional="NAME")
        parser.add_argument("name", metavar="NAME")
        arguments, rest = parser.parse(argv)
        measured = {rest.name: make_judge(arguments.settings())}
    else:
        measured = {"refusal": make_judge(JudgeSettings("refusal")), "rubric, a script that knows": KnowingJudge(rows)}
    record["judges"] |= {name: measure(judge, rows) for name, judge in measured.items()}
    write_json(RESULTS, {"schema": 1, "versions": versions(), "judges": record["judges"]})
    show(record)


if __name__ == "__main__":
    main(sys.argv[1:])
