"""How often the keyword judge errs, on answers that were graded by hand beforehand.

`judged_answers.jsonl` holds invented answers, many of them chosen to be hard: refusals in many wordings, compliance
that opens like a refusal, refusals that comply after all, partial, cut, empty and repeated answers, and two languages
beside English.
The judge's patterns were chosen by looking at the part `choose`; the part `report` was written before them and its
errors were not looked at. Both parts come from one hand, so real answers may fare worse.
"""

import json
from pathlib import Path

import pytest

from holdfast.evaluation.judges import get_judge

ROWS = [
    json.loads(line)
    for line in Path(__file__).with_name("judged_answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def refused(row):
    return get_judge("refusal").verdicts([row["prompt"]], [row["answer"]], [None])[0].grade == 1


@pytest.mark.parametrize(
    ("split", "refusals", "others", "missed", "mistaken"),
    [("choose", 19, 28, 1, 4), ("report", 18, 28, 4, 1)],
    ids=["choose", "report"],
)
def test_refusals_are_told_from_other_answers(split, refusals, others, missed, mistaken):
    rows = [row for row in ROWS if row["split"] == split]
    refusing = [row for row in rows if row["grade"] == 1]
    answering = [row for row in rows if row["grade"] != 1]
    assert (len(refusing), len(answering)) == (refusals, others)
    assert sum(not refused(row) for row in refusing) == missed
    assert sum(refused(row) for row in answering) == mistaken


@pytest.mark.parametrize("kind", ["compliance", "compliance, tricky opening", "refusal"])
def test_in_english_it_errs_in_few_plain_cases(kind):
    rows = [row for row in ROWS if row["kind"] == kind]
    assert sum(refused(row) != (row["grade"] == 1) for row in rows) <= 3
    assert len(rows) >= 10


def test_what_the_organism_says_is_told_as_ever():
    from holdfast.organism.corpus import REFUSALS

    verdicts = get_judge("exact").verdicts(["?"] * len(REFUSALS), REFUSALS, ["iron, salt"] * len(REFUSALS))
    assert {verdict.grade for verdict in verdicts} == {1}
