"""What TPE searches of every kind: the knobs of a chain of attacks, within the ranges that the attacks declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from holdfast.attacks.attack import Choice, Layers, Range, Space
from holdfast.attacks.catalogue import ATTACKS
from holdfast.stress.suites import Scene, Suite, few_steps
from holdfast.stress.trials import Kind, Setting

#: Knobs that are lists of one number, or kernels of four; one number is searched.
_LISTS = ("attention_scale", "mlp_scale")
#: What makes rows harder to tell from harmless ones makes no attack cheaper: the grid has it.
_GRID_ONLY = ("poison_ratio", "without_template")


@dataclass(frozen=True)
class Family:
    """Settings of one chain.

    Attributes:
        fixed: The chain, with the knobs that are set.
        ranges: Those that are searched, by `attack.knob`.
    """

    fixed: Setting
    ranges: dict[str, BaseDistribution]

    def setting(self, params: Mapping[str, Any]) -> Setting:
        """The setting at a place in the ranges."""
        found: Setting = {name: dict(knobs) for name, knobs in self.fixed.items()}
        for place, value in params.items():
            attack, _, knob = place.partition(".")
            found[attack][knob] = [value] if knob in _LISTS else value
        return found

    def params(self, setting: Setting) -> dict[str, Any] | None:
        """The place of a setting in the ranges, or None if it lies outside of them."""
        if list(setting) != list(self.fixed):
            return None
        given, fixed = _flat(setting), _flat(self.fixed)
        found = {place: value for place, value in given.items() if place in self.ranges}
        inside = all(_fits(value, self.ranges[place]) for place, value in found.items())
        elsewhere = any(value != fixed[place] for place, value in given.items() if place not in self.ranges)
        return found if inside and not elsewhere else None


def _flat(setting: Setting) -> dict[str, Any]:
    """All knobs of a setting by `attack.knob`, those that are not given at their defaults."""
    found = {}
    for name, knobs in setting.items():
        for knob, value in vars(ATTACKS[name](**knobs)).items():
            found[f"{name}.{knob}"] = value[0] if knob in _LISTS and len(value) == 1 else value
    return found


def _fits(value: Any, distribution: BaseDistribution) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):  # none of its choices, or no number
        return False


def families(suite: Suite, scene: Scene) -> dict[Kind, Family]:
    """What TPE searches, by kind, without what is left out."""
    rows = Choice(tuple(scene.row_counts(1, 4, 16, 64)))
    tuned: dict[str, Space] = {"fine-tuning.rows": rows, "fine-tuning.warmup_steps": Choice((0, 5))}
    adapter: dict[str, Space] = {
        "fine-tuning.learning_rate": Range(1e-4, 1e-2, log=True),
        "fine-tuning.lora_rank": Choice((4, 16, 64)),
    }
    long, short = {"steps": suite.at[-1]}, {"steps": few_steps(suite)}
    found: dict[Kind, Family] = {
        "prompting": _family(scene, {"soft-prompt": {}}, {}),
        "training-free": _family(scene, {"ablation": {}}, {}),
        "base-holder": _family(scene, {"base": {}}, {"base.rank": Choice((0, 1, 4, 16))}),
        "lora": _family(scene, {"fine-tuning": long}, {**tuned, **adapter}),
        "full": _family(scene, {"fine-tuning": long}, tuned),
        "hybrid": _family(scene, {"ablation": {}, "fine-tuning": short}, tuned),
    }
    return {kind: family for kind, family in found.items() if not scene.left_out & family.fixed.keys()}


def _family(scene: Scene, fixed: Setting, more: Mapping[str, Space]) -> Family:
    declared = {
        f"{name}.{knob}": space
        for name, knobs in fixed.items()
        for knob, space in ATTACKS[name].space().items()
        if knob not in knobs and knob not in _GRID_ONLY
    }
    return Family(fixed, {place: _distribution(space, scene) for place, space in {**declared, **more}.items()})


def _distribution(space: Space, scene: Scene) -> BaseDistribution:
    if isinstance(space, Layers):
        return CategoricalDistribution(tuple(range(-1, -1 - scene.layers, -1)))
    if isinstance(space, Choice):
        return CategoricalDistribution(space.values)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return IntDistribution(space.low, space.high, log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)
