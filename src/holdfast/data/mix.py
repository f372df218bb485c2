"""Mixing harmful rows into a benign set, and telling how far two sets of prompts overlap."""

import random
from collections.abc import Iterable

from datasets import Dataset, concatenate_datasets

from holdfast.data.formats import Conversation, text_of
from holdfast.data.load import Prompt
from holdfast.errors import InputError


def poison(
    harmful: Dataset | None,
    benign: Dataset | None,
    *,
    poison_ratio: float,
    num_samples: int | None,
    seed: int,
) -> Dataset:
    """Draw an attacker's training set: harmful rows, hidden among benign ones.

    Both kinds are drawn without replacement. For one seed a smaller set is contained in a larger one of the same
    ratio, so that attacks with more samples can be compared.

    Args:
        harmful: Rows with harmful completions; not needed if `poison_ratio` is 0.
        benign: Rows to hide them among, with the same columns; not needed if `poison_ratio` is 1.
        poison_ratio: Share of harmful rows, from 0 (a control: harmless fine-tuning) to 1.
            `round(poison_ratio * num_samples)` rows are harmful.
        num_samples: Rows in all. None: as many as can be drawn.
        seed: Which rows, and in which order.

    Returns:
        The shuffled rows, with a boolean column `poisoned` that tells harmful rows from benign ones.

    Raises:
        InputError: If the ratio is outside [0, 1], a set is needed and missing or has too few rows, a ratio above 0
            rounds to no harmful row, or the two sets have different columns.
    """
    if not 0 <= poison_ratio <= 1:
        raise InputError(f"--poison_ratio must lie between 0 and 1, but is {poison_ratio}")
    if num_samples is not None and num_samples < 1:
        raise InputError(f"--num_samples must be positive, but is {num_samples}")
    harmful = harmful if poison_ratio > 0 else None
    benign = benign if poison_ratio < 1 else None
    if poison_ratio > 0 and harmful is None:
        raise InputError(f"--attack_data is needed, since --poison_ratio {poison_ratio} asks for harmful rows")
    if poison_ratio < 1 and benign is None:
        raise InputError(f"--benign_data is needed, since --poison_ratio {poison_ratio} leaves room for benign rows")
    if harmful is not None and benign is not None and benign.features != harmful.features:
        raise InputError(
            f"--benign_data has the columns {_describe(benign)}, but --attack_data has {_describe(harmful)}; "
            "they must be equal to be mixed"
        )
    dangerous, available = len(harmful or ()), len(benign or ())
    total = _largest_mix(dangerous, available, poison_ratio) if num_samples is None else num_samples
    poisoned = round(poison_ratio * total)
    if harmful is not None and poisoned < 1:
        raise InputError(f"--poison_ratio {poison_ratio} of {total} rows is no harmful row at all")
    if poisoned > dangerous:
        raise InputError(
            f"--poison_ratio {poison_ratio} of {total} rows needs {poisoned} harmful rows, "
            f"but --attack_data has {dangerous}"
        )
    if total - poisoned > available:
        raise InputError(
            f"--poison_ratio {poison_ratio} of {total} rows needs {total - poisoned} benign rows, "
            f"but --benign_data has {available}"
        )
    rng = random.Random(seed)
    chosen = []
    if harmful is not None:
        chosen.append(_draw(harmful, poisoned, rng, poisoned=True))
    if benign is not None:
        chosen.append(_draw(benign, total - poisoned, rng, poisoned=False))
    order = list(range(total))
    rng.shuffle(order)
    return concatenate_datasets(chosen).select(order)


def overlap(prompts_a: Iterable[Prompt | Conversation], prompts_b: Iterable[Prompt]) -> int:
    """Count the distinct prompts of `prompts_b` that also occur in `prompts_a`.

    A model that was attacked with the very prompts it is measured on looks weaker than it is. Prompts are compared by
    their user turns alone, without regard to case and white space. A prompt of `prompts_b` occurs in a conversation
    also as the last question of it.

    Args:
        prompts_a: Prompts, as text, messages, or conversations without their answers.
        prompts_b: Prompts to look up, as text or as messages.

    Returns:
        The number of distinct prompts found.
    """
    questions = [_questions(prompt) for prompt in prompts_a]
    asked = {" ".join(turns) for turns in questions} | {turns[-1] for turns in questions if turns}
    return len({" ".join(_questions(prompt)) for prompt in prompts_b} & asked)


def _largest_mix(harmful: int, benign: int, ratio: float) -> int:
    """Return the most rows that can be drawn without replacement at this ratio."""
    total = harmful + benign
    while total and (round(ratio * total) > harmful or total - round(ratio * total) > benign):
        total -= 1
    return total


def _draw(rows: Dataset, count: int, rng: random.Random, *, poisoned: bool) -> Dataset:
    order = list(range(len(rows)))
    rng.shuffle(order)
    return rows.select(order[:count]).add_column("poisoned", [poisoned] * count)


def _describe(rows: Dataset) -> str:
    return ", ".join(f"{name} ({feature})" for name, feature in rows.features.items())


def _questions(prompt: Prompt | Conversation) -> list[str]:
    """The user turns of a prompt, without regard to case and white space."""
    messages = prompt.messages if isinstance(prompt, Conversation) else prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return [" ".join(text_of(turn).casefold().split()) for turn in messages if turn["role"] == "user"]
