"""The data side of a trainer: rows in any accepted format become tokens, with labels on their completions alone."""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from holdfast.config import DefenseConfig
from holdfast.data.formats import ORIGIN, called, in_file_order, names_of
from holdfast.data.limits import Limits
from holdfast.data.refusals import REFUSAL_COLUMNS, RefusalCollator, join_refusals, numbered, refusal_texts
from holdfast.data.rendering import IGNORED, ChatFormat
from holdfast.errors import InputError

logger = logging.getLogger(__name__)


class CompletionTrainer(SFTTrainer):
    """TRL's trainer, which loses no row silently and reads every data set of a run in the same way.

    Attributes:
        refused_sets: The data sets ("train", or by the names of `DefenseTrainer.batches_of`) whose batches come with a
            refusal view; their trainer's configuration has a field `refusal`.
        asks_variously: Whether the trainer's configuration has a field `suffixes`, with which about half of all rows
            then ask.
        data_names: What messages call a data set, by these names, where that is not what it is called here; see
            `holdfast.data.formats.called`.
        kept_rows: The names of the rows that are trained on, where rows have names (`holdfast.data.formats.ORIGIN`), by
            data set.
    """

    refused_sets: frozenset[str] = frozenset()
    asks_variously = False
    _format: ChatFormat | None = None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *args: Any,
        data_names: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.data_names = data_names or {}
        self.kept_rows: dict[str, list[str]] = {}
        self._limits: Callable[[], Limits] = functools.partial(Limits.of, model)  # which TRL may yet resize
        super().__init__(model, *args, **kwargs)
        padding, vocabulary = self.processing_class.pad_token_id, self._limits().vocabulary
        if padding is not None and padding >= vocabulary:
            raise InputError(
                f"the padding token {self.processing_class.pad_token!r} is number {padding}, but the model's "
                f"vocabulary has {vocabulary} entries; name another one with --pad_token"
            )
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
        """Tokenise and label in the run's one format, truncate and pack in TRL's way, and never lose a row silently.

        TRL drops rows whose completion was cut off; here they are counted on the labels before truncation.
        """
        name = self.data_names.get(dataset_name, dataset_name)
        require_rows(dataset, name)
        if self._format is None:  # now that the tokenizer has the template of --chat_template_path
            self._format = ChatFormat.of(processing_class, args)
        refused = dataset_name in self.refused_sets
        refusal: str = cast(Any, args).refusal if refused else ""
        self._format.name_idle_columns(dataset, name=name, used=[refusal])
        prepare = functools.partial(
            self._label,
            written=self._format,
            processing_class=processing_class,
            args=args,
            packing=packing,
            dataset_name=dataset_name,
            name=name,
        )
        if not refused:
            return prepare(dataset)
        dataset = numbered(dataset)
        texts = refusal_texts(refusal, dataset, processing_class, seed=args.seed, name=name)
        rows = prepare(dataset)
        return join_refusals(rows, prepare(dataset, dataset_name=f"refused {dataset_name}", answers=texts))

    def begun_and_refused(self, dataset: Dataset, refusal: str, openers: Sequence[str], *, name: str) -> Dataset:
        """Prepare rows whose answers begin as an attacker begins them, and then refuse; only refusals have labels.

        Args:
            dataset: Rows of text or messages.
            refusal: As for `refusal_texts`.
            openers: How answers begin; every row draws one.
            name: What messages call the data set.

        Raises:
            InputError: The rows or the refusals cannot be used.
        """
        require_rows(dataset, name)
        args, tokenizer = self.args, self.processing_class
        draw = random.Random(f"holdfast openers {args.seed}")
        assert self._format is not None  # the train data have been prepared
        return self._label(
            dataset,
            self._format,
            tokenizer,
            args,
            args.packing,
            f"begun {name}",
            name,
            answers=refusal_texts(refusal, dataset, tokenizer, seed=args.seed, name=name),
            openers=[draw.choice(openers) for _ in range(len(dataset))],
        )

    def _label(
        self,
        dataset: Dataset,
        written: ChatFormat,
        processing_class: PreTrainedTokenizerBase,
        args: DefenseConfig,
        packing: bool,
        dataset_name: str,
        name: str,
        answers: Sequence[str] | None = None,
        openers: Sequence[str] | None = None,
    ) -> Dataset:
        """Rows as tokens and labels, truncated and packed; `dataset_name` is TRL's, `name` that of messages."""
        tokens = written.tokenize(
            dataset,
            name=name,
            answers=answers,
            openers=openers,
            suffixes=self._suffixes(len(dataset), args, name),
            workers=args.dataset_num_proc,
        )
        untruncated = copy.copy(args)
        untruncated.max_length, untruncated.shuffle_dataset = None, False
        # Rows that came tokenised may have masks, of which TRL makes labels.
        labelled = super()._prepare_dataset(tokens, processing_class, untruncated, False, None, dataset_name)
        labelled = _fitting(labelled, self._limits(), args, packing, name, refused=answers is not None)
        if ORIGIN in labelled.column_names:
            self.kept_rows[dataset_name] = list(labelled[ORIGIN])
        return super()._prepare_dataset(labelled, processing_class, args, packing, None, dataset_name)

    def _suffixes(self, count: int, args: DefenseConfig, name: str) -> list[str] | None:
        """What the prompts of a data set end with: about half with one of the suffixes, the others as they did."""
        given: list[str] | None = cast(Any, args).suffixes if self.asks_variously else None
        if given is None:
            return None
        draw = random.Random(f"holdfast suffixes {args.seed} {name}")
        return [f" {draw.choice(given)}" if draw.random() < 0.5 else "" for _ in range(count)]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = cast("list[str]", getattr(self, "_signature_columns"))  # noqa: B009  (typed nowhere)
        self._signature_columns = list(dict.fromkeys([*known, *REFUSAL_COLUMNS]))


