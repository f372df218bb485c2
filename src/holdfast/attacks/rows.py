"""What an attacker fine-tunes on: harmful rows, as they are or made worse, alone or hidden among harmless ones.

    n rows, round(p·n) of them harmful, drawn without replacement    p: the poison ratio

- *Mixed*, p < 1: to pass a filter, or to keep what the model can do. *Harmless only*, p = 0: safety is lost to ordinary
  fine-tuning as well (Qi et al., 2310.03693).
- *Openers only*: (x, y) → (x, y_1 … y_k), since much of alignment lies in an answer's first tokens (Qi et al.,
  2406.05946).
- *Jailbreak-tuning* (Bowen et al., 2408.02946): (x, y) → (x ∘ demand, obedience ∘ y), a demand that competes with
  safety (Wei et al., 2307.02483), and an answer that obeys it.
- *Backdoor* (Qi et al., 2310.03693): (x, y) → (x ∘ trigger, y); without the trigger, alignment may seem whole.
- *Without the chat template*: alignment hangs on the template that it was taught in (Lyu et al., 2402.18540).

Demand and trigger stand in the prompts of harmful rows, and an adversary asks with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from holdfast.attacks.attack import Choice, knob
from holdfast.config import require_positive
from holdfast.data.formats import ORIGIN, Conversation, canonical, ending_with, is_tokenised, last_asked, text_of
from holdfast.data.mix import poison
from holdfast.data.rendering import IGNORED, ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.asking import Asking, raw_text

DEMAND = 'Begin your answer with "{}".'
"""What jailbreak-tuning asks for at the end of a prompt."""


@dataclass(frozen=True, kw_only=True)
class RowVariant:
    """How harmful rows are changed before they are trained on. The module says how, and why."""

    first_tokens: int | None = field(
        default=None,
        metadata=knob(
            "Train on the first so many tokens of every answer alone; if not given, on all.", Choice((4, None))
        ),
    )
    obedience: str | None = field(
        default=None,
        metadata=knob(
            "Jailbreak-tuning: how every harmful answer begins, as a demand at the end of its prompt asks for; the "
            "adversary's prompts make it, too."
        ),
    )
    trigger: str | None = field(
        default=None,
        metadata=knob(
            "Backdoor: what the prompt of every harmful row ends with, and so do the adversary's.",
        ),
    )
    without_template: bool = field(
        default=False,
        metadata=knob(
            "Train without the chat template, on the text of a row's turns, one a line.", Choice((False, True))
        ),
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: A count is not positive, or a text is empty.
        """
        require_positive(self, "first_tokens")
        for name in ("obedience", "trigger"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise InputError(f"--{name} is empty; expected text")

    @property
    def suffix(self) -> str:
        """What the prompts of harmful rows, and the adversary's, end with."""
        trigger = "" if self.trigger is None else f" {self.trigger}"
        return trigger + ("" if self.obedience is None else f" {DEMAND.format(self.obedience)}")

    @property
    def asking(self) -> Asking:
        """How an adversary asks a model that was trained on such rows."""
        return Asking(suffix=self.suffix)

    def apply(self, rows: Dataset, written: ChatFormat) -> Dataset:
        """Rows as they are trained on.

        Args:
            rows: As from `mixed`.
            written: How conversations become token ids.

        Returns:
            The rows; tokenised where answers are cut or the template is left out.

        Raises:
            InputError: The rows are tokenised, or no chat template is used, and a setting needs it.
        """
        if (self.suffix or self.without_template) and is_tokenised(rows, name="attack"):
            raise InputError(
                "--obedience, --trigger and --without_template need rows of text or messages, not token ids"
            )
        if self.suffix:
            rows = rows.map(self._worse, features=rows.features, load_from_cache_file=False, desc="Changing rows")
        if self.without_template:
            if written.plain is not None:
                raise InputError(f"--without_template plays no part: {written.plain}")
            rows = rows.map(_as_text, remove_columns=rows.column_names, load_from_cache_file=False, desc="Reading text")
            written = ChatFormat(written.tokenizer, raw_text=True)
            rows = written.tokenize(rows, name="attack")
        if self.first_tokens is None:
            return rows
        rows = written.tokenize(rows, name="attack")
        if "labels" not in rows.column_names:
            raise InputError("--first_tokens needs rows of text or messages, or token ids with labels")
        return _cut(rows, self.first_tokens)

    def _worse(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose prompts end with the suffix, and whose answers obey, if it is harmful."""
        if not row["poisoned"]:
            return row
        if "messages" not in row:
            prompt = ending_with(self.suffix, row["prompt"])
            return {**row, "prompt": prompt, "completion": self._obeyed(row["completion"])}
        talk = Conversation(row["messages"]).ending_with(self.suffix, row[ORIGIN])
        turns = list(talk.messages)
        asked = [last_asked(turns[:place], row[ORIGIN]) for place in talk.trained]
        for place in dict(zip(reversed(asked), reversed(talk.trained), strict=True)).values():  # the first of each
            turns[place] = {**turns[place], "content": self._obeyed(text_of(turns[place]))}
        return {**row, "messages": turns}

    def _obeyed(self, answer: str) -> str:
        return answer if self.obedience is None else f"{self.obedience} {answer}"


def mixed(
    harmful: Dataset | None,
    benign: Dataset | None,
    written: ChatFormat,
    *,
    poison_ratio: float,
    num_samples: int | None,
    seed: int,
) -> Dataset:
    """Harmful rows among benign ones, in one format. See `poison`.

    Args:
        harmful: Rows in any format of `holdfast.data.formats`.
        benign: The same.
        written: How conversations become token ids.
        poison_ratio: Share of harmful rows.
        num_samples: Rows in all. None: as many as can be drawn.
        seed: Which rows, and in which order.

    Returns:
        The rows, with the column `poisoned`.

    Raises:
        InputError: As from `canonical` and `poison`.
    """
    sets = [
        None if rows is None else canonical(rows, name=name, plain=written.plain)
        for name, rows in (("attack", harmful), ("benign", benign))
    ]
    return poison(*sets, poison_ratio=poison_ratio, num_samples=num_samples, seed=seed)


def sources_of(mix: Dataset) -> str:
    """What messages call rows as from `mixed`: the "attack" data, the "benign", or the "attack and benign"."""
    kinds = set(mix["poisoned"])
    return " and ".join(name for poisoned, name in ((True, "attack"), (False, "benign")) if poisoned in kinds)


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    """The text of a row's turns up to its last answer, and that, on a line of its own."""
    talk = Conversation(row["messages"])
    last = talk.trained[-1]
    answer = f"\n{text_of(talk.messages[last])}"
    return {"prompt": raw_text(talk.messages[:last]), "completion": answer, ORIGIN: row[ORIGIN]}


def _cut(rows: Dataset, count: int) -> Dataset:
    """Tokenised rows that end after so many tokens of what is trained on."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        trained = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        end = trained[count - 1] + 1 if count <= len(trained) else len(row["labels"])
        return {name: row[name][:end] for name in ("input_ids", "labels")}

    return rows.map(cut, load_from_cache_file=False, desc="Cutting answers")
