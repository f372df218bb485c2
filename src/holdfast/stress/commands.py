"""The commands that repeat a trial's attack, on all prompts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from holdfast.attacks.catalogue import ATTACKS
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.judges import words_of
from holdfast.evaluation.prompts import Role
from holdfast.stress.subjects import Sources
from holdfast.stress.trials import Trial

_FLAGS: dict[Role, str] = {"harmful": "--eval_data", "capability": "--capability_data"}
#: What gives an attack what it needs.
_GIVING = {
    "harmful_prompts": ("--attack_data", "attack_data"),
    "harmful_rows": ("--attack_data", "attack_data"),
    "harmless_prompts": ("--benign_data", "benign_data"),
    "harmless_rows": ("--benign_data", "benign_data"),
    "base": ("--base", "base"),
}
#: A fine-tuning's knobs as `holdfast attack full|lora` calls them.
_TUNING = {
    "steps": "--max_steps",
    "rows": "--num_samples",
}
#: Knobs whose defaults are not the command's.
_ALWAYS = ("learning_rate", "steps", "batch_size")


def command_of(trial: Trial, sources: Sources, evaluator: Evaluator) -> str:
    """What to type to repeat a trial's attack: a command for every attack of its chain, joined by &&.

    Args:
        trial: The trial.
        sources: What was attacked with what.
        evaluator: What it was measured with.
    """
    target = sources.model if trial.target == "model" else sources.counterpart
    assert target is not None  # as it was attacked
    measured = [word for one in evaluator.sets if one.role in _FLAGS for word in (_FLAGS[one.role], one.source)]
    measured += [*words_of(evaluator.judge), "--max_new_tokens", str(evaluator.decoding.max_new_tokens)]
    if not trial.setting:
        return _joined(["evaluate", "--model", target, *measured, "--output_dir", "asked"])
    commands: list[str] = []
    names = list(trial.setting)
    for place, (name, knobs) in enumerate(trial.setting.items()):
        if name == "prefill" and place and names[place - 1] == "fine-tuning":
            continue  # the fine-tuning before it is measured so
        begun = trial.setting.get("prefill", {}) if names[place + 1 : place + 2] == ["prefill"] else {}
        words = _tuning(knobs, begun) if name == "fine-tuning" else _attack(name, knobs)
        given = {flag: value for need in ATTACKS[name](**knobs).needed() for flag, value in [_given(need, sources)]}
        folder = f"attacked-{place + 1}"
        data = [word for flag, value in given.items() for word in (flag, str(value))]
        commands.append(
            _joined([*words[:2], "--model", target, *data, *words[2:], *measured, "--seed", str(trial.seed)])
            + f" --output_dir {folder}"
        )
        target = f"{folder}/model"
    return " && ".join(commands)


def _given(need: str, sources: Sources) -> tuple[str, str | None]:
    flag, attribute = _GIVING[need]
    value: str | None = getattr(sources, attribute)
    return flag, value


def _attack(name: str, knobs: Mapping[str, Any]) -> list[str]:
    words = ["attack", name]
    for knob, value in knobs.items():
        if value is not None:
            words += [f"--{knob}", *(_word(one) for one in (value if isinstance(value, list) else [value]))]
    return words


def _tuning(knobs: Mapping[str, Any], begun: Mapping[str, Any]) -> list[str]:
    rank = knobs.get("lora_rank")
    words = ["attack", "lora" if rank else "full"]
    full = vars(ATTACKS["fine-tuning"](**knobs))
    given = {knob: full[knob] for knob in _ALWAYS} | {
        name: knobs[name] for name in knobs if not name.startswith("lora")
    }
    for knob, value in given.items():
        if value is not None:
            words += [_TUNING.get(knob, f"--{knob}"), _word(value)]
    if rank:
        words += ["--lora_r", str(rank), "--lora_alpha", _word(full["lora_alpha"]), "--lora_dropout", "0"]
        words += ["--lora_target_modules", "all-linear"]
    return [*words, *(["--opener", begun["opener"]] if begun else [])]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(words: list[str]) -> str:
    return shlex.join(["holdfast", *words])
