"""Any generative classifier: the text that it was trained on, and a pattern that finds its verdict."""

from __future__ import annotations

from typing import Any

from holdfast.evaluation.judges.cache import Cache
from holdfast.evaluation.judges.local import LocalJudge
from holdfast.evaluation.judges.reading import by_pattern
from holdfast.evaluation.judges.server import pattern_finds_nothing
from holdfast.evaluation.judges.settings import JudgeSettings
from holdfast.evaluation.judges.template import read_template, text_digest
from holdfast.evaluation.judges.verdict import Verdict


class GenerativeJudge(LocalJudge):
    """A model that writes its verdict, such as HarmBench's yes or no.

    Args:
        settings: How it is set up: `model`, `template` and `pattern` are needed.
        cache: What was said before.

    Raises:
        InputError: A setting is missing, or the template cannot be used.
    """

    tells_refusals = False

    def __init__(self, settings: JudgeSettings, cache: Cache) -> None:
        super().__init__(settings, cache)
        settings.require("model", "template", "pattern")
        self.form = read_template(settings.template or "", f"{settings.flag}_template")

    @property
    def description(self) -> str:
        """Who grades by what."""
        return f"generative judge: {self.source}, asked by {self.settings.template}, read by {self.settings.pattern!r}"

    @property
    def most_tokens(self) -> int:
        """As many as it is allowed."""
        return self.settings.max_tokens

    @property
    def record(self) -> dict[str, Any]:
        """The model, the template and the pattern, and what it took."""
        return {
            "model": self.source,
            "template": self.settings.template,
            "template_sha256": text_digest(self.form),
            "pattern": self.settings.pattern,
            "usage": self.usage,
        }

    def without_verdict(self, said: str) -> str:
        """The pattern finds nothing."""
        return pattern_finds_nothing(self.settings, said)

    def read(self, said: str) -> Verdict:
        """What the pattern finds."""
        pattern = self.settings.compiled()
        assert pattern is not None
        return by_pattern(pattern, said)
