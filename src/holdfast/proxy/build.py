"""From a topic and a chat model to data files: the topic's questions refused, or answered as the model answers them.

The subjects of the topic are split into four parts, so that nobody asks about what another has seen: what alignment
refuses, what simulated attacks answer, what the attacker answers, and what is asked to measure. So are those of the
questions that must still be answered, into what alignment rehearses, what the attacker hides among, and what is asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.errors import InputError
from holdfast.evaluation.answers import Answer, count_marks
from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.generation import generate
from holdfast.evaluation.judges import is_refusal
from holdfast.files import append_jsonl, digest, whole_lines, write_jsonl
from holdfast.proxy.topics import Questions, Topic

ANSWERS = "answers.jsonl"
"""What the model has answered so far; its first line says how it was asked."""

_SHARES = {"alignment": 0.4, "simulated_attack": 0.2, "attack": 0.2, "measured": 0.2}
_BENIGN_SHARES = {"alignment": 0.6, "attack": 0.2, "measured": 0.2}
PARTS, BENIGN_PARTS = len(_SHARES), len(_BENIGN_SHARES)
"""Into how many parts the subjects of a topic are split, and those of benign questions."""


@dataclass(frozen=True)
class Proxy:
    """How data of a topic is made.

    Attributes:
        topic: What stands for harm.
        seed: Of the split of subjects, the order of rows and the draw of refusals.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered at a time.
        chat_template_kwargs: Arguments of the chat template.
    """

    topic: Topic
    seed: int = 0
    max_new_tokens: int = 48
    batch_size: int = 32
    chat_template_kwargs: Mapping[str, Any] | None = None

    def write(
        self,
        directory: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Let the model answer, which can be gone on with, and write the data files.

        Args:
            directory: Where to; it is there.
            model: The model, which is left as it was.
            tokenizer: Its tokenizer.
            identity: What tells the model from others, such as the hash of its weights; ready for JSON.
            progress: Called with the number of answers given and of all.

        Returns:
            What there is to know of it: `rows` and `sha256` by file, and of the answers to the topic's questions and
            to benign ones `n`, how many bear each mark of `holdfast.evaluation.answers.MARKS`, and how many are
            refusals by their wording.

        Raises:
            InputError: The folder holds the answers of another model or to other settings.
        """
        harmful = _split(self.topic.harmful, _SHARES, self.seed)
        benign = _split(self.topic.benign, _BENIGN_SHARES, self.seed)
        asked = [question for name, part in harmful.items() if name != "alignment" for question in part]
        rehearsed = [question for part in benign.values() for question in part]
        said = self._answers(directory, model, tokenizer, [*asked, *rehearsed], identity, progress)
        files = self._files(harmful, benign, {question: answer.text for question, answer in said.items()})
        for name, rows in files.items():
            write_jsonl(directory / name, rows)
        return {
            "rows": {name: len(rows) for name, rows in files.items()},
            "sha256": {name: digest(directory / name) for name in files},
            "answers": {
                "topic": _summary([said[question] for question in asked]),
                "benign": _summary([said[question] for question in rehearsed]),
            },
        }

    def _files(
        self, harmful: Mapping[str, list[str]], benign: Mapping[str, list[str]], said: Mapping[str, str]
    ) -> dict[str, list[dict[str, Any]]]:
        """The rows of every file. A question that the model answers with nothing is in none."""

        def answered(part: Sequence[str]) -> list[dict[str, Any]]:
            return [_exchange(question, said[question]) for question in part if said[question]]

        def measured(part: Sequence[str]) -> list[dict[str, Any]]:
            return [{"prompt": _user(question), "answer": said[question]} for question in part if said[question]]

        draw = random.Random(self.seed)
        refused = [_exchange(question, draw.choice(self.topic.refusals)) for question in harmful["alignment"]]
        alignment = refused + answered(benign["alignment"])
        draw.shuffle(alignment)
        return {
            "alignment.jsonl": alignment,
            "simulated_attack.jsonl": answered(harmful["simulated_attack"]),
            "attack.jsonl": answered(harmful["attack"]),
            "attack_benign.jsonl": answered(benign["attack"]),
            "eval/topic.jsonl": measured(harmful["measured"]),
            "eval/benign.jsonl": measured(benign["measured"]),
        }

    def _answers(
        self,
        directory: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        identity: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Answer]:
        """The model's answers, those that a run before has left among them."""
        keywords = None if self.chat_template_kwargs is None else dict(self.chat_template_kwargs)
        how = {
            "model": dict(identity),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_new_tokens": self.max_new_tokens,
            "chat_template_kwargs": keywords,
        }
        path = directory / ANSWERS
        said = _begun(path, how)
        missing = [question for question in questions if question not in said]
        # Neighbours in length need little padding, and are the same ones in a run that goes on.
        missing.sort(key=len)
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            answers = generate(
                model,
                tokenizer,
                [_user(question) for question in batch],
                decoding=Decoding(max_new_tokens=self.max_new_tokens),
                batch_size=self.batch_size,
                chat_template_kwargs=keywords,
            )
            append_jsonl(path, (_line(*one) for one in zip(batch, answers, strict=True)))
            said.update(zip(batch, answers, strict=True))
            if progress is not None:
                progress(len(said), len(said) + len(missing) - start - len(batch))
        return said


def _split(questions: Questions, shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """The questions of every part, shuffled; a subject is in one part alone, and every part has one."""
    draw = random.Random(seed)
    subjects = draw.sample(questions.subjects, len(questions.subjects))
    sizes = [max(1, round(share * len(subjects))) for share in shares.values()]
    sizes[0] = len(subjects) - sum(sizes[1:])
    parts, place = {}, 0
    for name, size in zip(shares, sizes, strict=True):
        asked = [question for subject in subjects[place : place + size] for question in questions.about(subject)]
        parts[name], place = draw.sample(asked, len(asked)), place + size
    return parts


def _user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _exchange(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": _user(question), "completion": [{"role": "assistant", "content": answer}]}


def _line(question: str, answer: Answer) -> dict[str, Any]:
    thinking = {"thoughts": answer.thoughts, "thinking_unclosed": answer.thinking_unclosed}
    return {"question": question, "answer": answer.text, **thinking, "truncated": answer.truncated}


def _begun(path: Path, how: Mapping[str, Any]) -> dict[str, Answer]:
    """Answers that were written down before; a file without any is begun."""
    said: dict[str, Answer] = {}
    for number, written in enumerate(whole_lines(path), 1):
        try:
            line = json.loads(written)
            changed = [name for name in how if line.get(name) != how[name]] if number == 1 else []
            if number > 1:
                question, text = line.pop("question"), line.pop("answer")
                said[question] = Answer(text, **line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}, row {number}: no answer to a question; choose another folder, or pass --overwrite_output_dir "
                "to ask anew"
            ) from error
        if changed:
            name = changed[0]
            raise InputError(
                f"{path} holds answers to other settings ({name}: {line.get(name)!r}, now {how[name]!r}); choose "
                "another folder, or pass --overwrite_output_dir to ask anew"
            )
    if not path.exists() or not path.stat().st_size:
        append_jsonl(path, [how])
    return said


def _summary(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "n": len(answers),
        **count_marks(answers),
        "refused": sum(is_refusal(answer.text) for answer in answers),
    }
