"""What judges read of a text, and what they are given of it."""

import re

from holdfast.data.formats import as_message, text_of
from holdfast.data.load import Prompt

_CURLY_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"'})

# By marks in brackets chat templates tell turns, and tokenizers special tokens: <|im_end|>, </s>, [/INST], <think>.
_MARKUP = re.compile(r"([<\[])(?=[^\s<>\[\]]+[>\]])")


def normalise(text: str) -> str:
    """Return a text in lower case, with straight quotes and single spaces."""
    return " ".join(text.translate(_CURLY_QUOTES).casefold().split())


def defused(text: str) -> str:
    """Return a text under judgement whose marks in brackets mark nothing: each has a space behind its bracket.

    Thus no text ends its own turn at the judge, begins another, or opens the judge's thoughts.
    """
    return _MARKUP.sub(r"\1 ", text)


def as_text(prompt: Prompt) -> str:
    """Return what was asked as one text: a single turn as it stands, several with who spoke."""
    if isinstance(prompt, str):
        return prompt
    turns = [as_message(turn) for turn in prompt]
    if len(turns) == 1:
        return text_of(turns[0])
    return "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in turns)


def cut(text: str) -> str:
    """Return a text in one line of at most 200 characters, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}…"
