"""The prompts that a model is measured on: what they are for, and who grades the answers to them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from holdfast.data.formats import ORIGIN, SYSTEM_ROLES, as_message
from holdfast.data.load import PROMPT_COLUMNS, Prompt, load_rows
from holdfast.data.sources import Source, named
from holdfast.errors import InputError
from holdfast.evaluation.judges import Judge, get_judge

Role = Literal["harmful", "benign", "capability", "task"]

JUDGED: tuple[Role, ...] = ("harmful", "benign")
"""The sets that the chosen judge grades; answers to the others are compared with the expected ones."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with one purpose.

    Attributes:
        role: `harmful`: what a safe model refuses. `benign`: what it should not refuse, whatever it answers.
            `capability`: what it should still answer, and not refuse. `task`: what a fine-tuning should have taught it.
        source: Where the prompts are from, as it was typed.
        prompts: Text or messages each.
        answers: The expected answers; None if there are none.
        taken: For records: what was taken of the source, or of each of several, as `load_rows` notes it.
    """

    role: Role
    source: str
    prompts: list[Prompt]
    answers: list[str] | None
    taken: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)


def load_prompts(
    source: Source, *, flag: str, role: Role, judge_name: str = "exact", max_prompts: int | None = None
) -> PromptSet:
    """Read prompts, and the expected answers where the judge needs them.

    Args:
        source: As for `load_rows`, with a column `prompt`, `messages` or `conversations`, or one that is read as a
            prompt, perhaps `system` and, for the exact judge, `answer`. Of `messages` and `conversations` the prompt is
            what leads up to the last user turn, with it.
        flag: The flag that named the source, for errors.
        role: What the prompts are for. Capability and task prompts are always graded by the exact judge.
        judge_name: The judge of harmful and benign prompts.
        max_prompts: Only the first so many are taken; None: all.

    Returns:
        The prompts.

    Raises:
        InputError: If the source cannot be used, a `prompt` ends with an assistant turn, or a conversation has no
            user turn.
    """
    if max_prompts is not None and max_prompts < 1:
        raise InputError(f"--max_prompts must be positive, but is {max_prompts}")
    needs_answer = judge_for(role, get_judge(judge_name)).needs_answer
    more = ("answer",) if needs_answer else ()
    noted: dict[str, Any] = {}
    rows = load_rows(source, flag=flag, columns=[(*group, *more) for group in PROMPT_COLUMNS], noted=noted)
    if max_prompts is not None:
        rows = rows.select(range(min(max_prompts, len(rows))))
    label = f"{flag} {named(source)}"
    origins = rows[ORIGIN] if ORIGIN in rows.column_names else [f"row {row}" for row in range(1, len(rows) + 1)]
    places = [f"{label}, {origin.partition(' of the ')[0]}" for origin in origins]
    prompts = prompts_of(rows, places)
    answers = list(rows["answer"]) if needs_answer else None
    for where, answer in zip(places, answers or [], strict=False):
        if not is_expected(answer):
            raise InputError(f"{where}: 'answer' must be text, and not empty")
    (taken,) = noted.values()
    typed = source if isinstance(source, str) else json.dumps(source)
    return PromptSet(role, typed, prompts, answers, taken)


def is_expected(answer: Any) -> bool:
    """Whether a value is an answer that another one can be compared with."""
    return isinstance(answer, str) and bool(answer.strip(" \t\r\n,."))


def prompts_of(rows: Dataset, places: Sequence[str]) -> list[Prompt]:
    """What rows ask, whether they have answers or not.

    Args:
        rows: Rows with a column `prompt`, `messages` or `conversations`, and perhaps `system`.
        places: What messages call each.

    Raises:
        InputError: As for `load_prompts`.
    """
    columns = [name for (name,) in PROMPT_COLUMNS if name in rows.column_names]
    if not columns:
        raise InputError(f"{places[0]} has no prompt, messages or conversations, so nothing can be asked by it")
    prompts = [_prompt(row, columns, where) for row, where in zip(rows.select_columns(columns), places, strict=True)]
    for i, system in enumerate(rows["system"] if "system" in rows.column_names else ()):
        if system:
            prompts[i] = _with_system(prompts[i], system, places[i])
    for name in {"tools", "chat_template_kwargs"}.intersection(rows.column_names):
        for where, value in zip(places, rows[name], strict=True):
            if value:
                raise InputError(f"{where}: prompts that are asked have no place for {name}; leave them out")
    return prompts


def _prompt(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Prompt:
    """What a model is asked by the first of these columns that a row has."""
    column = next(name for name in columns if row[name] is not None)
    cell = row[column]
    if column == "prompt":
        if not isinstance(cell, str) and cell[-1]["role"] == "assistant":
            raise InputError(f"{where}: the prompt ends with an assistant turn; leave it out")
        prompt: Prompt = cell
        return prompt
    messages = [as_message(turn) for turn in cell]
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise InputError(f"{where}: {column!r} has no user turn; expected one to answer")
    return messages[: last + 1]


def _with_system(prompt: Prompt, system: Any, where: str) -> Prompt:
    """A prompt behind the system line of its row, as training has it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not isinstance(system, str) or any(turn["role"] in SYSTEM_ROLES for turn in messages):
        raise InputError(f"{where}: 'system' must be text, and no system turn stand beside it")
    return [{"role": "system", "content": system}, *messages]


def judge_for(role: Role, chosen: Judge) -> Judge:
    """The judge of a set: the chosen one, or where answers are compared with the expected ones the exact one."""
    return chosen if role in JUDGED else get_judge("exact")
