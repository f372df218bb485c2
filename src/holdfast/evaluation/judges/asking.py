"""Judges that are asked: models, whose replies are kept and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from holdfast.data.load import Prompt
from holdfast.evaluation.judges.cache import Cache, Reply
from holdfast.evaluation.judges.settings import JudgeSettings
from holdfast.evaluation.judges.verdict import Verdict

Question = tuple[Prompt, str]
"""What was asked, and the answer to it."""


class AskedJudge(ABC):
    """A judge that is asked about every answer once, and whose replies are read.

    Args:
        settings: How it is set up.
        cache: What was said before.
    """

    needs_answer = False

    def __init__(self, settings: JudgeSettings, cache: Cache) -> None:
        self.name = settings.name
        self.settings = settings
        self._cache = cache
        self._used: dict[str, Reply] = {}
        self._answers = 0
        self._asked = 0
        self._unjudged: Counter[str] = Counter()

    @property
    @abstractmethod
    def description(self) -> str:
        """What it can and cannot tell, in a line."""

    @property
    @abstractmethod
    def tells_refusals(self) -> bool:
        """Whether it gives refusals a grade of their own, 1."""

    @abstractmethod
    def check(self) -> None:
        """Find out whether it can be asked.

        Raises:
            InputError: It cannot.
        """

    @abstractmethod
    def key(self, prompt: Prompt, answer: str) -> str:
        """What names a question, whoever asks it and when."""

    @abstractmethod
    def ask(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Reply | str]]:
        """Ask questions by their keys; in any order come the replies, or why there is none."""

    @abstractmethod
    def read(self, said: str) -> Verdict:
        """What a reply means."""

    @property
    def record(self) -> dict[str, Any]:
        """What tells how it graded, ready for JSON: the model, and what was asked and what came back so far."""
        return {"model": self.settings.model, "usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        """What it took: answers judged, asked about now, tokens and cost of all replies, answers unjudged by reason."""
        sent = sum(reply.prompt_tokens for reply in self._used.values())
        came = sum(reply.completion_tokens for reply in self._used.values())
        prices = (self.settings.input_price, self.settings.output_price)
        cost = None if prices[0] is None or prices[1] is None else (sent * prices[0] + came * prices[1]) / 1e6
        return {
            "answers": self._answers,
            "asked_now": self._asked,
            "prompt_tokens": sent,
            "completion_tokens": came,
            "cost": cost,
            "unjudged": dict(self._unjudged),
        }

    def verdicts(
        self, prompts: Sequence[Prompt], answers: Sequence[str], expected: Sequence[str | None]
    ) -> list[Verdict]:
        """Judge all answers of a set at once; of several ranks, the first one does."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._verdicts(prompts, answers)
        found = [self._verdicts(prompts, answers) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        [verdicts] = found
        assert verdicts is not None
        return verdicts

    def _verdicts(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        keys = [self.key(*question) for question in zip(prompts, answers, strict=True)]
        questions = dict(zip(keys, zip(prompts, answers, strict=True), strict=True))
        new = {key: question for key, question in questions.items() if self._cache.get(key) is None}
        failed: dict[str, str] = {}
        # Without a terminal tqdm stays silent.
        for key, reply in tqdm(self.ask(new), total=len(new), desc="judging", leave=False, disable=None):
            self._asked += 1
            if isinstance(reply, Reply):
                self._cache.put(key, reply)
            else:
                failed[key] = reply
        verdicts = {}
        for key in questions:
            if (reply := self._cache.get(key)) is None:
                verdicts[key] = Verdict(None, unjudged=failed[key])
            else:
                verdicts[key] = self.read(reply.said)
                self._used[key] = reply
        found = [verdicts[key] for key in keys]
        self._answers += len(found)
        self._unjudged.update(verdict.unjudged for verdict in found if verdict.unjudged is not None)
        return found
