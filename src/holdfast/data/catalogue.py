"""The catalogue: the data sets of the field by name, with where they lie and which of their rows are meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

ABOUT = ("use", "licence", "gated", "from_memory")
"""The fields of an entry that say something of it; the others are those of a source (`holdfast.data.sources`)."""


@cache
def catalogue() -> Mapping[str, Mapping[str, Any]]:
    """Every entry by its name, as `catalogue.yaml` has them."""
    text = resources.files("holdfast.data").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def source_of(name: str) -> dict[str, Any]:
    """What an entry says of its source, in the words of a recipe."""
    return {key: value for key, value in catalogue()[name].items() if key not in ABOUT}


def nearest(name: str) -> list[str]:
    """The names of the catalogue that someone who typed `name` may have meant, the likeliest first."""
    known = {entry.replace("-", ""): entry for entry in catalogue()}
    plain = name.lower().replace("-", "").replace("_", "")
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    return [known[entry] for entry in dict.fromkeys([*close, *(entry for entry in known if plain and plain in entry)])]
