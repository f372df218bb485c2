"""What token ids a model can read: how many at once, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from holdfast.errors import InputError


@dataclass(frozen=True)
class Limits:
    """How many positions a model has (None: as many as are asked for), and how many entries its vocabulary."""

    positions: int | None
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> Limits:
        """The limits of a model."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Not `num_embeddings`, which an adapted embedding does not have.
        return cls(positions, len(model.get_input_embeddings().weight))

    def padding(self, *candidates: int | None) -> int:
        """The first of these tokens that the model knows, else 0: what fills up rows where a mask hides it."""
        return next((token for token in candidates if token is not None and token < self.vocabulary), 0)

    def check_length(self, length: int, where: str) -> None:
        """Raise InputError if a row of so many tokens, named by `where`, has more than the model can read at once.

        Rotary models would read on without a word, at positions that they were never trained on.
        """
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"{where} has {length} tokens, but the model has {self.positions} positions; cut rows with "
                f"--max_length {self.positions}"
            )

    def check_tokens(self, ids: Sequence[int], where: str) -> None:
        """Raise InputError if a row, named by `where`, has a token that the model does not know."""
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"{where} has the token {max(ids)}, but the model's vocabulary has {self.vocabulary} entries; expected "
                "the tokenizer that the model was trained with"
            )
