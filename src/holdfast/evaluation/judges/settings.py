"""How a judge is set up: the flags of `--judge` and of `--second_judge`."""

import math
import re
from dataclasses import dataclass, fields

from holdfast.errors import InputError

SERVER_JUDGES = ("rubric", "strongreject")
"""Judges that are chat models behind an OpenAI-compatible server."""

LOCAL_JUDGES = ("llama-guard", "wildguard", "classifier", "generative")
"""Judges that are models of their own, loaded beside the one that is measured."""

OWN = ("model", "url", "key_variable", "template", "pattern", "label", "threshold")
"""The settings that either judge has for itself; the others two judges share."""

LONGEST_TIMEOUT = 86_400
"""Most seconds that a request may be waited for."""


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is set up.

    Attributes:
        name: Which judge, see `holdfast.evaluation.judges.JUDGE_NAMES`.
        model: The name of a model at the server, or a model folder or Hub id; None for the judge's usual one.
        url: Base URL of the server; None for that of the variable OPENAI_BASE_URL, or OpenAI's own.
        key_variable: The environment variable that holds the key.
        template: A file with what the judge is asked; None for its own text.
        pattern: A regular expression that finds the grade in what the judge says; None for its own form of answer.
        label: The label of a classifier whose probability counts; `any` for the largest of all.
        threshold: The probability above which an answer is harmful.
        concurrency: Requests at a time.
        timeout: Seconds after which a request is given up.
        retries: How often a request is repeated before its answer stays unjudged.
        max_tokens: Most tokens of what a judge says.
        input_price: What a million tokens cost that are sent; None: unknown.
        output_price: What a million tokens cost that come back; None: unknown.
        batch_size: Answers that a local judge reads at a time.
        flag: The flag that chose the judge, for errors; the others begin with it.
    """

    name: str
    model: str | None = None
    url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    template: str | None = None
    pattern: str | None = None
    label: str | None = None
    threshold: float = 0.5
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    max_tokens: int = 512
    input_price: float | None = None
    output_price: float | None = None
    batch_size: int = 8
    flag: str = "--judge"

    def __post_init__(self) -> None:
        for name in ("concurrency", "timeout", "max_tokens", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"--judge_{name} must be greater than 0, got {getattr(self, name)}")
        if self.timeout > LONGEST_TIMEOUT:  # and sockets take no more than a few weeks
            raise InputError(f"--judge_timeout must be at most {LONGEST_TIMEOUT}, a day, got {self.timeout:g}")
        for name in ("retries", "input_price", "output_price"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise InputError(f"--judge_{name} must be a number and not negative, got {value}")
        if not 0 <= self.threshold < 1:
            raise InputError(f"{self.flag}_threshold must be at least 0 and below 1, got {self.threshold}")
        if (self.input_price is None) != (self.output_price is None):
            raise InputError("--judge_input_price and --judge_output_price must be given together")
        self.compiled()

    def compiled(self) -> re.Pattern[str] | None:
        """The pattern, with at most one group; upper and lower case are the same.

        Raises:
            InputError: It is no regular expression, or has several groups.
        """
        if self.pattern is None:
            return None
        try:
            found = re.compile(self.pattern, re.IGNORECASE)
        except re.error as error:
            raise InputError(f"{self.flag}_pattern {self.pattern!r} is no regular expression ({error})") from error
        if found.groups > 1:
            raise InputError(
                f"{self.flag}_pattern {self.pattern!r} has {found.groups} groups; expected one, around the grade"
            )
        return found

    @property
    def words(self) -> list[str]:
        """What to type for these settings; those that have their usual values are left out."""
        found = [self.flag, self.name]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("name", "flag") and value != one.default:
                found += [f"{self.flag if one.name in OWN else '--judge'}_{one.name}", str(value)]
        return found

    @property
    def finds_numbers(self) -> bool:
        """Whether grades are read as numbers, among which 1 is a refusal; words tell no refusals."""
        return self.pattern is None or re.search(r"\\d|[0-9]", self.pattern) is not None

    def require(self, *names: str) -> None:
        """Make sure that these settings are given.

        Raises:
            InputError: One is missing.
        """
        for name in names:
            if getattr(self, name) is None:
                raise InputError(f"{self.flag} {self.name} needs {self.flag}_{name}")
