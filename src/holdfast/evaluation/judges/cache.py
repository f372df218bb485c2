"""What judges have said, kept by what they were asked, so that nothing is asked twice."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from holdfast.errors import InputError
from holdfast.evaluation.judges.template import text_digest
from holdfast.files import append_jsonl, whole_lines

CACHE = "judged.jsonl"
"""What the file is called in the folder of a run."""


@dataclass(frozen=True)
class Reply:
    """What a judge said when it was asked.

    Attributes:
        said: What it wrote; of a classifier, its probabilities as JSON.
        prompt_tokens: How many tokens it was sent, by its own count; 0 if it does not say.
        completion_tokens: How many it wrote.
    """

    said: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Cache:
    """What judges have said, in memory and, where there is a file, in that.

    Every reply is on disk as soon as it is there: a run that is killed goes on where it was.

    Args:
        path: The file, made with its first reply; None: in memory alone.
        shared: Whether other processes may add to the file meanwhile; what they add is found.

    Raises:
        InputError: The file is none of this kind.
    """

    def __init__(self, path: Path | None = None, *, shared: bool = False) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        self._rows = self._end = 0  # how far the file has been read
        self._shared = shared
        self._lock: AbstractContextManager[Any] = FileLock(f"{path}.lock") if shared else nullcontext()
        self._catch_up()

    def get(self, key: str) -> Reply | None:
        """Return what a judge said when it was asked this; None if it was not."""
        if self._shared and key not in self._replies:
            self._catch_up()
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep what a judge said."""
        self._replies[key] = reply
        if self.path is not None:
            with self._lock:
                append_jsonl(self.path, [{"asked": key, **asdict(reply)}])

    def _catch_up(self) -> None:
        """Read what the file has beyond what was read of it."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size == self._end:
            return
        with self._lock:
            lines = whole_lines(self.path, self._end)
            self._end = self.path.stat().st_size
        for line in lines:
            self._rows += 1
            try:
                row = json.loads(line)
                key, reply = row.pop("asked"), Reply(**row)
                if [type(value) for value in (key, *asdict(reply).values())] != [str, str, int, int]:
                    raise ValueError("values of other kinds")
                self._replies[key] = reply
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{self.path}, row {self._rows}: no reply of a judge; remove the file to judge anew"
                ) from error


def key_of(**asked: object) -> str:
    """Return the key of what a judge is asked, which depends on all of it."""
    return text_digest(json.dumps(asked, sort_keys=True, ensure_ascii=False))
