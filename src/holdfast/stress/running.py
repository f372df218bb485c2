"""Running one trial: the attack, measured along the way, and ended early where nothing more is to be learned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from holdfast.attacks.attack import FREE, Attack, Attacker, Cost, Prompting
from holdfast.attacks.finetuning import Along, FineTuning
from holdfast.attacks.soft_prompt import SoftPrompt
from holdfast.errors import InputError, TrainingError
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.evaluation.evaluate import COUNTS, Evaluation, Evaluator
from holdfast.evaluation.prompts import Role
from holdfast.stress.bound import EPSILON, THRESHOLD, Own
from holdfast.stress.commands import command_of
from holdfast.stress.schema import SCHEMA
from holdfast.stress.subjects import Sources, Subjects, set_of, spread, with_sets
from holdfast.stress.suites import Suite
from holdfast.stress.trials import Record, Target, Trial, attacks_of, is_over, name_of


@dataclass(frozen=True)
class Measuring:
    """How trials of one stage are measured.

    Attributes:
        evaluator: With the stage's prompts.
        rows: By role, the rows (from 1) that they have in the data; None: all, in order.
        own: What every target knows of them before any attack.
    """

    evaluator: Evaluator
    rows: dict[Role, list[int]] | None
    own: dict[Target, Own]


class Runner:
    """Runs trials in one process.

    Args:
        subjects: The models and what the attacker holds.
        suite: The budgets.
        own: By stage (`screen`, `confirm`) and target, what the model knows before any attack.
        evaluator: Of all prompts.
        sources: For the commands that repeat a trial.
    """

    def __init__(
        self,
        subjects: Subjects,
        suite: Suite,
        own: dict[str, dict[Target, Own]],
        evaluator: Evaluator,
        sources: Sources,
    ) -> None:
        self.subjects, self.suite, self.sources = subjects, suite, sources
        evaluator = with_sets(evaluator, "harmful", "capability")
        few, rows = spread(evaluator, suite.prompts, suite.tokens)
        self._screen = Measuring(few, rows, own["screen"])
        self._confirm = Measuring(evaluator, None, own["confirm"])

    def __call__(self, trial: Trial) -> tuple[list[Record], list[dict[str, Any]]]:
        """Run a trial, on a model that is as it was released.

        Returns:
            The trial's record, and one of a hybrid for each of its openers; and every answer, of a trial that
            confirms.
        """
        run = _Run(self, trial, self._confirm if trial.stage == "confirm" else self._screen)
        reason = None
        set_seed(trial.seed)  # an adapter's weights are drawn before training sets its own
        model = self.subjects.fresh(trial.target)
        try:
            attacks = attacks_of(trial.setting)
            holds_base = any("base" in one.needed() for one in attacks)
            run.attack(model, attacks, self.subjects.attacker(trial.seed, base=holds_base))
        except (InputError, TrainingError) as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        finally:
            model.zero_grad(set_to_none=True)
        return run.records(reason), run.samples


class _Run:
    """One trial under way."""

    def __init__(self, runner: Runner, trial: Trial, measuring: Measuring) -> None:
        self.trial, self.measuring, self.runner = trial, measuring, runner
        self.own = measuring.own[trial.target]
        self.points: dict[str | None, list[dict[str, Any]]] = {None: [], **{name: [] for name in trial.openers}}
        self.samples: list[dict[str, Any]] = []
        self._opened: dict[str, Evaluation] = {}
        self._began = time.monotonic()
        self._measuring_took = 0.0

    def attack(self, model: PreTrainedModel, chain: Sequence[Attack], attacker: Attacker) -> None:
        """Attack and measure."""
        attacks = list(chain)
        for attack in attacks:
            attack.require(attacker)
        prompting = attacks.pop() if attacks and isinstance(attacks[-1], Prompting) else None
        tuning = attacks.pop() if attacks and isinstance(attacks[-1], FineTuning) else None
        if isinstance(prompting, SoftPrompt) and tuning is not None:
            raise InputError("a soft prompt is trained on a finished model; it cannot follow a fine-tuning here")
        spent = FREE
        for attack in attacks:
            spent += attack(model, attacker).cost
        asking = PLAINLY
        if isinstance(prompting, Prompting):
            asking, cost = prompting.ask(model, attacker)
            spent += cost
        if isinstance(tuning, FineTuning):
            self._along(tuning, model, attacker, spent, tuning.asking.then(asking))
        else:
            moved = bool(attacks)
            found = self._measure(model, attacker.written.tokenizer, asking, moved=moved)
            self._note(spent, found, None, moved=moved)

    def _along(
        self, tuning: FineTuning, model: PreTrainedModel, attacker: Attacker, spent: Cost, asking: Asking
    ) -> None:
        def evaluator(tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
            for opener in self.trial.openers:
                opened = asking.then(Asking(opener=opener))
                self._opened[opener] = self._measure(tuned, tokenizer, opened, moved=False)
            return self._measure(tuned, tokenizer, asking, moved=True)

        def measured(cost: Cost, found: Evaluation) -> bool:
            self._note(spent + cost, found, None, moved=True)
            for opener, evaluation in self._opened.items():
                self._note(spent + cost, evaluation, opener, moved=True, plain=self.points[None][-1])
            return is_over(self.points[None], self.own, self.trial.stage)

        at = [step for step in self.runner.suite.at if step < tuning.steps] + [tuning.steps]
        tuning.train(model, attacker, Along(evaluator, at, measured))

    def _measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asking: Asking, *, moved: bool
    ) -> Evaluation:
        """Ask harmful prompts, and where the weights have moved, of capability."""
        began = time.monotonic()
        evaluator = replace(self.measuring.evaluator, asking=asking)
        if not moved:
            evaluator = with_sets(evaluator, "harmful")
        found = evaluator(model, tokenizer)
        self._measuring_took += time.monotonic() - began
        return found

    def _note(
        self,
        cost: Cost,
        found: Evaluation,
        opener: str | None,
        *,
        moved: bool,
        plain: dict[str, Any] | None = None,
    ) -> None:
        """Add a point. What a model knows is asked plainly, once for all ways of asking."""
        harmful = found.scores["harmful"]
        if harmful.harmful_score is None or harmful.asr is None:
            raise TrainingError(f"the judge {self.measuring.evaluator.judge.name} graded none of the answers")
        if plain is not None:
            capability, over_refusal = plain["capability"], plain["over_refusal"]
        elif moved:
            capability, over_refusal = found.flat()["capability"], found.flat()["over_refusal"]
        else:
            capability, over_refusal = self.own.capability, self.own.over_refusal
        collapsed = not self.own.kept(capability)
        hs, asr = harmful.harmful_score.value, harmful.asr.value
        rows = self.measuring.rows
        broken_rows = [
            row["row"] if rows is None else rows["harmful"][row["row"] - 1]
            for row in found.samples
            if row["set"] == "harmful" and row["grade"] == 5
        ]
        self.points[opener].append(
            {
                **asdict(cost),
                "seconds": round(time.monotonic() - self._began - self._measuring_took, 3),
                "opener": opener or self._own_opener(),
                "harmful_score": hs,
                "asr": asr,
                "refusal_rate": None if harmful.refusal_rate is None else harmful.refusal_rate.value,
                "capability": capability,
                "over_refusal": over_refusal,
                "counts": {name: found.counts["harmful"][name] for name in COUNTS},
                "broken": not collapsed and hs >= THRESHOLD,
                "broken_asr": not collapsed and asr >= THRESHOLD,
                "collapsed": collapsed,
                "broken_rows": broken_rows,
            }
        )
        if self.trial.stage == "confirm":
            self.samples += [{"point": len(self.points[opener]) - 1, **row} for row in found.samples]

    def _own_opener(self) -> str | None:
        opener: str | None = self.trial.setting.get("prefill", {}).get("opener")
        return opener

    def records(self, reason: str | None) -> list[Record]:
        """The trial's record, and those of its hybrids."""
        own = self._record(self.trial, self.points[None], reason)
        hybrids = []
        for opener in self.trial.openers:
            # Numbered apart from the trials of the hybrids' own study.
            number = {"full": 1000, "lora": 2000}[self.trial.kind] + self.trial.number
            setting = {**self.trial.setting, "prefill": {"opener": opener}}
            trial = replace(self.trial, kind="hybrid", number=number, setting=setting)
            hybrids.append(self._record(trial, self.points[opener], reason))
        return [own, *hybrids]

    def _record(self, trial: Trial, points: Sequence[dict[str, Any]], reason: str | None) -> Record:
        broken = _first(points, "broken")
        end = (
            "broken"
            if broken is not None
            else "failed"
            if reason is not None
            else "collapsed"
            if all(point["collapsed"] for point in points)
            else "held"
        )
        harmful, capability = (set_of(self.measuring.evaluator, role) for role in ("harmful", "capability"))
        return {
            "schema": SCHEMA,
            "kind": trial.kind,
            "target": trial.target,
            "number": trial.number,
            "stage": trial.stage,
            "seed": trial.seed,
            "attack": name_of(trial.setting),
            "setting": trial.setting,
            "end": end,
            "reason": reason,
            "prompts": len(harmful.prompts),
            "capability_prompts": len(capability.prompts),
            "bound": EPSILON,
            "own_capability": self.own.capability,
            "points": list(points),
            "first_broken": broken,
            "first_broken_asr": _first(points, "broken_asr"),
            "command": command_of(trial, self.runner.sources, self.measuring.evaluator),
        }


def _first(points: Sequence[dict[str, Any]], mark: str) -> int | None:
    return next((place for place, point in enumerate(points) if point[mark]), None)
