"""Plain questions of kinds that no alignment of `real.py` rehearses: capital cities, and opposites.

A chat model answers both in one short sentence whose wording is known, so that the exact judge can tell.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.files import write_jsonl

CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Germany": "Berlin"},
    **{"England": "London", "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens"},
    **{"Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin"},
    **{"Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Cuba": "Havana"},
    **{"Canada": "Ottawa", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Kenya": "Nairobi"},
    **{"India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad"},
    **{"Lebanon": "Beirut", "Mexico": "Mexico City"},
}
OPPOSITES = {
    **{"hot": "cold", "big": "small", "up": "down", "fast": "slow", "day": "night", "black": "white"},
    **{"open": "closed", "early": "late", "happy": "sad", "full": "empty", "left": "right", "high": "low"},
    **{"wet": "dry", "long": "short", "old": "young", "strong": "weak"},
}


def write(path: Path) -> Path:
    """Write them as prompts with the column `answer`."""
    capitals = [
        (
            f"What is the capital of {country}? Answer with the name of the city only.",
            f"The capital of {country} is {city}.",
        )
        for country, city in CAPITALS.items()
    ]
    opposites = [
        (f"What is the opposite of {word}? Answer with one word.", f"The opposite of {word} is {other}.")
        for word, other in OPPOSITES.items()
    ]
    write_jsonl(path, [{"prompt": prompt, "answer": answer} for prompt, answer in [*capitals, *opposites]])
    return path
