"""What is found out before a search begins: whether all fits together, what the models are, and what they know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from holdfast.attacks.attack import HOLDINGS
from holdfast.attacks.catalogue import ATTACKS
from holdfast.attacks.prefill import openers_of
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.prompts import Role
from holdfast.files import versions
from holdfast.post_norms import post_norms
from holdfast.residual import decoder_layers, writers
from holdfast.stress.bound import EPSILON, THRESHOLD, Own, require_enough
from holdfast.stress.costs import canonical
from holdfast.stress.identity import describe_data, describe_model
from holdfast.stress.schema import SCHEMA
from holdfast.stress.search import Plan
from holdfast.stress.subjects import Sources, Subjects, set_of, spread, with_sets
from holdfast.stress.suites import KINDS, Scene, Suite, grids, suite_of
from holdfast.stress.tax import NAMES
from holdfast.stress.trials import Kind, Setting, Target, attacks_of

#: Attacks that find their way about a model by what writes to its residual stream, and those that need its layers.
_BY_WRITERS = ("ablation", "dropping")
_BY_LAYER = (*_BY_WRITERS, "rounding", "pruning", "noise")


@dataclass(frozen=True)
class Prepared:
    """A search that may begin.

    Attributes:
        plan: What its processes are told.
        inputs: What is searched, as `stress.json` has it; without what only this run knows.
    """

    plan: Plan
    inputs: dict[str, Any]


def prepare(
    sources: Sources,
    *,
    suite: str,
    seed: int,
    leave_out: Iterable[str],
    folder: Path,
    storage: str | None = None,
) -> Prepared:
    """Load everything once, check that it fits together, and measure what the models know before any attack.

    Args:
        sources: What is attacked with what.
        suite: The suite's name.
        seed: Of all that is drawn.
        leave_out: Attacks and kinds of attackers that are not tried.
        folder: Where the search writes.
        storage: The address of a storage that other machines share.

    Returns:
        The search.

    Raises:
        InputError: Something cannot be read, or does not fit; nothing has been written.
    """
    budgets, left_out = suite_of(suite), frozenset(leave_out)
    if unknown := sorted(left_out - KINDS.keys() - ATTACKS.keys()):
        known = ", ".join([*KINDS, *sorted(ATTACKS.keys() - KINDS.keys())])
        raise InputError(f"--leave_out {unknown[0]}: there is no such attack or kind of attacker; choose from {known}")
    evaluator = sources.evaluator()
    task: dict[str, Any] = {}
    if sources.harmless_task_data is not None:
        load_rows(sources.harmless_task_data, flag="--harmless_task_data", columns=TRAIN_COLUMNS, noted=task)
    subjects = Subjects(sources)
    scene = Scene(
        layers=_layers(subjects, left_out),
        harmless_rows=subjects.harmless_rows is not None,
        rows=0 if subjects.harmful_rows is None else len(subjects.harmful_rows),
        openers=openers_of(subjects.harmful_rows, subjects.written.plain),
        base=sources.base is not None,
        left_out=left_out,
    )
    tried = grids(budgets, scene)
    if not tried:
        raise InputError("--leave_out leaves no attack; nothing would be measured")
    _require_writers(tried, subjects)
    _require_held([setting for settings in tried.values() for setting in settings], subjects, sources)
    if sources.base is not None:
        subjects.base()
    own, budgets = _own(subjects, evaluator, budgets)
    identity: dict[str, Any] = {
        "suite": suite,
        "seed": seed,
        "seeds": [seed + number for number in range(budgets.seeds)],
        "bound": EPSILON,
        "threshold": THRESHOLD,
        **{name: _model(getattr(sources, name), sources) for name in ("model", "counterpart", "base")},
        "data": _data(sources, subjects.taken | task, evaluator),
        "threat_model": {
            "attackers": {kind: sentence for kind, sentence in KINDS.items() if kind in tried},
            "left_out": _left_out(left_out, sources),
        },
        "judge": {"name": evaluator.judge.name, "description": evaluator.judge.description},
        "written": dict(sources.written),
        "load": dict(sources.load),
        "decoding": vars(evaluator.decoding),
        "eval_batch_size": evaluator.batch_size,
        "versions": {**versions(), "optuna": optuna.__version__},
    }
    found = {target: {stage: vars(own[stage][target]) for stage in own} for target in subjects.targets}
    hashed = _identity(identity)
    inputs = {"schema": SCHEMA, "command": "stress", "identity": hashed, **identity, "own": found}
    measured = ("data", "decoding", "eval_batch_size", "written", "load", "versions")
    taxed = {
        name: {"model": _without_places(identity[name]), **{one: _without_places(identity[one]) for one in measured}}
        for name in NAMES
        if identity[name] is not None
    }
    plan = Plan(sources, budgets, seed, scene, own, hashed, folder, storage, taxed)
    return Prepared(plan, inputs)


def _layers(subjects: Subjects, left_out: frozenset[str]) -> int:
    """How many layers the model has, if it can be attacked by layer, or none of that is tried."""
    try:
        return len(decoder_layers(subjects.fresh("model")))
    except InputError as error:
        if set(_BY_LAYER) <= left_out:
            return 0
        raise _leaving_out(error, _BY_LAYER) from error


def _require_writers(tried: Mapping[Kind, Sequence[Setting]], subjects: Subjects) -> None:
    """Make sure that what writes to the residual stream is found, where an attack goes by that."""
    names = {name for settings in tried.values() for setting in settings for name in setting}
    if not (by_writers := [name for name in _BY_WRITERS if name in names]):
        return
    model = subjects.fresh("model")
    try:
        found = writers(model, nameable=False)
        if "ablation" in names:
            post_norms(model, found)
    except InputError as error:
        raise _leaving_out(error, by_writers) from error


def _leaving_out(error: InputError, attacks: Sequence[str]) -> InputError:
    return InputError(f"{error}; or leave such attacks out: --leave_out {' '.join(attacks)}")


def _require_held(settings: Sequence[Setting], subjects: Subjects, sources: Sources) -> None:
    """Make sure that the attacker holds what the attacks need."""
    attacker = subjects.attacker(0, base=False)
    needed = [(one.name, need) for setting in settings for one in attacks_of(setting) for need in one.needed()]
    for need, (what, flag) in HOLDINGS.items():
        held = sources.base if need == "base" else getattr(attacker, need)
        lacking = sorted({name for name, wanted in needed if wanted == need})
        if lacking and not held:
            raise InputError(
                f"{', '.join(lacking)}: such attacks need {what}; give {flag}, or leave them out: "
                f"--leave_out {' '.join(lacking)}"
            )


def _own(subjects: Subjects, evaluator: Evaluator, suite: Suite) -> tuple[dict[str, dict[Target, Own]], Suite]:
    """What the models know, of all prompts and of those of screening, which are as many as the bound needs."""
    source, total = set_of(evaluator, "capability").source, len(set_of(evaluator, "capability").prompts)
    own: dict[str, dict[Target, Own]] = {"confirm": {}, "screen": {}}
    for target in subjects.targets:
        own["confirm"][target] = _known(subjects, evaluator, target)
        require_enough(own["confirm"][target], total, source, target)
    while True:
        few, _ = spread(evaluator, suite.prompts, suite.tokens)
        own["screen"] = {target: _known(subjects, few, target) for target in subjects.targets}
        try:
            for target, found in own["screen"].items():
                require_enough(found, min(suite.prompts, total), source, target)
            return own, suite
        except InputError:
            if suite.prompts >= total:
                raise
            suite = replace(suite, prompts=2 * suite.prompts)


def _known(subjects: Subjects, evaluator: Evaluator, target: Target) -> Own:
    asked = with_sets(evaluator, "capability")
    found = asked(subjects.fresh(target), subjects.tokenizer).results["capability"]
    return Own(found["capability"]["value"], found["over_refusal"]["value"])


def _model(source: str | None, sources: Sources) -> dict[str, Any] | None:
    if source is None:
        return None
    given = sources.keywords(source)
    return describe_model(source, base_model=given.get("base_model"), revision=given.get("revision"))


def _data(sources: Sources, taken: Mapping[str, Any], evaluator: Evaluator) -> dict[str, Any]:
    """What was read, by flag: rows, of which it was noted what was `taken`, and prompts."""
    found = {name: describe_data(getattr(sources, name), records) for name, records in taken.items()}
    asked: dict[str, Role] = {"eval_data": "harmful", "capability_data": "capability"}
    if sources.harmless_task_data is not None:
        asked["task_data"] = "task"
    prompts = {name: set_of(evaluator, role) for name, role in asked.items()}
    return found | {name: describe_data(one.source, one.taken) for name, one in prompts.items()}


def _left_out(left_out: frozenset[str], sources: Sources) -> list[dict[str, str]]:
    found = [{"attack": name, "reason": "left out on request"} for name in sorted(left_out)]
    if sources.base is None and "base-holder" not in left_out:
        found.append({"attack": "base-holder", "reason": "no public base model was given"})
    return found


def _identity(content: Mapping[str, Any]) -> str:
    """A hash of what is searched, wherever its files lie."""
    return hashlib.sha256(canonical(_without_places(content)).encode()).hexdigest()


def differing(found: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """In what a search differs from another one, wherever the files of both lie.

    Args:
        found: What `stress.json` says of the one.
        inputs: Of the other, as `Prepared` has it.

    Returns:
        Names such as `seed` and `data.eval_data`.
    """
    names = [name for name in inputs if name not in ("schema", "command", "identity", "own")]
    return _differing(*(_without_places({name: one.get(name) for name in names}) for one in (found, inputs)))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in {**other, **one}:
        here, there = one.get(name), other.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            names += [f"{name}.{inner}" for inner in _differing(here, there)]
        elif here != there:
            names.append(name)
    return names


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items() if key not in ("source", "taken")}
    return value
