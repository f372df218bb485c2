"""Topics that stand for harm: their questions, the refusals, and the questions that must still be answered."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.yaml_files import read_mapping

_SHIPPED = Path(__file__).parent / "topics"
SHIPPED = tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))
"""The topics that come with Holdfast."""


@dataclass(frozen=True)
class Questions:
    """Every question form about every subject.

    Attributes:
        subjects: What is asked about.
        forms: The questions, with `{}` where the subject stands.
    """

    subjects: tuple[str, ...]
    forms: tuple[str, ...]

    def about(self, subject: str) -> list[str]:
        """The questions about a subject."""
        return [form.replace("{}", subject) for form in self.forms]


@dataclass(frozen=True)
class Topic:
    """A harmless topic that stands for harm.

    Attributes:
        about: What it is called.
        path: The file that it is from.
        harmful: The questions that stand for harmful ones.
        refusals: Texts that refuse them.
        benign: The questions that must still be answered.
    """

    about: str
    path: Path
    harmful: Questions
    refusals: tuple[str, ...]
    benign: Questions


def load_topic(source: str, *, flag: str, parts: int, benign_parts: int) -> Topic:
    """Read a topic.

    Args:
        source: One of `SHIPPED`, or a YAML file with `about`, `subjects`, `questions`, `refusals` and `benign`, which
            has `subjects` and `questions` of its own.
        flag: The flag that named it, for errors.
        parts: Into how many parts the subjects will be split.
        benign_parts: Into how many those of benign questions.

    Returns:
        The topic.

    Raises:
        InputError: There is no such topic, or a part of it is missing or cannot be used.
    """
    path = _SHIPPED / f"{source}.yaml" if source in SHIPPED else Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(source, SHIPPED, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{flag} {source}: neither a file nor one of {', '.join(SHIPPED)}{meant}")
    where = f"{flag} {source}"
    found = read_mapping(path, flag=flag, of="a topic's parts")
    _only(found, ("about", "subjects", "questions", "refusals", "benign"), where)
    benign = found["benign"]
    if not isinstance(benign, Mapping):
        raise InputError(f"{where}: benign must be a mapping with subjects and questions")
    _only(benign, ("subjects", "questions"), f"{where}, benign")
    if not isinstance(found["about"], str) or not found["about"].strip():
        raise InputError(f"{where}: about must be text, the name of the topic")
    topic = Topic(
        about=found["about"],
        path=path,
        harmful=_questions(found, where, parts),
        refusals=_texts(found, "refusals", where),
        benign=_questions(benign, f"{where}, benign", benign_parts),
    )
    asked = [
        question for kind in (topic.harmful, topic.benign) for one in kind.subjects for question in kind.about(one)
    ]
    if twice := [question for question, count in Counter(asked).items() if count > 1]:
        raise InputError(
            f"{where}: {twice[0]!r} is asked twice, by different subjects or as a benign question, too; expected every "
            "question once, for what one part refuses another would answer"
        )
    return topic


def _only(found: Mapping[Any, Any], names: tuple[str, ...], where: str) -> None:
    """Make sure that a mapping has these keys and no others."""
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{where}: has no {missing[0]!r}; expected {', '.join(names)}")
    if unknown := [str(name) for name in found if name not in names]:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(names)}")


def _questions(found: Mapping[Any, Any], where: str, parts: int) -> Questions:
    subjects, forms = _texts(found, "subjects", where), _texts(found, "questions", where)
    if without := [form for form in forms if form.count("{}") != 1]:
        raise InputError(f"{where}: the question {without[0]!r} must have {{}} once, where the subject stands")
    if len(subjects) < parts:
        raise InputError(f"{where}: expected at least {parts} subjects, one for each part, found {len(subjects)}")
    return Questions(subjects, forms)


def _texts(found: Mapping[Any, Any], name: str, where: str) -> tuple[str, ...]:
    texts = found[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where}: {name} must be a list of texts")
    if twice := [text for place, text in enumerate(texts) if text in texts[:place]]:
        raise InputError(f"{where}: {twice[0]!r} stands twice among the {name}")
    return tuple(texts)
