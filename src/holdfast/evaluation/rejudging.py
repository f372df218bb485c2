"""Saved answers → verdicts: the rows of a `samples.jsonl`, judged again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.data.formats import is_message, text_of
from holdfast.errors import InputError
from holdfast.evaluation.answers import MARKS, Answer, split_reasoning
from holdfast.evaluation.evaluate import PREFIXES, Evaluation
from holdfast.evaluation.judges import Judge
from holdfast.evaluation.judging import COLUMNS, judge_answers
from holdfast.evaluation.prompts import JUDGED, is_expected
from holdfast.files import kind_of_value, parse_json, read_text

# What tells the measurements of an attack from one another, in its samples.
_WHEN = ("stage", "steps", "asked_by")
# What files call an answer, the first of which that is there counts.
_ANSWERS = ("answer", "response", "completion")


@dataclass(frozen=True)
class Saved:
    """A saved answer.

    Attributes:
        row: What the file says of it beside verdicts and marks: `set`, `row`, `prompt`, `answer`, `thoughts`,
            `expected` and whatever else.
        answer: The answer.
    """

    row: dict[str, Any]
    answer: Answer


def measurement_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Which measurement of an attack a row of `samples.jsonl` is from; empty if from none."""
    # Other tools' files may have such columns of another kind.
    return {name: sample[name] for name in _WHEN if type(sample.get(name)) in (str, int)}


def read_samples(path: Path, *, expected: bool = False) -> list[Saved]:
    """Read saved answers to harmful and benign prompts.

    Args:
        path: JSON lines with `prompt` (text or messages) and `answer`, `response` or `completion` (text or one
            message), as `samples.jsonl` has them. Rows whose `set` is neither harmful nor benign are left out, for they
            need no judge. Reasoning that is still in an answer is cut from it and kept as `thoughts`.
        expected: Whether every row needs an `expected` answer.

    Raises:
        InputError: The file cannot be read, a row cannot be used, or none is left.
    """
    found = []
    for number, line in enumerate(read_text(path, expected="the samples.jsonl of a run").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        saved = _saved(line, number, where)
        if saved.row["set"] not in JUDGED:
            continue
        if expected and not is_expected(saved.row["expected"]):
            raise InputError(f"{where}: has no `expected` answer, which the exact judge needs as text")
        found.append(saved)
    if not found:
        raise InputError(f"{path} has no answer to judge; expected rows with prompt and answer")
    return found


def judge_samples(saved: Sequence[Saved], source: str, judge: Judge, second: Judge | None) -> list[Evaluation]:
    """Judge saved answers.

    Args:
        saved: The answers.
        source: Where they are from.
        judge: Who judges them.
        second: Who judges them, too.

    Returns:
        An evaluation for each of the measurements of an attack that they are from; one in all if they are from none.
    """
    asked = [one.row["prompt"] for one in saved]
    answers = [one.answer for one in saved]
    expected = [one.row["expected"] for one in saved]
    verdicts = {who: judge_answers(who, asked, answers, expected) for who in (judge, second) if who is not None}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, one in enumerate(saved):
        groups.setdefault(tuple(measurement_of(one.row).items()), []).append(place)
    found = []
    for group in groups.values():
        evaluation = Evaluation({}, {}, [], {}, {}, None)
        for role in PREFIXES:
            places = [place for place in group if saved[place].row["set"] == role]
            if not places:
                continue
            opinions = [(who, [given[place] for place in places]) for who, given in verdicts.items()]
            evaluation.sources[role] = source
            evaluation.add(
                role, [saved[place].row for place in places], [answers[place] for place in places], *opinions
            )
        found.append(evaluation)
    return found


def _saved(line: str, number: int, where: str) -> Saved:
    try:
        row = parse_json(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates, which JSON can hold
        raise InputError(f"{where}: is not Unicode text ({error})") from error
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error}); expected one object a line, as samples.jsonl has") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object; expected one with prompt and answer")
    if (role := row.get("set", "harmful")) not in list(PREFIXES):
        raise InputError(
            f"{where}: `set` is {json.dumps(role)[:60]}; expected one of {', '.join(PREFIXES)}, or no `set`"
        )
    prompt = row.get("prompt")
    text = next((text for name in _ANSWERS if (text := _text(row.get(name))) is not None), None)
    is_talk = isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))
    if text is None or not (isinstance(prompt, str) or is_talk):
        raise InputError(
            f"{where}: expected `prompt`, text or messages, and `answer`, text; its columns are "
            f"{', '.join(map(repr, row))}"
        )
    thoughts = row.get("thoughts")
    if not isinstance(thoughts, str | None):
        raise InputError(f"{where}: `thoughts` is {kind_of_value(thoughts)}; expected text, or null")
    answer = split_reasoning(text) if thoughts is None else Answer(text, thoughts)
    unclosed = row.get("thinking_unclosed", answer.thinking_unclosed) is True
    answer = replace(answer, thinking_unclosed=unclosed, truncated=row.get("truncated") is True)
    # New verdicts replace earlier ones.
    old = {*_ANSWERS, *MARKS, *COLUMNS, *(f"second_{name}" for name in COLUMNS)}
    return Saved(
        {
            "set": "harmful",
            "row": number,
            **{name: value for name, value in row.items() if name not in old},
            "answer": answer.text,
            "thoughts": answer.thoughts,
            "expected": row.get("expected"),
        },
        answer,
    )


def _text(answer: Any) -> str | None:
    """An answer as text; None if it is none."""
    if isinstance(answer, list) and len(answer) == 1 and is_message(answer[0]):
        return text_of(answer[0])
    return answer if isinstance(answer, str) else None
