"""Capability by the tasks of lm_eval, by which the field compares models; it is imported where tasks are asked for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.importing import import_heavy


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task.

    Attributes:
        task: The task's name, or that of a group of tasks.
        metric: The metric's name and that of the filter that answers went through, as in `exact_match,strict-match`.
        value: The figure, in the metric's own unit; mostly a share.
        stderr: Its standard error; None where lm_eval has none.
        n: How many documents it is of.
        version: The task's version.
        lm_eval: The version of lm_eval.
        shots: How many solved examples every prompt shows; None of a group whose tasks differ.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    version: str
    lm_eval: str
    shots: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


class CapabilityTasks(Protocol):
    """Tasks that are loaded, and their data with them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, tags and groups that were asked for."""

    def check(self, model: PreTrainedModel, written: ChatFormat) -> None:
        """Find out before a long run whether the tasks can be measured.

        Args:
            model: The model.
            written: How its prompts are written, with its tokenizer.

        Raises:
            InputError: The chat template refuses a prompt, or the model has no room for an answer.
        """

    def __call__(
        self, model: PreTrainedModel, written: ChatFormat, *, batch_size: int, seed: int
    ) -> tuple[TaskFigure, ...]:
        """Measure a model, which is left as it was.

        Args:
            model: The model.
            written: How its prompts are written, with its tokenizer.
            batch_size: Requests that go through the model at a time.
            seed: Of what tasks draw; the examples that prompts show are the same for every seed.

        Returns:
            The figures of all tasks, those of groups behind those of their tasks.

        Raises:
            InputError: As `check`.
        """


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, limit: int | None = None
) -> CapabilityTasks:
    """Load tasks of lm_eval by name, and their data.

    Args:
        names: Tasks, tags or groups.
        include_path: A folder with task files of one's own, which come before lm_eval's. Task files may name Python
            functions, which lm_eval then runs.
        limit: Take only the first so many documents of each task; None: all.

    Returns:
        The tasks.

    Raises:
        InputError: A name is empty or stands twice, lm_eval is not installed, it has no such task, or a task cannot be
            loaded.
    """
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--capability_tasks {','.join(names)}: expected names with a comma between them, each once")
    if find_spec("lm_eval") is None:
        raise InputError("--capability_tasks needs lm_eval; install it with pip install 'holdfast-llm[lm-eval]'")
    harness = import_heavy("holdfast.evaluation.harness")
    tasks: CapabilityTasks = harness.HarnessTasks.load(tuple(names), include_path, limit)
    return tasks
