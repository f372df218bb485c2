"""The tax: what a defense costs those who attack nothing, against the base and an undefended counterpart.

Capability and over-refusal before anything; and, if a harmless task is given, how fast it is learnt and what is left of
the capability meanwhile and after. The task is learnt by the steps of the real attack, on harmless rows alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.attacks.attack import Attacker, Cost, whole_model
from holdfast.attacks.finetuning import Along, FineTuning
from holdfast.data.rendering import ChatFormat
from holdfast.evaluation.evaluate import Evaluation, Evaluator
from holdfast.files import write_json

NAMES = ("base", "counterpart", "model")
"""Of whom the tax is measured, where they are given."""

Load = Callable[[], tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]]
"""What loads one of them, on the device where it is to be."""


@dataclass(frozen=True)
class HarmlessTask:
    """A harmless task to be learnt.

    Attributes:
        rows: What is trained on.
        learning_rate: Constant, of AdamW.
        batch_size: Rows per step.
        measure_at: The steps to measure after, from 0 on; the last is the length.
    """

    rows: Dataset
    learning_rate: float = 1e-4
    batch_size: int = 16
    measure_at: tuple[int, ...] = (0, 10, 20, 30, 50, 70, 100, 150, 200)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the rows, ready for JSON."""
        return {name: getattr(self, name) for name in ("learning_rate", "batch_size")} | {"at": list(self.measure_at)}


def measure_tax(
    name: str,
    load: Load,
    evaluator: Evaluator,
    task: HarmlessTask | None,
    *,
    folder: Path,
    identity: Mapping[str, Any],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure one model, unless that has been done.

    Args:
        name: One of `NAMES`.
        load: Loads the model; not called where the folder has what is asked for.
        evaluator: Has a set of capability prompts and, for a harmless task, one of task prompts; no harmful ones.
        task: The harmless task; None: without one.
        folder: Where the result is kept, as NAME.json, and read again if its identity fits.
        identity: What the result depends on beside the task's settings, ready for JSON: hashes of model and data, how
            answers are decoded.
        tell: Called with a sentence on how far it is.

    Returns:
        `capability`, `over_refusal` (RATE) and `harmless_task` (None without one) of docs/certificate.md.

    Raises:
        InputError: A prompt or a row cannot be used with this model.
        TrainingError: Training on the harmless task has diverged.
    """
    fitting = {**identity, "task": None if task is None else task.settings, "seed": evaluator.seed}
    file = folder / f"{name}.json"
    if (kept := _kept(file, fitting)) is not None:
        return kept
    model, tokenizer = load()
    if task is None:
        measured = [(0, evaluator(model, tokenizer))]
    else:
        measured = _learn(task, model, tokenizer, evaluator, lambda said: tell(f"{name}: {said}"))
    first = measured[0][1].results["capability"]
    found = {
        "capability": first["capability"],
        "over_refusal": first["over_refusal"],
        "harmless_task": None if task is None else _learning(measured),
    }
    write_json(file, {"identity": fitting, "tax": found})
    return found


def measure_taxes(
    loads: Mapping[str, Load],
    evaluator: Evaluator,
    task: HarmlessTask | None,
    *,
    folder: Path,
    identities: Mapping[str, Mapping[str, Any]],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all models, one after the other; what has been measured is read again.

    Args:
        loads: By those of `NAMES` that are given: what loads the model.
        evaluator: As for `measure_tax`.
        task: As for `measure_tax`.
        folder: Where the results are kept, a file for each.
        identities: As for `measure_tax`, by name.
        tell: As for `measure_tax`.

    Returns:
        The certificate's tax.

    Raises:
        InputError: A prompt or a row cannot be used with a model.
        TrainingError: Training on the harmless task has diverged.
    """
    parts = {
        name: measure_tax(name, load, evaluator, task, folder=folder, identity=identities[name], tell=tell)
        for name, load in loads.items()
    }
    by_figure = {
        figure: {name: parts[name][figure] if name in parts else None for name in NAMES}
        for figure in ("capability", "over_refusal", "harmless_task")
    }
    return {**by_figure, "harmless_task": None if task is None else by_figure["harmless_task"]}


def _learn(
    task: HarmlessTask,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluator: Evaluator,
    tell: Callable[[str], None],
) -> list[tuple[int, Evaluation]]:
    """The measurements along the way, by step."""
    measured: list[tuple[int, Evaluation]] = []

    def note(cost: Cost, evaluation: Evaluation) -> bool:
        measured.append((cost.steps, evaluation))
        figures = evaluation.flat()
        tell(
            f"harmless task: step {cost.steps}/{task.measure_at[-1]} · task accuracy {figures['task_accuracy']:.2f} "
            f"· capability {figures['capability']:.2f}"
        )
        return False

    written = ChatFormat(tokenizer, evaluator.system_prompt, evaluator.chat_template_kwargs, evaluator.raw_text)
    learner = Attacker(written, harmful_rows=task.rows, seed=evaluator.seed)
    training = FineTuning(learning_rate=task.learning_rate, steps=task.measure_at[-1], batch_size=task.batch_size)
    training.train(whole_model(model), learner, Along(evaluator, task.measure_at, note))
    return measured


def _learning(measured: list[tuple[int, Evaluation]]) -> dict[str, Any]:
    """What becomes of a model that learns the task."""
    points = [
        {
            "steps": steps,
            "task_accuracy": evaluation.results["task"]["task_accuracy"],
            "capability": evaluation.results["capability"]["capability"],
        }
        for steps, evaluation in measured
    ]
    best = max(point["task_accuracy"]["value"] for point in points)
    learnt = (point["steps"] for point in points if point["task_accuracy"]["value"] >= 0.9 * best > 0)
    return {
        "points": points,
        "capability_after": points[-1]["capability"],
        "steps_to_0.9_of_best": next(learnt, None),
    }


def _kept(file: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file has, if it is of this identity."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # what is damaged is measured again
        return None
    fits = isinstance(content, dict) and content.get("identity") == identity
    return content["tax"] if fits else None
