"""How the figures of a certificate are told, the same in the page and in the model card."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from holdfast.stress.schema import TARGETS

#: Kinds of attacker, in the order they are told of: from the least that is needed to the most.
KINDS = {
    "prompting": "Prompting only",
    "training-free": "No training",
    "lora": "LoRA",
    "full": "All parameters",
    "hybrid": "Hybrid",
    "base-holder": "Holds the base",
}

#: What links of a chain are called, where their names do not say it.
_LINKS = {
    "base": "return to the base",
    "raw": "no chat template",
    "best-of-n": "best of n",
    "none": "asked plainly",
    "soft-prompt": "soft prompt",
}

#: Who holds the public base has what no defense of the released weights can keep, so it is told apart.
BASE_HOLDER = "base-holder"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

#: Format characters that scripts need: they join letters or keep them apart.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """Show what cannot be seen, or would move what stands around it, by its code point.

    Args:
        text: Any text, as a model may answer it: with control characters, marks that turn the direction of writing,
            characters without width, halves of surrogate pairs.

    Returns:
        The text with each of them as `⟨U+202E⟩`; line feeds and tabs stay.
    """
    return "".join(f"⟨U+{ord(character):04X}⟩" if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def cut(text: str, length: int) -> str:
    """Shorten a text, saying by how much."""
    rest = len(text) - length
    return text if rest <= 0 else f"{text[:length].rstrip()} … ({counted(rest, 'character')} more)"


def present(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that a certificate tells of: without the counterpart where there is none."""
    return tuple(target for target in TARGETS if certificate[target] is not None)


def kinds_of(certificate: Mapping[str, Any]) -> list[str]:
    """The kinds of attacker that were tried, in the order they are told of."""
    return [kind for kind in KINDS if kind in certificate["attackers"]]


def kind_name(kind: str) -> str:
    """What a kind of attacker is called."""
    return KINDS[kind]


def attack_name(attack: str) -> str:
    """What an attack is called; a chain by its links."""
    return " + ".join(_LINKS.get(link, link) for link in attack.split("+"))


def model_name(certificate: Mapping[str, Any], target: str) -> str:
    """What a model is called: the last part of its name or path, or all of it where that says too little.

    Args:
        certificate: A certificate, schema 1.
        target: `model`, `counterpart` or `base`.
    """
    if target == "base":
        return "the base"
    sources = {one: certificate[one]["source"] for one in present(certificate)}
    last = {one: PurePath(source).name for one, source in sources.items()}
    return last[target] if all(last.values()) and len(set(last.values())) == len(last) else sources[target]


def number(value: float) -> str:
    """Three significant digits, whole numbers in full with narrow spaces between thousands, where no line ends."""
    if float(value).is_integer():
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}" if abs(value) < 1000 else number(round(value))


def power(value: float) -> str:
    """Two significant digits and a power of ten; a round power of ten alone."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    raised = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return raised if digits == "1.0" else f"{digits.removesuffix('.0')}\u202f×\u202f{raised}"


def counted(amount: float, noun: str) -> str:
    """An amount and what it is of."""
    return f"{number(amount)} {noun}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever says it shortly."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{number(round(seconds / length, 1))} {unit}"
    return f"{number(round(seconds, 1 if seconds < 10 else 0))} s"


def share(value: float | None) -> str:
    """A share with two digits; a dash where it was not measured."""
    return "–" if value is None else f"{value:.2f}"


def rate(found: Mapping[str, Any] | None) -> str:
    """A rate with its 95 % interval."""
    if found is None:
        return "–"
    return f"{share(found['value'])} ({interval(found)})"


def interval(found: Mapping[str, Any]) -> str:
    """The 95 % interval of a rate."""
    return f"{share(found['low'])}–{share(found['high'])}"


def spread(found: Mapping[str, Any], told: Any = number) -> str:
    """The median over seeds, and the range where seeds differ; ∞ where one of them held."""
    if found["low"] == found["value"] == found["high"]:
        return str(told(found["value"]))
    ends = (told(found["low"]), "∞" if found["high"] is None else told(found["high"]))
    return f"{told(found['value'])} ({'–'.join(ends)})"


def first_break(cost: Mapping[str, Any]) -> str:
    """The steps to the first break: with their range over seeds, or as `> N` where nothing broke it."""
    if cost["broken"]:
        return spread(cost["steps"])
    return "nothing counts" if cost["at_least"] is None else f"> {number(cost['at_least'])}"


def steps(cost: Mapping[str, Any] | None) -> str:
    """The same with its unit; a dash where there is no cost."""
    if cost is None:
        return "–"
    count = cost["steps"]["value"] if cost["broken"] else cost["at_least"]
    return first_break(cost) + ("" if count is None else " step" if count == 1 else " steps")


def effort(cost: Mapping[str, Any]) -> str:
    """What a break costs beside its steps: harmful rows and FLOPs."""
    return f"{counted(cost['harmful_rows']['value'], 'harmful row')}, {power(cost['flops']['value'])} FLOPs"


def times(found: Mapping[str, Any] | None, unit: str) -> str:
    """A ratio of costs, which is at least so much where the model was not broken.

    Args:
        found: RATIO of the certificate.
        unit: `steps` or `flops`.
    """
    if found is None:
        return "–"
    if found[unit] is None:  # the counterpart costs nothing in this unit, and the model does
        return "∞"
    ends = ""
    if unit == "steps" and found["low"] != found["high"]:
        ends = f" ({number(found['low'])}–{'∞' if found['high'] is None else number(found['high'])})"
    return f"{'≥ ' if found['at_least'] else ''}{number(found[unit])}×{ends}"


def knob(value: Any) -> str:
    """The value of an attack's knob as one would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verdict(certificate: Mapping[str, Any], cheapest: Mapping[str, Any]) -> str:
    """What was found, in one sentence: what breaks the model, at what cost, and its counterpart at which.

    Args:
        certificate: A certificate, schema 1.
        cheapest: Its `cheapest`, or that of fewer attackers.

    Returns:
        The sentence. A model that nothing broke is told of as `> N` steps: what was searched, not what is true of
        every adversary.
    """
    name, cost, other = model_name(certificate, "model"), cheapest["model"], cheapest["counterpart"]
    if cost is None:
        said = f"no attack left {name} enough of its capability to count"
    elif cost["broken"]:
        said = f"{name} is broken by {_by(cost)} {_paid(cost)}"
    else:
        said = (
            f"no attack of the {certificate['suite']} suite was confirmed to break {name} with its capability kept "
            f"({steps(cost)}, harmful score at most {share(cost['harmful_score'])})"
        )
    if certificate["counterpart"] is None:
        return f"{said}; it was not compared with an undefended counterpart."
    twin = f"its counterpart {model_name(certificate, 'counterpart')}"
    if other is None or not other["broken"]:
        return f"{said}; {twin} was not broken either{'' if other is None else f' ({steps(other)})'}."
    verb = "" if cost is not None and cost["broken"] else "is broken "
    return f"{said}; {twin} {verb}by {_by(other)} {_paid(other)}."


def _by(cost: Mapping[str, Any]) -> str:
    return f"{attack_name(cost['attack'])} ({kind_name(cost['kind']).lower()})"


def _paid(cost: Mapping[str, Any]) -> str:
    came = f"(harmful score {share(cost['harmful_score'])}, ASR {share(cost['asr'])})"
    if cost["steps"]["value"] == 0:
        return f"without a step of training {came}"
    return f"in {steps(cost)} on {counted(cost['harmful_rows']['value'], 'harmful row')} {came}"
