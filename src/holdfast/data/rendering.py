"""The one place where conversations become token ids: for training, attacks, audits, repairs and evaluations alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from holdfast.config import json_object
from holdfast.data.encoding import covered, token_ids
from holdfast.data.formats import (
    ORIGIN,
    ROW,
    SYSTEM_ROLES,
    Conversation,
    Example,
    PlainText,
    called,
    idle_columns,
    in_file_order,
    is_tokenised,
    names_of,
    reader,
    rows_of,
    text_of,
)
from holdfast.data.load import Prompt
from holdfast.data.spans import AnswerFinder, Located, squeezed
from holdfast.errors import InputError
from holdfast.hub import reason

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that the loss leaves out."""

# Keywords by which templates are told whether an answer begins with thoughts.
_THINKING = ({"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True})


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How a run writes conversations: the tokenizer's own chat template, and what it is given.

    The token ids of a conversation are those of `tokenizer.apply_chat_template`. The loss falls on each answer of the
    assistant as the template shows it and on the token that ends it, and on nothing else.

    Args:
        tokenizer: The model's tokenizer.
        system_prompt: A system turn for every conversation that has none.
        chat_template_kwargs: Keywords for the chat template, such as `{"enable_thinking": False}`.
        raw_text: Take prompts and completions as they stand, even if there is a chat template.

    Raises:
        InputError: A setting needs a chat template, and none is used.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    raw_text: bool = False

    def __post_init__(self) -> None:
        if self.plain is None:
            return
        for name in ("system_prompt", "chat_template_kwargs"):
            if getattr(self, name):
                raise InputError(
                    f"--{name} cannot be used with --raw_text, which uses no chat template"
                    if self.raw_text
                    else f"--{name} needs a chat template, which the tokenizer does not have"
                )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: Any) -> ChatFormat:
        """The format that a configuration asks for: its `system_prompt`, `chat_template_kwargs` and `raw_text`."""
        keywords = settings.chat_template_kwargs
        if isinstance(keywords, str):
            keywords = json_object("chat_template_kwargs", keywords)
        return cls(tokenizer, settings.system_prompt, keywords, settings.raw_text)

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone, without what was found out by them."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @property
    def plain(self) -> str | None:
        """Why no chat template is used, in words; None if one is."""
        if self.raw_text:
            return "--raw_text takes prompts and completions that are text"
        if not self.tokenizer.chat_template:
            return "the tokenizer has no chat template to render them with"
        return None

    @cached_property
    def end_token(self) -> int | None:
        """The token that ends an answer in training; None if nothing does."""
        if self.plain is not None:
            return cast("int | None", self.tokenizer.eos_token_id)
        closing: list[int] = self.tokenizer(self._finder.closing, add_special_tokens=False)["input_ids"]
        return closing[-1] if closing else None

    # ------------------------------------------------------------------ prompts

    def encode_prompts(self, prompts: Sequence[Prompt | Conversation], *, opener: str = "") -> list[list[int]]:
        """Turn prompts into token ids, up to where the answer begins.

        Args:
            prompts: Text or messages each, or a conversation without its answer. With a chat template, text is one
                user turn.
            opener: How every answer begins; it becomes token ids together with its prompt.

        Returns:
            The token ids of every prompt, without padding.

        Raises:
            InputError: The template refuses a prompt or does not show a part of it, messages need a template that is
                not used, or a prompt is empty; the row is named, counted from 1.
        """
        texts = [self.render_prompt(prompt, f"prompt {row}") + opener for row, prompt in enumerate(prompts, 1)]
        encoded = [ids for ids, _ in token_ids(self.tokenizer, texts, plain=self.plain is not None)]
        for row, ids in enumerate(encoded, 1):
            if not ids:
                raise InputError(f"prompt {row} is empty; expected at least one token")
        return encoded

    def render_prompt(self, prompt: Prompt | Conversation, where: str) -> str:
        """Write a prompt as text, up to where the answer begins.

        Args:
            prompt: As for `encode_prompts`.
            where: What messages call it.

        Raises:
            InputError: As `encode_prompts`.
        """
        if self.plain is not None:
            if not isinstance(prompt, str):
                raise InputError(f"{where} is made of messages, but {self.plain}")
            return prompt
        if not isinstance(prompt, Conversation):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
            prompt = Conversation(messages)
        text = self._render(prompt, True, where)
        self._finder.require_shown(prompt, text, where)
        self._tell_own_tokens(prompt, where)
        return text

    # ------------------------------------------------------------------ rows to train on

    def tokenize(
        self,
        dataset: Dataset,
        *,
        name: str,
        answers: Sequence[str] | None = None,
        openers: Sequence[str] | None = None,
        suffixes: Sequence[str] | None = None,
        workers: int | None = None,
    ) -> Dataset:
        """Turn rows into token ids with labels.

        Args:
            dataset: Rows in any format of `holdfast.data.formats`.
            name: What messages call this data set ("train", "attack", …).
            answers: One text per row, to put in the place of its answer, or of its first one.
            openers: How each of these begins, before a space; on that beginning there is no label.
            suffixes: One text per row, which the user turns that are answered end with; an empty one changes nothing.
            workers: Processes to share the work.

        Returns:
            `input_ids` and `labels`, with what `row` and `holdfast_origin` said. Rows that are tokenised already are
            returned as they are.

        Raises:
            InputError: No accepted format, a row that cannot be used or rendered (named), answers or suffixes for
                tokenised rows.
        """
        if is_tokenised(dataset, name=name):
            if answers is not None or suffixes is not None:
                what = "--suffixes" if answers is None else "other answers"
                raise InputError(f"{called(name)} is tokenised, so {what} cannot be put in; use text or messages")
            return dataset
        with_texts: dict[str, Any] = {"read": reader(dataset, name=name, plain=self.plain), "written": self}
        with_texts |= {"answers": answers, "openers": openers, "suffixes": suffixes}
        try:
            return dataset.map(
                _tokenize_batch,
                batched=True,
                with_indices=True,
                fn_kwargs=with_texts,
                remove_columns=[column for column in dataset.column_names if column not in (ROW, ORIGIN)],
                load_from_cache_file=False,  # what is to be said of the rows is said in every run
                num_proc=workers,
                desc=f"Tokenizing {called(name)}",
            )
        except InputError:
            for index in in_file_order(names_of(dataset, name=name)):  # who mends the file begins with its first row
                _tokenize_batch(dataset[index : index + 1], [index], **with_texts)
            raise

    def require_alike(self, dataset: Dataset, *, name: str) -> str | None:
        """Make sure that rows are trained on as prompts are asked, where a keyword of the template can do that.

        The first row of the file is looked at. Elsewhere this is a warning. In an attack that is measured it would make
        a weak attack of a strong one: what was learned stands behind a beginning that no measured prompt has.

        Args:
            dataset: Rows of text or messages, or tokenised ones, which are let through.
            name: What messages call this data set.

        Returns:
            How they differ, in words, where no keyword makes them alike; None if they are.

        Raises:
            InputError: They differ; the message has the keywords.
        """
        if self.plain is not None or is_tokenised(dataset, name=name):
            return None
        first = in_file_order(names_of(dataset, name=name))[0]
        where, talk = reader(dataset, name=name, plain=None)(dataset[first], first)
        if not isinstance(talk, Conversation) or (added := self._finder.locate(talk, where).added) is None:
            return None
        what, cure = self._difference(talk, where, *added)
        if cure:
            raise InputError(what + cure)
        return what

    def name_idle_columns(self, dataset: Dataset, *, name: str, used: Sequence[str] = ()) -> None:
        """Say once which columns play no part.

        Args:
            dataset: Rows of text or messages.
            name: What messages call this data set.
            used: Columns that have a use of their own.
        """
        idle = [] if "input_ids" in dataset.column_names else sorted(set(idle_columns(dataset)) - set(used))
        if idle:
            self._say(logging.INFO, f"columns of {called(name)} that play no part: {', '.join(idle)}", ", ".join(idle))

    def encode(
        self, examples: Sequence[tuple[str, Example]], openers: Sequence[str] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Turn examples, each with its name for messages, into token ids and labels.

        Args:
            examples: The examples.
            openers: How the answer of each begins, on which there is no label.

        Raises:
            InputError: The template refuses an example or does not show a part of it.
        """
        found = [self._locate(example, where) for where, example in examples]
        for place, opener in enumerate(openers or ()):
            [(start, end)] = found[place].answers
            before, shown, _ = found[place].text[start:end].partition(opener)
            if before.strip() or not shown:  # some templates write a space first
                raise InputError(f"{examples[place][0]}: the chat template does not begin its answer with {opener!r}")
            found[place] = replace(found[place], answers=[(start + len(before + opener), end)])
        encoded = []
        texts, plain = [one.text for one in found], self.plain is not None
        written = token_ids(self.tokenizer, texts, plain=plain, offsets=True)
        for (ids, offsets), located in zip(written, found, strict=True):
            labels = [IGNORED] * len(ids)
            for first, last in (covered(offsets, span) for span in located.answers):
                labels[first:last] = ids[first:last]
            encoded.append((ids, labels))
        return encoded

    def _locate(self, example: Example, where: str) -> Located:
        if isinstance(example, PlainText):
            end, text = self.tokenizer.eos_token or "", example.prompt + example.completion
            text = text if text.endswith(end) else text + end
            return Located(text, [(len(example.prompt), len(text))], None)
        located = self._finder.locate(example, where)
        self._tell_own_tokens(example, where)
        if located.added is not None:
            self._tell_difference(example, where, *located.added)
        if self._finder.closing == "":
            self._say(
                logging.WARNING,
                "the chat template writes no token that ends an answer, so training teaches no end of it; "
                "--chat_template_path takes a template that does",
            )
        return located

    def _tell_own_tokens(self, talk: Conversation, where: str) -> None:
        """Warn of turns that hold the template's own tokens, as text does that was rendered before."""
        for number, turn in enumerate(talk.messages, 1):
            token = next((token for token in self._finder.own if token in text_of(turn)), None)
            if token is not None and token not in _THOUGHTS:
                self._say(
                    logging.WARNING,
                    f"turn {number} of {where} holds {token}, by which the chat template itself marks turns; if it was "
                    "rendered already, --raw_text takes prompts and completions as they stand",
                    "own tokens",
                )

    def _tell_difference(self, talk: Conversation, where: str, shown: str, prompt: str) -> None:
        """Warn that training sees another beginning of an answer than generation does, and name what cures it."""
        if "difference" not in self._said:
            self._say(logging.WARNING, "".join(self._difference(talk, where, shown, prompt)), "difference")

    def _difference(self, talk: Conversation, where: str, shown: str, prompt: str) -> tuple[str, str]:
        """What training sees before an answer and generation does not, in words, and what cures it, if anything."""
        what = (
            f"the chat template writes {shown!r} before answers to train on where prompts to be answered have "
            f"{prompt!r} ({where} is the first), so the model is asked otherwise than it was trained"
        )
        for keywords in _THINKING:
            other = ChatFormat(self.tokenizer, self.system_prompt, {**(self.chat_template_kwargs or {}), **keywords})
            try:
                if other._finder.locate(talk, where).added is None:
                    return what, f"; --chat_template_kwargs '{json.dumps(keywords)}' makes the two equal"
            except InputError:
                continue
        return what, ""

    # ------------------------------------------------------------------ the template

    @cached_property
    def _finder(self) -> AnswerFinder:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        special = [token for token in {*added, *self.tokenizer.all_special_tokens} if token.strip()]
        probe = replace(self, system_prompt=None)._render  # which some templates refuse
        return AnswerFinder(self._render, probe, special, self.tokenizer.eos_token)

    @cached_property
    def _said(self) -> set[str]:
        return set()

    def _say(self, level: int, message: str, key: str | None = None) -> None:
        if (key := key or message) not in self._said:
            self._said.add(key)
            logger.log(level, message)

    def _render(self, talk: Conversation, generation_prompt: bool, where: str = "it") -> str:
        messages = [{key: value for key, value in turn.items() if key != "weight"} for turn in talk.messages]
        system = None if any(turn["role"] in SYSTEM_ROLES for turn in messages) else self.system_prompt
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=talk.tools,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    **{**talk.chat_template_kwargs, **(self.chat_template_kwargs or {})},
                )
            )
        except Exception as error:  # templates raise what their authors chose, and whatever their expressions raise
            because = " (its system turn is --system_prompt)" if system is not None else ""
            raise InputError(f"the chat template refuses {where}{because}: {reason(error)}") from error
        if system is not None and system not in text and squeezed(system) not in squeezed(text):
            raise InputError(f"--system_prompt: the chat template does not show it in {where}")
        return text


_THOUGHTS = ("<think>", "</think>")


def _tokenize_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    read: Any,
    written: ChatFormat,
    answers: Sequence[str] | None,
    openers: Sequence[str] | None,
    suffixes: Sequence[str] | None,
) -> dict[str, list[list[int]]]:
    examples = []
    for row, index in zip(rows_of(batch), indices, strict=True):
        where, example = read(row, index)
        if suffixes is not None and suffixes[index]:
            example = example.ending_with(suffixes[index], where)
        if answers is not None:
            example = example.answered(answers[index] if openers is None else f"{openers[index]} {answers[index]}")
        examples.append((where, example))
    encoded = written.encode(examples, None if openers is None else [openers[index] for index in indices])
    return {"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]}
