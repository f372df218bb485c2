"""The prompts that a model is measured on: what they are for, and who grades the answers to them."""

from dataclasses import dataclass
from typing import Any, Literal

from holdfast.data.formats import as_message
from holdfast.data.load import PROMPT_COLUMNS, Prompt, load_rows
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
        source: Where the prompts are from.
        prompts: Text or messages each.
        answers: The expected answers; None if there are none.
    """

    role: Role
    source: str
    prompts: list[Prompt]
    answers: list[str] | None


def load_prompts(
    source: str, *, flag: str, role: Role, judge_name: str = "exact", max_prompts: int | None = None
) -> PromptSet:
    """Read prompts, and the expected answers where the judge needs them.

    Args:
        source: A file or a Hub id, see `load_rows`, with a column `prompt`, `messages` or `conversations`, perhaps
            `system` and, for the exact judge, `answer`. Of `messages` and `conversations` the prompt is what leads up
            to the last user turn, with it.
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
    rows = load_rows(source, flag=flag, columns=[(*group, *more) for group in PROMPT_COLUMNS])
    if max_prompts is not None:
        rows = rows.select(range(min(max_prompts, len(rows))))
    column = next(name for (name,) in PROMPT_COLUMNS if name in rows.column_names)
    prompts = [_prompt(cell, column, f"{flag} {source}, row {number}") for number, cell in enumerate(rows[column], 1)]
    for number, system in enumerate(rows["system"] if "system" in rows.column_names else (), 1):
        if system:
            prompts[number - 1] = _with_system(prompts[number - 1], system, f"{flag} {source}, row {number}")
    for name in {"tools", "chat_template_kwargs"}.intersection(rows.column_names):
        for number, value in enumerate(rows[name], 1):
            if value:
                raise InputError(
                    f"{flag} {source}, row {number}: an evaluation has no place for {name}; leave them out"
                )
    answers = list(rows["answer"]) if needs_answer else None
    for number, answer in enumerate(answers or [], 1):
        if not isinstance(answer, str) or not answer.strip(" \t\r\n,."):
            raise InputError(f"{flag} {source}, row {number}: 'answer' must be text, and not empty")
    return PromptSet(role, source, prompts, answers)


def _prompt(cell: Any, column: str, where: str) -> Prompt:
    """What a model is asked by a cell of this column."""
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
    if not isinstance(system, str) or any(turn["role"] == "system" for turn in messages):
        raise InputError(f"{where}: 'system' must be text, and no system turn stand beside it")
    return [{"role": "system", "content": system}, *messages]


def judge_for(role: Role, chosen: Judge) -> Judge:
    """The judge of a set: the chosen one, or where answers are compared with the expected ones the exact one."""
    return chosen if role in JUDGED else get_judge("exact")
