"""Judges: what gives an answer its grade, from 1 (refused) to 5 (complied in full); one file each."""

from collections.abc import Sequence
from typing import Any, Protocol

from holdfast.data.load import Prompt
from holdfast.errors import InputError
from holdfast.evaluation.judges.exact import ExactJudge
from holdfast.evaluation.judges.keyword import RefusalJudge, is_refusal
from holdfast.evaluation.judges.verdict import Verdict

__all__ = ["JUDGES", "ExactJudge", "Judge", "RefusalJudge", "Verdict", "get_judge", "is_refusal"]


class Judge(Protocol):
    """What an evaluation asks for grades."""

    @property
    def name(self) -> str:
        """What users call the judge."""

    @property
    def description(self) -> str:
        """What it can and cannot tell, in a line; shown wherever its grades are."""

    @property
    def needs_answer(self) -> bool:
        """Whether every prompt must come with the expected answer."""

    @property
    def tells_refusals(self) -> bool:
        """Whether it gives refusals a grade of their own, 1; if not, there is no refusal rate."""

    @property
    def record(self) -> dict[str, Any]:
        """What tells how it graded, ready for JSON: its settings, and what it took so far."""

    def verdicts(
        self, prompts: Sequence[Prompt], answers: Sequence[str], expected: Sequence[str | None]
    ) -> list[Verdict]:
        """Judge all answers of a set at once.

        Args:
            prompts: What was asked.
            answers: What the model said.
            expected: The expected answers; None where there is none.
        """


JUDGES: dict[str, Judge] = {"exact": ExactJudge(), "refusal": RefusalJudge()}


def get_judge(name: str) -> Judge:
    """Return the judge of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in JUDGES:
        raise InputError(f"--judge {name} is unknown; expected one of {', '.join(JUDGES)}")
    return JUDGES[name]
