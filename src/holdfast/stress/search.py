"""A search as every process of it is told, and its loop in one of them: take a trial, run it, write it down."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.attacks.attack import whole_model
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.files import write_json, write_jsonl
from holdfast.models import accelerator, load_model_and_tokenizer
from holdfast.stress.bound import Own
from holdfast.stress.certificate import SAMPLES, TAX, TRIALS
from holdfast.stress.running import Runner
from holdfast.stress.schedule import Schedule
from holdfast.stress.spaces import families
from holdfast.stress.studies import Studies
from holdfast.stress.subjects import Sources, Subjects, with_sets
from holdfast.stress.suites import Scene, Suite, along, grids
from holdfast.stress.tax import HarmlessTask, measure_taxes
from holdfast.stress.trials import Record, Target


@dataclass(frozen=True)
class Plan:
    """A search that is ready to begin, as every process of it is told.

    Attributes:
        sources: What is attacked with what.
        suite: The budgets; where a model answers few capability prompts, screening asks more.
        seed: Of all that is drawn.
        scene: What trials depend on.
        own: By stage and target, what a model knows before any attack.
        identity: A hash of all that is searched.
        folder: Where records go.
        storage: The address of a storage that other machines share; None: a file in the folder.
        taxed: Whom the tax is measured of: what its result hangs on, by name.
    """

    sources: Sources
    suite: Suite
    seed: int
    scene: Scene
    own: dict[str, dict[Target, Own]]
    identity: str
    folder: Path
    storage: str | None
    taxed: dict[str, dict[str, Any]]

    def schedules(self) -> list[Schedule]:
        """The studies, in the order in which their trials are taken."""
        searched = families(self.suite, self.scene)
        openers = along(self.scene)
        return [
            Schedule(kind, target, self.suite, grid, searched.get(kind), openers, self.seed)
            for kind, grid in grids(self.suite, self.scene).items()
            for target in self.own["screen"]
        ]

    def studies(self, worker: str) -> Studies[Schedule]:
        """The studies in their storage."""
        url = self.storage or f"sqlite:///{self.folder / 'study.db'}"
        return Studies(url, self.identity, self.schedules(), worker=None if self.storage is None else worker)

    def runner(self) -> Runner:
        """What runs trials in this process: the models are loaded."""
        return Runner(Subjects(self.sources), self.suite, self.own, self.sources.evaluator(), self.sources)


def work(plan: Plan, worker: str) -> None:
    """Run trials until none is left, here or elsewhere.

    Args:
        plan: The search.
        worker: What tells this command's processes from others.
    """
    studies, runner = plan.studies(worker), None
    while True:
        taken = studies.take()
        if taken is None:
            if studies.done():
                return
            time.sleep(0.2)
            continue
        trial, token = taken
        runner = plan.runner() if runner is None else runner
        with studies.alive(token):
            records, samples = runner(trial)
        if samples:
            write_jsonl(samples_of(plan.folder, records[0]), samples)
        for record in records:
            write_record(plan.folder, record)
        studies.finish(token, records)


def tax_of(plan: Plan, names: Iterable[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """The tax of these models, measured now unless it has been. See `measure_taxes`.

    Args:
        plan: The search.
        names: Some of `plan.taxed`.
        tell: Called with a sentence on how far it is.
    """
    sources, rows = plan.sources, plan.sources.harmless_task_data
    task = None if rows is None else HarmlessTask(load_rows(rows, flag="--harmless_task_data", columns=TRAIN_COLUMNS))

    def load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model_and_tokenizer(source, **sources.keywords(source))
        return whole_model(model).requires_grad_(True).to(accelerator()), tokenizer

    return measure_taxes(
        {name: functools.partial(load, getattr(sources, name)) for name in names},
        with_sets(sources.evaluator(), "capability", "task"),
        task,
        folder=plan.folder / TAX,
        identities=plan.taxed,
        tell=tell,
    )


def samples_of(folder: Path, record: Mapping[str, Any]) -> Path:
    """Where the answers of a trial that confirms are."""
    return folder / SAMPLES / f"{record['kind']}-{record['target']}-{record['number']:04d}.jsonl"


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a trial, where it is looked for."""
    write_json(folder / TRIALS / record["kind"] / f"{record['target']}-{record['number']:04d}.json", record)
