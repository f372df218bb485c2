"""Pools: which simulated attacks a defender is trained against, how often, and with which knobs.

A pool is a mapping from members to weights, or to mappings with a weight and knobs::

    {"fine-tuning": {"weight": 0.5, "rounds": 3, "learning_rate": {"low": 5e-5, "high": 5e-4, "log": true}},
     "ablation": 0.3,
     "ablation+fine-tuning": {"weight": 0.2, "ablation": {"layer": -1}, "fine-tuning": {"steps": [1, 5, 20]}},
     "fine-tuning+prefill": 0.2}

A member is an attack of the suite, or several joined by `+` that come one after the other, each found on what those
before it have made. A draw of it is a displacement of the weights, or none, and with `prefill` as the last of its
attacks answers that are begun as an attacker begins them. A knob is a value, a list of values of which one is drawn, or
a range {low, high, log}; the knobs are those of the attack itself (`holdfast attack METHOD --help`), and are checked by
it. One is a pool's own: `relative_rate` of what trains, its rate as a multiple of the configuration's, so that a pool
fits models that are trained at different rates.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attack, Choice, Layers, Range, Space, WeightChange
from holdfast.attacks.back_to_base import BackToBase
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.finetuning import FineTuning
from holdfast.attacks.low_rank import Adapter
from holdfast.attacks.prefill import Prefill
from holdfast.attacks.rounding import Rounding
from holdfast.errors import InputError

TUNED, ADAPTED, BEGUN = "fine-tuning", "lora", "prefill"
"""Members that train the weights, or an adapter that is merged; and that of begun answers."""

_CHANGES: tuple[type[WeightChange], ...] = (Ablation, Dropping, BackToBase, Rounding)
_ATTACKS: dict[str, type[Attack]] = {
    TUNED: FineTuning,
    ADAPTED: FineTuning,
    **{attack.name: attack for attack in _CHANGES},
    BEGUN: Prefill,
}
RELATIVE = "relative_rate"
_TUNING = ("learning_rate", "steps", "rows", "batch_size", "optimizer")
_KNOBS = {TUNED: _TUNING, ADAPTED: (*_TUNING, "lora_rank", "lora_alpha")}
#: What is drawn from the range that the attack itself declares, unless it is given; other knobs are at their defaults.
_DRAWN = {
    "ablation": ("layer", "own_directions", "attention_scale", "mlp_scale", "rank"),
    "dropping": ("layer", "part", "amount"),
    "base": ("kept",),
    "rounding": ("bits",),
}
_PROMPTS, _RANK = 16, 16


@dataclass(frozen=True)
class Link:
    """One attack of a member.

    Attributes:
        name: What the pool calls it.
        knobs: What each of its knobs is drawn from; those left out are at their defaults.
        prompts: How many prompts of a kind it looks at, if at any.
    """

    name: str
    knobs: Mapping[str, Space]
    prompts: int = _PROMPTS

    @property
    def trains(self) -> bool:
        """Whether it trains the weights."""
        return self.name in (TUNED, ADAPTED)

    @property
    def changes(self) -> bool:
        """Whether it is a rule for the weights."""
        return issubclass(_ATTACKS[self.name], WeightChange)

    def drawn(self, draws: np.random.Generator, layers: int = 0) -> dict[str, Any]:
        """Values of its knobs, for a model of so many decoder layers, where they hang on that."""
        return {
            knob: _kernel(space, draws, layers)
            if isinstance(space, Range) and _hints(self.name)[knob] == list[float]
            else _one_of(space, draws, layers)
            for knob, space in self.knobs.items()
        }

    def adapter(self, knobs: Mapping[str, Any], draws: np.random.Generator) -> Adapter | None:
        """The adapter that it trains, with knobs that were drawn; None if it trains all parameters."""
        if self.name != ADAPTED:
            return None
        rank, alpha = knobs.get("lora_rank", _RANK), knobs.get("lora_alpha", FineTuning.lora_alpha)
        return Adapter(rank, alpha, seed=int(draws.integers(2**31)))

    def change(self, draws: np.random.Generator, layers: int) -> WeightChange:
        """The attack with knobs that are drawn; it is one that changes weights by a rule."""
        found = _ATTACKS[self.name](**self.drawn(draws, layers))
        assert isinstance(found, WeightChange)
        return found


@dataclass(frozen=True)
class Member:
    """A member of a pool.

    Attributes:
        name: Its name.
        weight: How often it is drawn, beside the others' weights.
        links: Its attacks on the weights, in order.
        rounds: Of how many rounds its vectors are kept, if it has any.
        begun: Its prompting, which begins answers, if it has one.
    """

    name: str
    weight: float = 1.0
    links: tuple[Link, ...] = (Link(TUNED, {}),)
    rounds: int = 1
    begun: Link | None = None

    @property
    def trains(self) -> bool:
        """Whether finding it takes training, so that it is a vector that is kept."""
        return any(link.trains for link in self.links)


@dataclass(frozen=True)
class Pool:
    """What a defender is trained against; by default Patcher's own attack, and nothing else."""

    members: tuple[Member, ...] = field(default_factory=lambda: (Member(TUNED),))

    @classmethod
    def of(cls, given: Mapping[str, Any] | str | None) -> Pool:
        """Read a pool, as the module says; None: the default.

        Raises:
            InputError: A member or a knob that there is not, a value that its attack refuses, or weights that cannot be
                drawn by; one sentence.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise InputError(f"--pool must be a mapping from members to weights, got {given!r}")
        found = cls(tuple(_member(name, one) for name, one in given.items()))
        whole = sum(member.weight for member in found.members)
        if not whole > 0:
            raise InputError("--pool: its weights do not sum to more than 0, so nothing could be drawn from it")
        if whole == math.inf:
            raise InputError("--pool: its weights do not come to a finite sum, so nothing could be drawn from it")
        return found

    def attacks(self) -> set[str]:
        """The names of all attacks in it that are ever drawn."""
        return {name for member in self.members if member.weight > 0 for name in member.name.split("+")}

    @property
    def links(self) -> list[Link]:
        """The attacks on the weights of all members that are ever drawn."""
        return [link for member in self.members if member.weight > 0 for link in member.links]

    @property
    def trained(self) -> list[str]:
        """The names of the members that are ever drawn and take training: of the attacks to simulate."""
        return [member.name for member in self.members if member.trains and member.weight > 0]

    def require_rows(self, count: int | None, ranks: int) -> None:
        """See that simulated attacks have the rows that they draw, and that ranks can share them.

        Args:
            count: How many harmful rows there are; None: no data set.
            ranks: How many ranks share the rows of a step.

        Raises:
            InputError: There are fewer, or they cannot be shared.
        """
        for link in (link for member in self.members for link in member.links if link.trains):
            for knob in {"rows", "batch_size"} & link.knobs.keys():
                space = link.knobs[knob]
                values = _ends(space)
                if count is None:
                    raise InputError(f"--pool {link.name}: {knob} needs harmful rows to draw from; give --attack_data")
                if knob == "rows" and (most := max(value or 0 for value in values)) > count:
                    raise InputError(f"--pool {link.name}: rows {most}: --attack_data has {count} rows")
                if knob == "batch_size" and ranks > 1 and (isinstance(space, Range) or any(v % ranks for v in values)):
                    raise InputError(
                        f"--pool {link.name}: batch_size must be a list of numbers that {ranks} ranks can share alike"
                    )

    def draw(self, draws: np.random.Generator, among: Collection[str] | None = None) -> Member | None:
        """One member by weight, of those with these names; None if there is none of them."""
        open_ = [one for one in self.members if one.weight > 0 and (among is None or one.name in among)]
        if not open_:
            return None
        weights = np.array([member.weight for member in open_])
        return open_[int(draws.choice(len(open_), p=weights / weights.sum()))]


def _member(name: str, given: Any) -> Member:
    parts = str(name).split("+")  # a recipe's may be a number
    for part in parts:
        if part not in _ATTACKS:
            raise InputError(
                f"--pool has no member {part!r}; expected {', '.join(_ATTACKS)}, or several of them joined by +"
            )
    if len(set(parts)) < len(parts) or {TUNED, ADAPTED} <= set(parts):
        raise InputError(f"--pool {name}: expected different attacks, at most one of {TUNED} and {ADAPTED}")
    if BEGUN in parts[:-1]:
        raise InputError(f"--pool {name}: {BEGUN} changes how a model is asked, so nothing can come after it")
    settings = dict(given) if isinstance(given, Mapping) else {"weight": given}
    where = f"--pool {name}"
    weight = settings.pop("weight", None)
    if not _is_number(weight) or not 0 <= weight < math.inf:
        raise InputError(f"{where}: its weight must be a number not below 0, got {weight!r}")
    trains = not {TUNED, ADAPTED}.isdisjoint(parts)
    rounds = _count(settings.pop("rounds", 1), f"{where}: rounds") if trains else 1
    links: tuple[Link, ...]
    if len(parts) == 1:
        links = (_link(name, settings, where),)
    else:
        if odd := [key for key, value in settings.items() if key not in parts or not isinstance(value, Mapping)]:
            raise InputError(
                f"{where}: {odd[0]} is no mapping of knobs; expected weight,{' rounds,' if trains else ''} and a "
                f"mapping for {' and '.join(parts)}"
            )
        links = tuple(_link(part, dict(settings.get(part, {})), f"{where}: {part}") for part in parts)
    begun = links[-1] if parts[-1] == BEGUN else None
    return Member(name, float(weight), links if begun is None else links[:-1], rounds, begun)


def _link(name: str, given: dict[str, Any], where: str) -> Link:
    attack, hints = _ATTACKS[name], _hints(name)
    looks = name == Ablation.name
    prompts = _count(given.pop("prompts", _PROMPTS), f"{where}: prompts") if looks else _PROMPTS
    if unknown := sorted(given.keys() - hints.keys()):
        own = [*(["prompts"] if looks else []), *(["rounds"] if name in _KNOBS else []), *hints]
        raise InputError(f"{where} has no {unknown[0]}; expected weight, {', '.join(own)}")
    knobs = {knob: _space(value, hints[knob], f"{where}: {knob}") for knob, value in given.items()}
    for knob, space in knobs.items():
        for value in _ends(space):
            _check(name, knob, [value] if hints[knob] == list[float] and _is_number(value) else value, where)
    if {RELATIVE, "learning_rate"} <= knobs.keys():
        raise InputError(f"{where}: expected one of learning_rate and {RELATIVE}, got both")
    declared = attack.space()
    return Link(name, {**{knob: declared[knob] for knob in _DRAWN.get(name, ())}, **knobs}, prompts)


def _check(name: str, knob: str, value: Any, where: str) -> None:
    """Have the attack itself refuse a value."""
    attack = _ATTACKS[name]
    allowed = attack.space().get(knob)
    if isinstance(value, str) and isinstance(allowed, Choice) and name != BEGUN and value not in allowed.values:
        raise InputError(f"{where}: {knob} must be one of {', '.join(map(str, allowed.values))}, got {value}")
    if knob == RELATIVE:
        if not 0 < value < math.inf:
            raise InputError(f"{where}: {RELATIVE} must be greater than 0, got {value}")
        return
    if knob == "lora_rank":
        _count(value, f"{where}: {knob}")  # to the attack itself 0 is none
    try:
        attack(**{knob: value})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


@functools.cache
def _hints(name: str) -> dict[str, Any]:
    """The knobs of a member's attack that a pool may set, with their types."""
    hints = typing.get_type_hints(_ATTACKS[name])
    declared: Any = _ATTACKS[name]
    names = _KNOBS.get(name, tuple(entry.name for entry in fields(declared)))
    return {knob: hints[knob] for knob in names} | ({RELATIVE: float} if name in _KNOBS else {})


