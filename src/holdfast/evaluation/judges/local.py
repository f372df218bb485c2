"""Judges that are language models of their own, trained to judge: loaded beside the one that is measured."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.data.load import Prompt
from holdfast.errors import InputError
from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.generation import answerable, generate
from holdfast.evaluation.judges.asking import AskedJudge, Question
from holdfast.evaluation.judges.cache import Reply, key_of
from holdfast.evaluation.judges.server import TRIAL
from holdfast.evaluation.judges.template import fill
from holdfast.evaluation.judges.text import as_text, cut, defused
from holdfast.models import accelerator, from_flag, load_model_and_tokenizer

TOO_LONG = "too long for the judge"
"""Why an answer is unjudged that does not fit into the judge's positions."""


class LocalJudge(AskedJudge):
    """A judge that is a language model, asked in the form that it was trained on, greedily and in its own precision.

    The form is fixed, so there are no marks around the texts; what looks like a special token in them is none.
    """

    usual_model: str | None = None
    form = ""  # the text around prompt and answer, where it is not the tokenizer's

    def text(self, prompt: Prompt, answer: str) -> str:
        """What it is asked, up to where it begins to write: the exchange in its form.

        Raises:
            InputError: Its form has no place for this.
        """
        return fill(self.form, defused(as_text(prompt)), defused(answer))

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """Most tokens of what it writes."""

    @property
    def source(self) -> str:
        """Where the model is from."""
        return self.settings.model or self.usual_model or ""

    @property
    def record(self) -> dict[str, Any]:
        """The model, and what it took."""
        return {"model": self.source, "usage": self.usage}

    def key(self, prompt: Prompt, answer: str) -> str:
        """A question, by the judge, its model and what it is asked."""
        return key_of(
            judge=self.name, model=self.source, form=self.form, tokens=self.most_tokens, prompt=prompt, answer=answer
        )

    def check(self) -> None:
        """Load the model and ask it about a harmless exchange.

        Raises:
            InputError: The model cannot be loaded, its form cannot be written, or it gives no verdict.
        """
        [(_, reply)] = self.ask({"trial": TRIAL})
        said = reply if isinstance(reply, str) else reply.said
        if isinstance(reply, str) or self.read(said).grade is None:
            raise InputError(self.without_verdict(said))

    def without_verdict(self, said: str) -> str:
        """The error of a model that gives no verdict on a harmless exchange."""
        return (
            f"{self.settings.flag} {self.name}: {self.source} gives no verdict on a harmless exchange, but "
            f"{cut(said)!r}; expected a model that was trained to be this judge"
        )

    def ask(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Reply | str]]:
        """Ask `--judge_batch_size` questions at a time, short ones first."""
        texts: dict[str, str] = {}
        for key, question in questions.items():
            try:
                texts[key] = self.text(*question)
            except InputError as error:
                yield key, str(error)
        keys = sorted(texts, key=lambda key: len(texts[key]))
        model, tokenizer = self.loaded
        for first in range(0, len(keys), self.settings.batch_size):
            batch = keys[first : first + self.settings.batch_size]
            fits = answerable(model, tokenizer, [texts[key] for key in batch], drop_long_prompts=True, raw_text=True)
            chosen = [batch[place] for place in fits]
            yield from ((key, TOO_LONG) for key in batch if key not in chosen)
            if not chosen:
                continue
            answers = generate(
                model,
                tokenizer,
                [texts[key] for key in chosen],
                decoding=Decoding(max_new_tokens=self.most_tokens),
                batch_size=len(chosen),
                raw_text=True,
            )
            yield from ((key, Reply(answer.text)) for key, answer in zip(chosen, answers, strict=True))

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, on the accelerator if there is one, and its tokenizer."""
        with from_flag(f"{self.settings.flag} {self.name}"):
            model, tokenizer = load_model_and_tokenizer(self.source, dtype="auto")
        return model.to(accelerator()), tokenizer


def turns(prompt: Prompt, answer: str) -> list[dict[str, Any]]:
    """An exchange as turns of a user and an assistant; what a system said is no part of it."""
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    else:
        asked = [
            {"role": turn["role"], "content": as_text([turn])}
            for turn in prompt
            if turn["role"] in ("user", "assistant")
        ]
    return [*asked, {"role": "assistant", "content": answer}]
