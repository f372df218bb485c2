"""Template files: what a judge is asked, with the places of the prompt and of the answer."""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from holdfast.errors import InputError
from holdfast.files import read_text

_PLACE = re.compile(r"\{(prompt|answer)\}")


def read_template(path: str, flag: str, needed: Collection[str] = ("prompt", "answer")) -> str:
    """Read a template file; a line break at its very end, which editors add, is no part of it.

    Args:
        path: The file, in UTF-8.
        flag: The flag that names it, for errors.
        needed: The placeholders that it must have.

    Raises:
        InputError: The file cannot be read or lacks a placeholder.
    """
    text = read_text(Path(path).expanduser(), named=f"{flag} {path}")
    missing = [f"{{{name}}}" for name in needed if name not in _PLACE.findall(text)]
    if missing:
        raise InputError(f"{flag} {path}: has no {' and no '.join(missing)}, where that is to stand; write it there")
    return text.removesuffix("\n")


def fill(template: str, prompt: str, answer: str) -> str:
    """Put a prompt and an answer in their places; what they hold themselves is no place."""
    given = {"prompt": prompt, "answer": answer}
    return _PLACE.sub(lambda place: given[place[1]], template)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
