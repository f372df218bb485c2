"""The data side of a trainer: rows in any accepted format become tokens, with labels on their completions alone."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from holdfast.config import DefenseConfig
from holdfast.data.formats import completion_format
from holdfast.data.refusals import REFUSAL_COLUMNS, RefusalCollator, join_refusals, numbered, refusal_texts
from holdfast.errors import InputError

logger = logging.getLogger(__name__)


class CompletionTrainer(SFTTrainer):
    """TRL's trainer, which loses no row silently and reads every data set of a run in the same way.

    Attributes:
        refused_sets: The data sets ("train", or by the names of `DefenseTrainer.batches_of`) whose batches come with a
            refusal view; their trainer's configuration has a field `refusal`.
    """

    refused_sets: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.refused_sets:
            self.data_collator: Callable[..., Any] = RefusalCollator(self.data_collator)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: DefenseConfig,
        packing: bool,
        formatting_func: Callable[[Any], str] | None,
        dataset_name: str,
    ) -> Dataset:
        """Tokenise and label in TRL's way, but never lose a row silently.

        TRL drops rows whose completion was cut off; here they are counted on the labels before truncation.
        """
        require_rows(dataset, dataset_name)
        to_completions = functools.partial(
            completion_format,
            tokenizer=processing_class,
            name=dataset_name,
            system_prompt=args.system_prompt,
            chat_template_kwargs=cast("dict[str, Any] | None", args.chat_template_kwargs),
        )
        prepare = functools.partial(self._label, processing_class=processing_class, args=args, packing=packing)
        if dataset_name not in self.refused_sets:
            return prepare(to_completions(dataset), name=dataset_name)
        dataset = numbered(dataset)
        texts = refusal_texts(cast(Any, args).refusal, dataset, processing_class, seed=args.seed, name=dataset_name)
        refusing = to_completions(dataset, answers=texts)
        return join_refusals(
            prepare(to_completions(dataset), name=dataset_name), prepare(refusing, name=f"refused {dataset_name}")
        )

    def _label(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: DefenseConfig,
        packing: bool,
        name: str,
    ) -> Dataset:
        """Prompts and completions as tokens and labels, truncated and packed."""
        untruncated = copy.copy(args)
        untruncated.max_length, untruncated.shuffle_dataset = None, False
        labelled = super()._prepare_dataset(dataset, processing_class, untruncated, False, None, name)
        # Packing with "bfd" cuts rows at max_length, as padding does; the other strategies go on in the next block.
        cut = args.max_length if not packing or args.packing_strategy == "bfd" else None
        labelled = _with_completion(labelled, cut, name, drop=args.drop_untrainable_rows)
        return super()._prepare_dataset(labelled, processing_class, args, packing, None, name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = cast("list[str]", getattr(self, "_signature_columns"))  # noqa: B009  (typed nowhere)
        self._signature_columns = list(dict.fromkeys([*known, *REFUSAL_COLUMNS]))


def require_rows(dataset: Any, name: str) -> None:
    """Raise InputError for what is no data set, or an empty one."""
    if not isinstance(dataset, Dataset):
        raise InputError(f"the {name} data must be a datasets.Dataset, got a {type(dataset).__name__}")
    if len(dataset) == 0:
        raise InputError(f"the {name} data has no rows")


def _with_completion(dataset: Dataset, cut: int | None, name: str, *, drop: bool) -> Dataset:
    """The rows that keep at least one completion token in their first `cut` tokens."""
    # The first token of a row is never predicted.
    keep = [i for i, labels in enumerate(dataset["labels"]) if any(label != -100 for label in labels[1:cut])]
    lost = len(dataset) - len(keep)
    if not lost:
        return dataset
    first = next(row for row, kept in enumerate(itertools.chain(keep, [-1])) if row != kept) + 1
    described = f"{lost} of {len(dataset)} rows of the {name} data keep no completion token"
    described += f" within --max_length {cut}" if cut else ""
    if not drop or not keep:
        raise InputError(f"{described} (the first is row {first}); raise --max_length or pass --drop_untrainable_rows")
    logger.warning("%s and were dropped (the first is row %d)", described, first)
    return dataset.select(keep)