def _space(value: Any, hint: Any, where: str) -> Range | Choice:
    if isinstance(value, Mapping):
        ends: list[Any] = [value.get("low"), value.get("high")]
        log = value.get("log", False)
        is_range = (
            not value.keys() - {"low", "high", "log"}
            and all(_is_number(end) and _fits(end, hint) for end in ends)
            and ends[0] <= ends[1]
            and isinstance(log, bool)
            and (not log or ends[0] > 0)
        )
        if not is_range:
            raise InputError(
                f"{where}: a range has low and high, numbers of the knob's kind in this order, and log, true or false, "
                f"with low above 0 where it is true; got {dict(value)}"
            )
        return Range(ends[0], ends[1], log)
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not _fits(one, hint):
            raise InputError(f"{where}: expected {_kind(hint)}, got {one!r}")
    if not values:
        raise InputError(f"{where}: expected a value, a list of values or a range, got an empty list")
    return Choice(tuple([one] if hint == list[float] and _is_number(one) else one for one in values))


def _ends(space: Space) -> tuple[Any, ...]:
    """The values of a knob that is given, or the least and the greatest."""
    assert not isinstance(space, Layers)
    return space.values if isinstance(space, Choice) else (space.low, space.high)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint == list[float]:
        return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _kind(hint: Any) -> str:
    kinds = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list[float]: "a number"}
    return kinds.get(hint, "a whole number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where} must be a whole number above 0, got {value!r}")
    return value


def _one_of(space: Space, draws: np.random.Generator, layers: int) -> Any:
    if isinstance(space, Layers):
        return -1 - int(draws.integers(layers))
    if isinstance(space, Choice):
        return space.values[int(draws.integers(len(space.values)))]
    low, high, log = space
    if isinstance(low, int) and isinstance(high, int) and not log:
        return int(draws.integers(low, high + 1))
    value = math.exp(draws.uniform(math.log(low), math.log(high))) if log else float(draws.uniform(low, high))
    return min(max(round(value), low), high) if isinstance(low, int) and isinstance(high, int) else value


def _kernel(space: Range, draws: np.random.Generator, layers: int) -> list[float]:
    """A scale by layer: a maximum within the range, anywhere, that falls to a minimum below it over some layers."""
    maximum = float(draws.uniform(space.low, space.high))
    place, width = float(draws.uniform(0, layers - 1)), float(draws.uniform(1, layers))
    return [maximum, place, width, float(draws.uniform(0, maximum))]
