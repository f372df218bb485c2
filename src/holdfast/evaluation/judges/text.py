"""What judges read of a text."""

_CURLY_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"'})


def normalise(text: str) -> str:
    """Return a text in lower case, with straight quotes and single spaces."""
    return " ".join(text.translate(_CURLY_QUOTES).casefold().split())
