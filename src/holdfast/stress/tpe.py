"""What the tree-structured Parzen estimator (TPE) asks for: a function of a name and of what was found alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.trial import create_trial


class Searched(Protocol):
    """Settings with knobs that are searched."""

    @property
    def ranges(self) -> Mapping[str, BaseDistribution]:
        """The knobs."""

    def setting(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The setting at a place in the ranges."""

    def params(self, setting: dict[str, Any]) -> dict[str, Any] | None:
        """The place of a setting in the ranges, or None if it lies outside of them."""


def ask(
    searched: Searched, before: Iterable[tuple[dict[str, Any], float]], name: str, count: int, *, startup: int = 10
) -> list[dict[str, Any]]:
    """Ask for a batch of settings.

    Args:
        searched: What is searched.
        before: The settings that were tried, with the values that they came to, which are to be small.
        name: Names the batch: another one draws otherwise.
        count: How many settings.
        startup: So many settings must be known before TPE takes the place of chance.

    Returns:
        The settings.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    sampler = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    ranges = dict(searched.ranges)
    for setting, value in before:
        if (params := searched.params(setting)) is not None:
            study.add_trial(create_trial(params=params, distributions=ranges, value=value))
    return [searched.setting(study.ask(ranges).params) for _ in range(count)]
