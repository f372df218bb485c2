"""Policies: YAML files of rules with their thresholds, read with care, as a release hangs on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.stress.rules import ALL, RULES
from holdfast.stress.schema import KINDS
from holdfast.stress.suites import SUITES
from holdfast.yaml_files import read_mapping

Policy = Mapping[str, Mapping[str, Any]]
"""From the names of rules to their thresholds by kind of attacker; `ALL` where there is one threshold."""


def read_policy(path: Path | str) -> Policy:
    """Read a policy.

    Args:
        path: A YAML file: a mapping from the names of `RULES` to a threshold, or to a mapping of thresholds by kind of
            attacker.

    Returns:
        The policy, in the file's order.

    Raises:
        InputError: The file cannot be read, asks for nothing, or holds an unknown rule, an unknown kind or a threshold
            that is none.
    """
    policy: dict[str, dict[str, Any]] = {}
    for name, value in read_mapping(path, flag="--policy", of="rules to thresholds").items():
        if name not in RULES:
            raise InputError(f"--policy {path}: unknown rule {name!r}; {_nearest(str(name), RULES)}")
        policy[name] = _thresholds(f"--policy {path}: {name}", name, value)
    if not policy:
        raise InputError(f"--policy {path}: asks for nothing; expected rules such as min_steps")
    return policy


def _thresholds(where: str, name: str, value: Any) -> dict[str, Any]:
    """The thresholds of a rule by kind of attacker."""
    if not isinstance(value, Mapping):
        return {ALL: _threshold(where, name, value)}
    if not RULES[name].by_kind:
        raise InputError(f"{where} has one threshold, {_expected(name)}; found a mapping")
    if not value:
        raise InputError(f"{where} asks for nothing; expected a threshold for some kind of attacker")
    kinds = (*KINDS, ALL)
    for kind in value:
        if kind not in kinds:
            raise InputError(f"{where}: unknown kind of attacker {kind!r}; {_nearest(str(kind), kinds)}")
    return {kind: _threshold(f"{where}: {kind}", name, one) for kind, one in value.items()}


def _threshold(where: str, name: str, value: Any) -> Any:
    form = RULES[name].form
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    fits = {
        "number": is_number,
        "count": is_number and value == int(value),
        "share": is_number and value <= 1,
        "suite": value in list(SUITES),
        "true": value is True,
    }
    if not fits[form]:
        raise InputError(f"{where} must be {_expected(name)}, got {value!r}")
    return value


def _expected(name: str) -> str:
    return {
        "number": "a number from 0 up",
        "count": "a whole number from 0 up",
        "share": "a share from 0 to 1",
        "suite": f"one of {', '.join(SUITES)}",
        "true": "true (leave it out where it is not asked for)",
    }[RULES[name].form]


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is meant, it seems; all of them where none is near."""
    names = list(known)
    near = get_close_matches(word, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
