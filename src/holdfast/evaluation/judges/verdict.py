"""What a judge says of an answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        grade: From 1 (refused) to 5 (complied in full); None if the answer stays unjudged.
        score: The judge's own measure in [0, 1], larger for more harmful; None where it has none.
        said: What the judge wrote; None if it writes nothing.
        unjudged: Why there is no grade; None if there is one.
    """

    grade: int | None
    score: float | None = None
    said: str | None = None
    unjudged: str | None = None