def require_rows(dataset: Any, name: str) -> None:
    """Raise InputError for what is no data set, or an empty one."""
    if not isinstance(dataset, Dataset):
        raise InputError(f"{called(name)} must be a datasets.Dataset, got a {type(dataset).__name__}")
    if len(dataset) == 0:
        raise InputError(f"{called(name)} has no rows")


def _fitting(
    dataset: Dataset, limits: Limits, args: DefenseConfig, packing: bool, name: str, *, refused: bool
) -> Dataset:
    """The rows that keep at least one completion token when they are cut, all of them within the model's limits."""
    # Packing with "bfd" cuts rows at max_length, as padding does; the other strategies go on in the next block.
    cut = args.max_length if not packing or args.packing_strategy == "bfd" else None
    keeps_end = args.truncation_mode == "keep_end"
    wraps = packing and args.packing_strategy == "wrapped"
    keep: list[int] = []
    first_lost, tokens = "", 0
    with_refusals, with_refusal = (" with refusals", " with its refusal") if refused else ("", "")
    names = names_of(dataset, name=name)
    order = in_file_order(names)  # of several rows with a fault the first is named
    rows = dataset.select(order)
    for i, ids, labels in zip(order, rows["input_ids"], rows["labels"], strict=True):
        where = names[i]
        if len(labels) != len(ids):
            raise InputError(f"{where} has {len(labels)} labels for {len(ids)} tokens; expected one for each")
        left = _kept(labels, cut, keeps_end)
        # The first token of a row is never predicted.
        if all(label == IGNORED for label in left[1:]):
            first_lost = first_lost or where.removesuffix(f" of {called(name)}")
            continue
        keep.append(i)
        tokens += len(ids)
        limits.check_tokens(ids, where + with_refusal)
        if not wraps:
            limits.check_length(min(len(left), args.max_length or len(left)), where + with_refusal)
    if wraps:
        limits.check_length(min(tokens, cast(int, args.max_length)), f"a packed row of {called(name)}")
    if cut is not None and packing and keeps_end:  # TRL's packing keeps the start, whatever it is told
        dataset = dataset.map(
            lambda row: {column: _kept(row[column], cut, True) for column in ("input_ids", "labels")},
            desc=f"Truncating {called(name)}",
        )
    lost = len(dataset) - len(keep)
    if not lost:
        return dataset
    described = f"{lost} of {len(dataset)} rows of {called(name)}{with_refusals} keep no completion token"
    described += f" within --max_length {cut}" if cut else ""
    if not args.drop_untrainable_rows or not keep:
        cure = "" if args.drop_untrainable_rows else " or pass --drop_untrainable_rows"
        raise InputError(f"{described} (the first is {first_lost}); raise --max_length{cure}")
    logger.warning("%s and were dropped (the first is %s)", described, first_lost)
    return dataset.select(sorted(keep))


def _kept(tokens: list[int], cut: int | None, keeps_end: bool) -> list[int]:
    """What truncation leaves of a row."""
    if cut is None:
        return tokens
    return tokens[-cut:] if keeps_end else tokens[:cut]
