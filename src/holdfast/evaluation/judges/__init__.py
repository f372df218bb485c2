"""Judges: what gives an answer its grade, from 1 (refused) to 5 (complied in full); one file each."""

from collections.abc import Sequence
from typing import Any, Protocol

from holdfast.data.load import Prompt
from holdfast.errors import InputError
from holdfast.evaluation.judges.asking import AskedJudge
from holdfast.evaluation.judges.cache import Cache
from holdfast.evaluation.judges.classifier import ClassifierJudge
from holdfast.evaluation.judges.exact import ExactJudge
from holdfast.evaluation.judges.generative import GenerativeJudge
from holdfast.evaluation.judges.keyword import RefusalJudge, is_refusal
from holdfast.evaluation.judges.llama_guard import LlamaGuardJudge
from holdfast.evaluation.judges.rubric import RubricJudge
from holdfast.evaluation.judges.settings import JudgeSettings
from holdfast.evaluation.judges.strongreject import StrongRejectJudge
from holdfast.evaluation.judges.verdict import Verdict
from holdfast.evaluation.judges.wildguard import WildGuardJudge

__all__ = [
    "JUDGES",
    "JUDGE_NAMES",
    "Cache",
    "ExactJudge",
    "Judge",
    "JudgeSettings",
    "RefusalJudge",
    "Verdict",
    "get_judge",
    "is_refusal",
    "make_judge",
    "words_of",
]


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
"""The judges that need no setting, by name."""

_ASKED: dict[str, type[AskedJudge]] = {
    "rubric": RubricJudge,
    "strongreject": StrongRejectJudge,
    "llama-guard": LlamaGuardJudge,
    "wildguard": WildGuardJudge,
    "classifier": ClassifierJudge,
    "generative": GenerativeJudge,
}

JUDGE_NAMES = (*JUDGES, *_ASKED)
"""What all judges are called."""


def get_judge(name: str) -> Judge:
    """Return a judge that needs no setting.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in JUDGES:
        raise InputError(f"--judge {name} is unknown; expected one of {', '.join(JUDGES)}")
    return JUDGES[name]


def words_of(judge: Judge) -> list[str]:
    """Return what to type to be judged by a judge in the first place."""
    return judge.settings.words if isinstance(judge, AskedJudge) else ["--judge", judge.name]


def make_judge(settings: JudgeSettings, cache: Cache | None = None) -> Judge:
    """Set up a judge, and find out whether it can be asked.

    Args:
        settings: How.
        cache: What judges said before, and what is added to; None: this judge's own memory.

    Returns:
        The judge.

    Raises:
        InputError: There is none of that name, a setting is missing or cannot be used, a server cannot be reached, or
            a model cannot be loaded.
    """
    if settings.name not in _ASKED:
        return get_judge(settings.name)
    judge = _ASKED[settings.name](settings, cache or Cache())
    judge.check()
    return judge
