"""What a command shows while it runs: progress and messages on standard error, results on standard output."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: Messages and progress.
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
#: Results.
stdout = Console(highlight=False)

#: What a progress line tells of a training log, in this order, where the log has it.
_SHOWN = (
    "loss",
    "attacked_loss",
    "attack_staleness",
    "harmful_loss",
    "safety_loss",
    "refusal_margin",
    "grad_norm",
    "learning_rate",
    "eval_loss",
)


def set_up_logging() -> None:
    """Send Holdfast's own messages to standard error; of libraries, and of ranks but the first, only warnings."""
    logger = logging.getLogger("holdfast")
    if not logger.handlers:
        logger.addHandler(_Messages())
        logger.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)
        logger.propagate = False
    # Of TRL's own defaults and calls, which a user of a command can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def say(message: str) -> None:
    """Tell what happens now, on standard error; of several ranks, the first one does."""
    if _is_first_rank():
        stderr.print(message, markup=False)


def warn(message: str) -> None:
    """Tell what the user should know before trusting the result, on standard error; of several ranks, the first one."""
    if _is_first_rank():
        stderr.print(f"warning: {message}", markup=False, style="yellow")


class _Messages(logging.Handler):
    """Tells what Holdfast's modules log as commands tell things themselves: one line each, whatever its length."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else say)(self.format(record))


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun sets it, long before there is a process group


class ProgressReport(TrainerCallback):
    """A progress bar with the last logged losses; one line per log where standard error is not a terminal.

    Args:
        title: What is being trained.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the bar. It is tqdm's, below which a simulated attack shows its own."""
        if state.is_world_process_zero and stderr.is_terminal:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self._title, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the losses."""
        logs = logs or {}
        # The last log of a run, its summary, carries the rest of some averages, but no loss.
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        shown = {name: logs[name] for name in _SHOWN if name in logs}
        text = " · ".join(f"{name} {_short(value)}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            say(f"{self._title}: step {state.global_step}/{state.max_steps} · {text}")

    def close(self) -> None:
        """Take the bar down, also when training ended early."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def steps_shown(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is that reports `(steps done, steps in all)`.

    Args:
        title: What is being done.

    Yields:
        What to call after every step.
    """
    with tqdm(desc=title, unit="step", dynamic_ncols=True, disable=not stderr.is_terminal) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if not stderr.is_terminal and done % max(total // 10, 1) == 0:
                say(f"{title}: step {done}/{total}")

        yield show


def _short(value: Any) -> str:
    """Four significant digits; the trainer hands some numbers over as text."""
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)
