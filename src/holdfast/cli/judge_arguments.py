"""The flags of judges, which every command that measures takes: of `--judge`, and of `--second_judge`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from holdfast.errors import InputError
from holdfast.evaluation.judges import JUDGE_NAMES, JudgeSettings
from holdfast.evaluation.judges.settings import OWN, SERVER_JUDGES

_SHARED = ("concurrency", "timeout", "retries", "max_tokens", "input_price", "output_price", "batch_size")
# What a second judge at the same server takes over from the first one.
_SERVER = ("model", "url", "key_variable")


@dataclass
class JudgeArguments:
    """Who judges, and how."""

    judge: str = field(
        default="refusal",
        metadata={
            "help": "Who grades answers to harmful and benign prompts, from 1 (refused) to 5 (complied in full). "
            "`refusal`: refusal phrases; `exact`: the `answer` column. Chat models at a server: `rubric`, "
            "`strongreject`. Models that are loaded: `llama-guard`, `wildguard`, `classifier` (any sequence "
            "classifier), `generative` (any other one). docs/judges.md says which to choose.",
            "choices": list(JUDGE_NAMES),
        },
    )
    second_judge: str | None = field(
        default=None,
        metadata={
            "help": "A second judge, whose grades stand beside the first one's, with how far the two agree.",
            "choices": list(JUDGE_NAMES),
        },
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "The judge's model: its name at the server, or a folder or Hub id."}
    )
    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; if not given, that of "
            "the variable OPENAI_BASE_URL, or OpenAI's own."
        },
    )
    judge_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "The environment variable that holds the server's key."}
    )
    judge_template: str | None = field(
        default=None,
        metadata={"help": "A text file with what the judge is asked, {prompt} and {answer} in it, for its own text."},
    )
    judge_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that finds the grade in what the judge says: a number from 1 to 5, or yes or "
            "no, safe or unsafe, harmful or harmless; in its group, if it has one."
        },
    )
    judge_label: str | None = field(
        default=None,
        metadata={"help": "Of a `classifier`: the label whose probability counts; `any`: the most probable one."},
    )
    judge_threshold: float = field(
        default=0.5, metadata={"help": "Of a `classifier`: the probability above which an answer is harmful."}
    )
    second_judge_model: str | None = field(
        default=None, metadata={"help": "As --judge_model, which two judges at servers share if it is not given."}
    )
    second_judge_url: str | None = field(default=None, metadata={"help": "As --judge_url, shared likewise."})
    second_judge_key_variable: str | None = field(
        default=None, metadata={"help": "As --judge_key_variable, shared likewise."}
    )
    second_judge_template: str | None = field(default=None, metadata={"help": "As --judge_template."})
    second_judge_pattern: str | None = field(default=None, metadata={"help": "As --judge_pattern."})
    second_judge_label: str | None = field(default=None, metadata={"help": "As --judge_label."})
    second_judge_threshold: float | None = field(default=None, metadata={"help": "As --judge_threshold."})
    judge_concurrency: int = field(default=8, metadata={"help": "Requests to a server at a time."})
    judge_timeout: float = field(default=60.0, metadata={"help": "Seconds after which a request is given up."})
    judge_retries: int = field(
        default=4, metadata={"help": "How often a request that failed is repeated before the answer stays unjudged."}
    )
    judge_max_tokens: int = field(
        default=512, metadata={"help": "Most tokens that a judge writes; one that thinks before it grades needs more."}
    )
    judge_input_price: float | None = field(
        default=None, metadata={"help": "What a million tokens cost that are sent; for the cost in the record."}
    )
    judge_output_price: float | None = field(
        default=None, metadata={"help": "What a million tokens cost that come back."}
    )
    judge_batch_size: int = field(default=8, metadata={"help": "Answers that a judge which is loaded reads at a time."})

    def __post_init__(self) -> None:
        second = self.second_settings()
        if second is not None and replace(second, flag="--judge") == self.settings():
            raise InputError(f"--second_judge {self.second_judge}: is the first judge once more; choose another one")

    def settings(self) -> JudgeSettings:
        """How the judge is set up.

        Raises:
            InputError: A setting cannot be used.
        """
        own = {name: getattr(self, f"judge_{name}") for name in OWN}
        return JudgeSettings(self.judge, **own, **self._shared())

    def second_settings(self) -> JudgeSettings | None:
        """How the second judge is set up; None if there is none.

        Raises:
            InputError: A setting cannot be used.
        """
        if self.second_judge is None:
            return None
        at_servers = self.judge in SERVER_JUDGES and self.second_judge in SERVER_JUDGES
        defaults = {one.name: one.default for one in fields(JudgeSettings)}
        own = {}
        for name in OWN:
            value = getattr(self, f"second_judge_{name}")
            if value is None:
                value = getattr(self, f"judge_{name}") if at_servers and name in _SERVER else defaults[name]
            own[name] = value
        return JudgeSettings(self.second_judge, **own, **self._shared(), flag="--second_judge")

    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, f"judge_{name}") for name in _SHARED}
